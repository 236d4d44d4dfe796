# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares the logits of a source, computed by its own code, with those of the HAM made of it."""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
)

# Float32 rounding of one model computed in two orders, relative to the largest logit if that is above 1.
TOLERANCE = 1e-4
# Functions of Transformers' models that an installed package replaces.
PACKAGED = (
    "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update"
)  # fmt: skip


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, vocabulary]` in float32 of the causal language model in `folder`, by its Auto class."""
    return model_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokens)


def model_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, vocabulary]` of one of Transformers' models."""
    with torch.no_grad(), in_pytorch(model):
        return model(input_ids=tokens, use_cache=False).logits


@contextlib.contextmanager
def in_pytorch(model: torch.nn.Module) -> Iterator[None]:
    """Makes a model of Transformers compute in PyTorch.

    If flash-linear-attention or causal-conv1d is installed, Transformers calls it for CPU tensors too, and that
    crashes.
    """
    module = sys.modules[type(model).__module__]
    packaged = {name: getattr(module, name) for name in PACKAGED if hasattr(module, name)}
    try:
        for name, function in packaged.items():
            setattr(module, name, inspect.unwrap(function))
        yield
    finally:
        for name, function in packaged.items():
            setattr(module, name, function)


def transformers_model(config: PreTrainedConfig) -> torch.nn.Module:
    """The causal language model of a configuration, by its Auto class."""
    return AutoModelForCausalLM.from_config(config)


def shapes_of(build: Callable[[Any], torch.nn.Module], config: PreTrainedConfig) -> dict[str, torch.Size]:
    """The shapes in a model's safetensors, found without weights; a tied head is not among them."""
    with torch.device("meta"):
        model = build(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def compare_logits(expected: torch.Tensor, got: torch.Tensor) -> dict[str, Any]:
    """Differences between two models' logits `[B, T, vocabulary]`, and the allowed difference."""
    difference = (expected - got).abs()
    return {
        "tokens": expected.shape[0] * expected.shape[1],
        "dtype": "float32",
        "max_abs_logit_error": difference.max().item(),
        "mean_abs_logit_error": difference.mean().item(),
        "top1_agreement": (expected.argmax(-1) == got.argmax(-1)).float().mean().item(),
        "tolerance": TOLERANCE * max(1.0, expected.abs().max().item()),
    }


def agree(figures: dict[str, Any]) -> bool:
    """True if two models' logits differ by no more than allowed; never if some are not finite numbers."""
    return figures["max_abs_logit_error"] <= figures["tolerance"] < math.inf
