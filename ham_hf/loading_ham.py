# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Loading and saving: every override of Transformers' own, checks of files before they are read, and permissions."""

import errno
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel
from transformers.utils import logging

# The minor releases of Transformers that the tests run on.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 17), (5, 24)
# The first minor release in which FSDP2 has groups by dtype also for a tied model in half precision.
TIES_BY_DTYPE = (5, 23)
HOW_TO_CONVERT = (
    "unpickling others could run code. Convert them once with `safetensors.torch.save_file(torch.load(path, "
    "weights_only=True), 'model.safetensors', metadata={'format': 'pt'})`"
)
# How many times the parameters in its files a model may have: quantisation packs several into one number, and those of
# a new head are missing. A model of few needs no files at all.
MOST_PARAMETERS = 16
FEW_PARAMETERS = 2**22
# What `save_pretrained` writes: a model, or an adapter alone.
CONFIGURATIONS = ("config.json", "adapter_config.json")
# The permissions that safetensors gives what it writes.
PRIVATE = 0o600
SAVED_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")


def check_files(files: list[str], sharded_metadata: dict[str, Any] | None) -> None:
    """Refuses, with `ValueError`, weights that are no safetensors, and an index that leads out of its folder."""
    foreign = [file for file in files if not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"Weights are read from safetensors files only, got {foreign[0]!r}; {HOW_TO_CONVERT}.")
    for name in sorted(set((sharded_metadata or {}).get("weight_map", {}).values())):
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"The index of the weights must name files beside it, got {name!r}.")


def open_weights(path: str | os.PathLike) -> Any:
    """An open safetensors file; `ValueError` that names it if it is none, or was cut off."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_size(model: nn.Module, files: list[str]) -> None:
    """Refuses, with `ValueError`, a model far larger than its files, before memory is taken for it."""
    held = 0
    for file in files:
        # Opening compares the header with the size of the file.
        with open_weights(file) as weights:
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    wanted = sum(x.numel() for x in model.parameters())
    if wanted > max(MOST_PARAMETERS * held, FEW_PARAMETERS):
        raise ValueError(
            f"The configuration asks for {wanted} parameters, the files hold {held}, less than one in "
            f"{MOST_PARAMETERS}: the checkpoint is damaged, or of another model."
        )


def check_folder(path: str | os.PathLike) -> None:
    """Refuses, with `NotADirectoryError`, a file as the folder to save to: Transformers would log that and go on."""
    if os.path.isfile(path):
        raise NotADirectoryError(errno.ENOTDIR, "A model is saved to a folder, not to a file", os.fspath(path))


def share_weights(folder: str | os.PathLike) -> None:
    """Gives the weights just saved to `folder` the permissions of the configuration, which followed the umask."""
    config = next((x for x in map(Path(folder).joinpath, CONFIGURATIONS) if x.is_file()), None)
    if config is None:  # a process that saves nothing
        return
    permissions = stat.S_IMODE(config.stat().st_mode)
    for pattern in SAVED_WEIGHTS:
        for path in Path(folder).glob(pattern):
            if stat.S_IMODE(path.stat().st_mode) == PRIVATE:
                path.chmod(permissions)


def transformers_release() -> tuple[int, int] | None:
    """The minor release of Transformers, `None` if its version does not say."""
    release = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    return None if release is None else (int(release[1]), int(release[2]))


def check_sharding(model: PreTrainedModel) -> None:
    """Refuses, with `ValueError`, a tied model in half precision that FSDP2 shards under Transformers before 5.23.

    These releases leave its head to the group of the mixers' float32 parameters, and FSDP2 takes no group of two
    dtypes, which it would say at the first forward only.
    """
    sharded = any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)
    half = model.dtype in (torch.float16, torch.bfloat16)
    release = transformers_release()
    if not (sharded and half and model.config.tie_word_embeddings) or release is None or release >= TIES_BY_DTYPE:
        return
    raise ValueError(
        f"`dtype` must be torch.float32 where FSDP2 shards a model with a tied head under Transformers "
        f"{transformers.__version__}, got {model.dtype}: install Transformers 5.23 or newer, or load in float32 and "
        "train under autocast."
    )


def warn_of_untested_transformers() -> None:
    """Warns once in a process of a Transformers that was never tested: code travels with checkpoints, and meets it."""
    release = transformers_release()
    if release is None or OLDEST_TRANSFORMERS <= release <= NEWEST_TRANSFORMERS:
        return
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    # A logger warns once of what it has said itself, and the code of every checkpoint has modules of its own.
    logging.get_logger("transformers").warning_once(
        f"HAM was tested with Transformers {oldest} to {newest}, and this is {transformers.__version__}. If anything "
        "fails, install a tested release, or newer code of HAM."
    )


class HAMLoadingMixin:
    """Loading and saving of a HAM: nothing is unpickled, and files are checked before they are read."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        use_safetensors: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Self:
        """As in Transformers, but nothing is unpickled: weights are read from safetensors files only.

        Raises:
            ValueError: also for `use_safetensors=False` and `weights_only=False`, for files that are too small for
                what the configuration asks for, before memory is taken for it, and see `check_sharding`.
        """
        if use_safetensors is False or not weights_only:
            name, value = ("use_safetensors", use_safetensors) if weights_only else ("weights_only", weights_only)
            raise ValueError(f"`{name}` must not be {value!r}: HAM reads safetensors files only, as {HOW_TO_CONVERT}.")
        loaded = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *model_args, use_safetensors=True, **kwargs
        )
        # With `output_loading_info=True` a pair.
        check_sharding(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> Any:
        # Here the files are found, wherever they were, and the model has its shapes but no memory yet.
        if state_dict is None and checkpoint_files:
            check_files(checkpoint_files, load_config.sharded_metadata)
            # Keys are expected when an adapter is loaded, which has files of its own and is smaller than the model.
            if expected_keys is None:
                check_size(model, checkpoint_files)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        # Loading replaces parameters by new ones, all of which require a gradient.
        for module in model.modules():
            threshold = getattr(module, "threshold", None)
            if isinstance(threshold, nn.Parameter):
                threshold.requires_grad_(bool(module.learns_threshold))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves as Transformers does, but where that fails in silence, or in other words, an `OSError` names the path.

        The weights may be read by whoever may read the configuration: safetensors leaves them to the owner alone.
        """
        check_folder(save_directory)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise OSError(f"Cannot write the weights to {save_directory}: {error}") from error
        share_weights(save_directory)

    def _load_and_finalize_distributed_pretrained_model(self, folder: str, *arguments: Any) -> Any:
        # The other way in, for folders that hold the shards of several ranks; absent from Transformers 5.17.
        check_size(self, [str(file) for file in Path(folder).glob("*.safetensors")])  # type: ignore[arg-type]
        return super()._load_and_finalize_distributed_pretrained_model(folder, *arguments)  # type: ignore[misc]
