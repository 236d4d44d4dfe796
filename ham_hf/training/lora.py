# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""LoRA with peft: adapters on a HAM's projections, and learned thresholds, which peft does not save."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ..files_ham import whole_file
from ..modeling_ham import HAMForCausalLM
from .control import thresholds_of
from .recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import PeftModel

THRESHOLDS = "thresholds.safetensors"


def add_adapters(model: HAMForCausalLM, recipe: LoraRecipe, train_thresholds: bool) -> "PeftModel":
    """Freezes a model, and puts adapters that have no effect yet on its projections.

    Args:
        model: changed in place.
        recipe: size and places of the adapters.
        train_thresholds: True to train thresholds too, unless the configuration fixes them.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the model has no such projections, or projections that peft cannot adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("`lora` needs peft, which the extra `train` brings: pip install 'ham-hf[train]'.") from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # only divided by the rank
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules,
    )
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise ValueError(f"`lora: target_modules` does not go with this model: {error}") from error
    for threshold in thresholds_of(model).values():
        threshold.requires_grad_(train_thresholds and model.config.fixed_threshold is None)
    return adapted


def save_thresholds(model: "PeftModel", folder: Path) -> None:
    """Writes the thresholds beside the adapters of a checkpoint."""
    with whole_file(folder / THRESHOLDS) as unfinished:
        save_file({name: x.detach().cpu() for name, x in thresholds_of(model).items()}, unfinished)


def load_checkpoint(model: "PeftModel", folder: Path) -> None:
    """Loads the adapters and the thresholds of a checkpoint into a model."""
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    saved = load_file(folder / THRESHOLDS)
    with torch.no_grad():
        for name, threshold in thresholds_of(model).items():
            threshold.copy_(saved[name])
