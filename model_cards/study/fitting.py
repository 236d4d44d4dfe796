# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Builds and trains the small models of the studies, all in one way."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ham_hf.configuration_ham import HAMConfig
from ham_hf.modeling_ham import HAMForCausalLM
from ham_hf.training.control import Target, UsageSchedule, clipped_parameters, parameter_groups
from ham_hf.training.initialization import initialize_recall
from ham_hf.training.recipe import at_least

Batch = tuple[torch.Tensor, torch.Tensor]
# Number of steps over which results average the loss.
LOSS_BLOCK = 50


@dataclass(frozen=True)
class Training:
    """Training of every model of a study: AdamW, a warm-up, then a cosine decay to zero.

    Attributes:
        steps: number of updates.
        rows: rows in a batch.
        learning_rate: peak rate of all parameters but thresholds.
        router_learning_rate: peak rate of learned routers; `learning_rate` if `None`.
        weight_decay: weight decay of matrices.
        warmup: steps until the peak.
        usage_from: usage at the beginning, which falls in a straight line to the target over the first
            `usage_ramp` of the steps; `None` begins at the target.
        usage_ramp: fraction of the steps in which usage falls.
        frozen: fraction of the steps, at the beginning, in which thresholds are held where they start.
    """

    steps: int
    rows: int
    learning_rate: float
    router_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    usage_from: float | None = None
    usage_ramp: float = 0.3
    frozen: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.frozen <= 1:
            raise ValueError(f"`frozen` must be a fraction of the steps, between 0 and 1, got {self.frozen!r}.")
        for name in ("steps", "rows", "warmup"):
            at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "router_learning_rate", "weight_decay"):
            at_least(name, getattr(self, name), 0)

    def rate(self, step: int) -> float:
        """Factor of the learning rates."""
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def schedule(self, target: Target) -> UsageSchedule:
        """The target usage of every step."""
        points: tuple[tuple[int, Target], ...] = ((0, target),)
        if self.usage_from is not None:
            points = ((0, self.usage_from), (round(self.usage_ramp * self.steps), target))
        return UsageSchedule(points, freeze_steps=round(self.frozen * self.steps))


def build_model(config: HAMConfig, seed: int) -> HAMForCausalLM:
    """A model that starts with copying layers."""
    torch.manual_seed(seed)
    model = HAMForCausalLM(config)
    initialize_recall(model)
    return model


def config_of_size(settings: dict[str, Any], parameters: int) -> HAMConfig:
    """The configuration with these settings and the MLP width that comes closest to a number of parameters.

    Raises:
        ValueError: if it has more without an MLP.
    """
    sizes = []
    for width in (1, 2):
        with torch.device("meta"):
            model = HAMForCausalLM(HAMConfig(**settings | {"intermediate_size": width}))
        sizes.append(model.num_parameters())
    slope = sizes[1] - sizes[0]
    width = round((parameters - sizes[0]) / slope) + 1
    if width < 1:
        raise ValueError(f"`parameters` must be at least {sizes[0]} for these settings, got {parameters}.")
    return HAMConfig(**settings | {"intermediate_size": width})


def routing_arguments(config: HAMConfig, length: int, kv_usage: float | None) -> dict[str, Any]:
    """Arguments of a call on rows of `length` tokens, to keep a fraction of them; `None`: the fraction of training.

    With the router `"recency"` a budget holds as many of the last tokens: the window to compare other routers with.
    """
    if config.router == "recency":
        usage = config.target_kv_usage if kv_usage is None else kv_usage
        assert isinstance(usage, float)
        return {"kv_budget": max(1, round(usage * length))}
    return {} if kv_usage is None else {"kv_usage": kv_usage}


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
        batch_at: function that returns token ids and labels `[rows, T]` of a step.
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
    # Thresholds, which only hybrid layers have, keep a constant learning rate.
    scheduled = optimizer.param_groups[:-1] if model.config.num_hybrid_layers else optimizer.param_groups
    peaks = [group["lr"] for group in scheduled]
    assert model.config.target_kv_usage is not None
    schedule = training.schedule(model.config.target_kv_usage)
    model.train()
    losses = []
    for step in tqdm(range(training.steps), desc=name, leave=False, mininterval=2):
        for group, peak in zip(scheduled, peaks, strict=True):
            group["lr"] = peak * training.rate(step)
        if model.config.fixed_threshold is None:
            model.config.target_kv_usage = schedule.target_at(step)
        ids, labels = batch_at(step)
        ids, labels = ids.to(model.device), labels.to(model.device)
        arguments = routing_arguments(model.config, ids.shape[1], None)
        loss = model(input_ids=ids, labels=labels, use_cache=False, **arguments).loss
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


def block_means(losses: list[float]) -> list[float]:
    """The means of every `LOSS_BLOCK` losses, and of the rest if they do not fill the last block."""
    return [statistics.mean(losses[i : i + LOSS_BLOCK]) for i in range(0, len(losses), LOSS_BLOCK)]
