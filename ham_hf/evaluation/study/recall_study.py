# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Recall against the number of pairs and the fraction kept, for one model of the study and one seed."""

from typing import Any

import torch

from ...modeling_ham import HAMForCausalLM
from ..calibration import calibrate
from .fitting import Training, build_model, fit
from .gradients import use_gradient
from .recall import IGNORED, RecallTask

# Batches of evaluation and calibration are drawn from here on, where no training batch is.
EVALUATION_SEED = 10**9
EVALUATION_ROWS = 64
CALIBRATION_BATCHES = 4
# How often the masks before and after an update are compared.
PROBE_EVERY = 50


def run_recall(
    settings: dict[str, Any],
    parameters: int,
    task: RecallTask,
    training: Training,
    usages: list[float],
    measured_pairs: list[int],
    seed: int,
    name: str,
    gradient: str,
    device: str,
) -> dict[str, Any]:
    """Trains one model and measures what it recalls.

    Args:
        settings: fields of its HAMConfig.
        parameters: how many parameters it is to have, about.
        task: what it learns.
        training: how.
        usages: fractions to keep when it is measured, beside its learned thresholds.
        measured_pairs: numbers of pairs of the rows it is measured on.
        seed: of weights and batches.
        name: shown beside the progress.
        gradient: of a learned router, one of `GRADIENTS`.
        device: where.

    Returns:
        `parameters`; `losses`, a mean of every 50 steps; `flicker`, the fraction of masks that one update changed,
        every 50 steps; `accuracy` and `usage`, by what was asked for (`"learned"` or a fraction) and number of pairs.
    """
    model = build_model(settings | {"vocab_size": task.vocab_size}, parameters, seed).to(device)  # type: ignore[arg-type]  # torch wraps it
    use_gradient(model, gradient)
    probe = _Probe(model, task.batch(EVALUATION_SEED - 1, training.rows)[0].to(device))

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return task.batch(seed * 1_000_003 + step, training.rows)

    losses = fit(model, batch_at, training, name, probe.watch if model.config.num_hybrid_layers else None)
    asked: list[float | None] = [None]
    if model.config.num_hybrid_layers:
        batches = (task.batch(EVALUATION_SEED + 1000 + i, EVALUATION_ROWS)[0] for i in range(CALIBRATION_BATCHES))
        calibrate(model, batches)
        asked += usages
    accuracy: dict[str, dict[int, float]] = {}
    usage: dict[str, dict[int, float]] = {}
    for kv_usage in asked:
        key = "learned" if kv_usage is None else str(kv_usage)
        measured = {pairs: _measure(model, task, pairs, kv_usage) for pairs in measured_pairs}
        accuracy[key] = {pairs: x[0] for pairs, x in measured.items()}
        usage[key] = {pairs: x[1] for pairs, x in measured.items()}
    return {
        "parameters": model.num_parameters(),
        "losses": [sum(losses[i : i + PROBE_EVERY]) / PROBE_EVERY for i in range(0, len(losses), PROBE_EVERY)],
        "flicker": probe.flicker,
        "accuracy": accuracy,
        "usage": usage,
    }


@torch.no_grad()
def _measure(model: HAMForCausalLM, task: RecallTask, pairs: int, kv_usage: float | None) -> tuple[float, float]:
    """The fraction of values named right, and the fraction of tokens kept, in rows with so many pairs."""
    ids, labels = (x.to(model.device) for x in task.batch(EVALUATION_SEED + pairs, EVALUATION_ROWS, pairs))
    outputs = model(input_ids=ids, use_cache=False, kv_usage=kv_usage, output_routing_scores=True)
    asked = labels[:, 1:] != IGNORED
    right = (outputs.logits[:, :-1].argmax(-1) == labels[:, 1:])[asked]
    return right.float().mean().item(), _kept(model, outputs.routing_scores, kv_usage).float().mean().item()


def _kept(
    model: HAMForCausalLM, routing_scores: tuple[torch.Tensor, ...] | None, kv_usage: float | None = None
) -> torch.Tensor:
    """`[L, B, T, Hk]` bool, which tokens hybrid layers keep; of a model without any, what its other layers keep."""
    if not routing_scores:
        return torch.tensor(["full_attention" in model.config.layer_types])
    thresholds = model.model.layer_thresholds(None, kv_usage, 1)
    hybrid = [layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]
    forced = [x for x, kind in zip(thresholds, model.config.layer_types, strict=True) if kind == "hybrid"]
    kept = [
        scores >= (mixer.threshold.detach()[None] if threshold is None else threshold)[:, None]
        for scores, mixer, threshold in zip(routing_scores, hybrid, forced, strict=True)
    ]
    return torch.stack(kept)


class _Probe:
    """Watches how many masks of a fixed batch one update changes."""

    def __init__(self, model: HAMForCausalLM, ids: torch.Tensor):
        self.model, self.ids = model, ids
        self.flicker: list[float] = []
        self._before: torch.Tensor | None = None

    @torch.no_grad()
    def watch(self, step: int) -> None:
        """Looks at the masks before and after the last of every 50 steps."""
        if (step + 1) % PROBE_EVERY > 0 and (step + 2) % PROBE_EVERY > 0:
            return
        self.model.eval()
        outputs = self.model(input_ids=self.ids, use_cache=False, output_routing_scores=True)
        kept = _kept(self.model, outputs.routing_scores)
        self.model.train()
        if (step + 1) % PROBE_EVERY == 0 and self._before is not None:
            self.flicker.append((kept != self._before).float().mean().item())
        self._before = kept
