# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A router that knows what will be asked: the most that a choice of tokens can give, to measure others by."""

from typing import Any

import torch
from torch import nn

from ham_hf.modeling_ham import HAMForCausalLM

from .recall import RecallTask


def use_oracle(model: HAMForCausalLM, task: RecallTask) -> None:
    """Makes a model whose router is `"random"` rank every token that its row asks for above all others.

    Scores of asked tokens lie in `[0.5, 1)`, those of others in `[0, 0.5)`: at random, as those of the router.

    Raises:
        ValueError: for another router.
    """
    if model.config.router != "random":
        raise ValueError(f"`router` must be 'random' for an oracle, got {model.config.router!r}.")
    asked = torch.empty(0)

    def read(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        nonlocal asked
        asked = task.asked_for(arguments["input_ids"])

    def rank(_: nn.Module, __: Any, scores: torch.Tensor) -> torch.Tensor:
        return (scores + asked[..., None]) / 2

    model.register_forward_pre_hook(read, with_kwargs=True)
    for layer in model.model.layers:
        layer.mixer.router.register_forward_hook(rank)
