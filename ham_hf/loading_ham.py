# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What is asked of a checkpoint's files before anything is read from them or memory is taken for them."""

import math
import os
from typing import Any

from safetensors import safe_open
from torch import nn

HOW_TO_CONVERT = (
    "unpickling others could run code. Convert them once with `safetensors.torch.save_file(torch.load(path, "
    "weights_only=True), 'model.safetensors', metadata={'format': 'pt'})`"
)
# How many times the parameters in its files a model may have: quantisation packs several into one number, and those of
# a new head are missing. A model of few needs no files at all.
MOST_PARAMETERS = 16
FEW_PARAMETERS = 2**22


def check_files(files: list[str], sharded_metadata: dict[str, Any] | None) -> None:
    """Refuses, with `ValueError`, weights that are no safetensors, and an index that leads out of its folder."""
    foreign = [file for file in files if not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"Weights are read from safetensors files only, got {foreign[0]!r}; {HOW_TO_CONVERT}.")
    for name in sorted(set((sharded_metadata or {}).get("weight_map", {}).values())):
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"The index of the weights must name files beside it, got {name!r}.")


def check_size(model: nn.Module, files: list[str]) -> None:
    """Refuses, with `ValueError`, a model far larger than its files, before memory is taken for it."""
    held = 0
    for file in files:
        # Opening compares the header with the size of the file.
        with safe_open(file, framework="pt") as weights:
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    wanted = sum(x.numel() for x in model.parameters())
    if wanted > max(MOST_PARAMETERS * held, FEW_PARAMETERS):
        raise ValueError(
            f"The configuration asks for {wanted} parameters, the files hold {held}, less than one in "
            f"{MOST_PARAMETERS}: the checkpoint is damaged, or of another model."
        )
