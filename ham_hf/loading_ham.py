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
# Largest ratio of a model's parameters to those in its files: quantisation packs several into one number, and those of
# a new head are missing. A model of few parameters always passes.
MOST_PARAMETERS = 16
FEW_PARAMETERS = 2**22
# Configuration files that `save_pretrained` writes, for a model or for an adapter alone.
CONFIGURATIONS = ("config.json", "adapter_config.json")
# Permissions of the files that safetensors writes.
PRIVATE = 0o600
SAVED_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")


def check_files(files: list[str], sharded_metadata: dict[str, Any] | None) -> None:
    """Raises `ValueError` for weights that are not safetensors, and for an index that leads out of its folder."""
    foreign = [file for file in files if not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"Weights are read from safetensors files only, got {foreign[0]!r}; {HOW_TO_CONVERT}.")
    for name in sorted(set((sharded_metadata or {}).get("weight_map", {}).values())):
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"The index of the weights must name files beside it, got {name!r}.")


def open_weights(path: str | os.PathLike) -> Any:
    """Opens a safetensors file; raises `ValueError`, naming the file, if it is of another format or was cut off."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_size(model: nn.Module, files: list[str]) -> None:
    """Raises `ValueError` for a model far larger than its files, before memory is allocated for it."""
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
    """Raises `NotADirectoryError` if the folder to save to is a file: Transformers would log that and go on."""
    if os.path.isfile(path):
        raise NotADirectoryError(errno.ENOTDIR, "A model is saved to a folder, not to a file", os.fspath(path))


def share_weights(folder: str | os.PathLike) -> None:
    """Gives the weights just saved to `folder` the permissions of the configuration, which follow the umask."""
    config = next((x for x in map(Path(folder).joinpath, CONFIGURATIONS) if x.is_file()), None)
    if config is None:  # a process that saves nothing
        return
    permissions = stat.S_IMODE(config.stat().st_mode)
    for pattern in SAVED_WEIGHTS:
        for path in Path(folder).glob(pattern):
            if stat.S_IMODE(path.stat().st_mode) == PRIVATE:
                path.chmod(permissions)


def transformers_release() -> tuple[int, int] | None:
    """The minor release of Transformers, such as `(5, 24)`; `None` if its version is of another form."""
    release = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    return None if release is None else (int(release[1]), int(release[2]))


def check_sharding(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a tied model in half precision that FSDP2 shards under Transformers before 5.23.

    These releases put its head in the group of the mixers' float32 parameters. FSDP2 takes no group of two dtypes, but
    would fail only at the first forward.
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
    """Warns once per process of an untested Transformers, which code that travels with checkpoints may meet."""
    release = transformers_release()
    if release is None or OLDEST_TRANSFORMERS <= release <= NEWEST_TRANSFORMERS:
        return
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    # Transformers' logger, because the code of every checkpoint has modules, and so loggers, that would each warn.
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
        """Loads as Transformers does, but unpickles nothing: weights are read from safetensors files only.

        Raises:
            ValueError: also for `use_safetensors=False` and `weights_only=False`, for files that are too small for
                the configuration, before memory is allocated, and as `check_sharding` does.
        """
        if use_safetensors is False or not weights_only:
            name, value = ("use_safetensors", use_safetensors) if weights_only else ("weights_only", weights_only)
            raise ValueError(f"`{name}` must not be {value!r}: HAM reads safetensors files only, as {HOW_TO_CONVERT}.")
        loaded = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *model_args, use_safetensors=True, **kwargs
        )
        # `output_loading_info=True` returns a pair.
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
        # By now the files are found, and the model has its shapes but no memory.
        if state_dict is None and checkpoint_files:
            check_files(checkpoint_files, load_config.sharded_metadata)
            # Only an adapter has expected keys; its files are smaller than the model's.
            if expected_keys is None:
                check_size(model, checkpoint_files)
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        # Loading replaces parameters by new ones that all require a gradient.
        for module in model.modules():
            threshold = getattr(module, "threshold", None)
            if isinstance(threshold, nn.Parameter):
                threshold.requires_grad_(bool(module.learns_threshold))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves as Transformers does; a failure that it hides or reports otherwise raises an `OSError` with the path.

        The weights get the permissions of the configuration: safetensors would let only the owner read them.
        """
        check_folder(save_directory)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise OSError(f"Cannot write the weights to {save_directory}: {error}") from error
        share_weights(save_directory)

    def _load_and_finalize_distributed_pretrained_model(self, folder: str, *arguments: Any) -> Any:
        # The second way to load, for folders that hold the shards of several ranks; absent from Transformers 5.17.
        check_size(self, [str(file) for file in Path(folder).glob("*.safetensors")])  # type: ignore[arg-type]
        return super()._load_and_finalize_distributed_pretrained_model(folder, *arguments)  # type: ignore[misc]
