# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Builds and trains the small models of the studies, all in one way."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ...configuration_ham import HAMConfig
from ...modeling_ham import HAMForCausalLM
from ...training.control import Target, UsageSchedule, clipped_parameters, parameter_groups
from ...training.ham_tiny import initialize_recall

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Training:
    """How every model of a study is trained: AdamW, a warm-up, then a cosine down to nothing.

    Attributes:
        steps: updates.
        rows: rows in a batch.
        learning_rate: peak, of all but thresholds.
        router_learning_rate: peak of learned routers; `learning_rate` if `None`.
        weight_decay: of matrices.
        warmup: steps until the peak.
        usage_from: usage at the beginning, which falls in a straight line to the target over the first
            `usage_ramp` of the steps; `None` begins at the target.
        usage_ramp: fraction of the steps.
    """

    steps: int
    rows: int
    learning_rate: float
    router_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    usage_from: float | None = None
    usage_ramp: float = 0.3

    def rate(self, step: int) -> float:
        """Factor of the learning rates."""
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def schedule(self, target: Target) -> UsageSchedule:
        """The target usage of every step."""
        if self.usage_from is None:
            return UsageSchedule(((0, target),))
        return UsageSchedule(((0, self.usage_from), (round(self.usage_ramp * self.steps), target)))


def build_model(settings: dict[str, Any], parameters: int, seed: int) -> HAMForCausalLM:
    """A model that starts with copying layers, its MLP as wide as brings it closest to a number of parameters."""
    settings = settings | {"intermediate_size": matching_width(settings, parameters)}
    torch.manual_seed(seed)
    model = HAMForCausalLM(HAMConfig(**settings))
    initialize_recall(model)
    return model


def matching_width(settings: dict[str, Any], parameters: int) -> int:
    """The MLP width at which a model of these settings has about so many parameters."""
    sizes = []
    for width in (1, 2):
        with torch.device("meta"):
            model = HAMForCausalLM(HAMConfig(**settings | {"intermediate_size": width}))
        sizes.append(model.num_parameters())
    slope = sizes[1] - sizes[0]
    width = round((parameters - sizes[0]) / slope) + 1
    if width < 1:
        raise ValueError(f"`parameters` must be at least {sizes[0]} for these settings, got {parameters}.")
    return width


def fit(
    model: HAMForCausalLM,
    batch_at: Callable[[int], Batch],
    training: Training,
    name: str,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains a model and returns the loss of every step.

    Args:
        model: changed in place, and left in evaluation mode.
        batch_at: gives token ids and labels `[rows, T]` of a step.
        training: the recipe.
        name: shown beside the progress.
        watch: called after every step with its number.

    Raises:
        RuntimeError: if a loss is not finite.
    """
    groups = parameter_groups(
        model, training.learning_rate, training.weight_decay, router_learning_rate=training.router_learning_rate
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert model.config.target_kv_usage is not None
    schedule = training.schedule(model.config.target_kv_usage)
    model.train()
    losses = []
    for step in tqdm(range(training.steps), desc=name, leave=False, mininterval=2):
        # Thresholds, the last group, follow their usage at one pace.
        for group, peak in zip(optimizer.param_groups[:-1], peaks[:-1], strict=True):
            group["lr"] = peak * training.rate(step)
        model.config.target_kv_usage = schedule.target_at(step)
        ids, labels = batch_at(step)
        ids, labels = ids.to(model.device), labels.to(model.device)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        if not torch.isfinite(loss):
            raise RuntimeError(f"The loss of {name} is {loss.item()} at step {step}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clipped_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if watch is not None:
            watch(step)
    model.eval()
    return losses
