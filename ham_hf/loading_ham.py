# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checks of a checkpoint's files before anything is read or memory is taken; who may read those that are written."""

import errno
import math
import os
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

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
