# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Recall against the number of pairs and the fraction kept, for one model of the study and one seed."""

from typing import Any

import torch

from ham_hf.evaluation import calibrate
from ham_hf.modeling_ham import HAMForCausalLM
from ham_hf.training.control import UsageMeter, thresholds_of

from .fitting import block_means, fit, routing_arguments
from .gradients import use_gradient
from .job import Job
from .oracle import use_oracle
from .recall import IGNORED, RecallTask

# Seeds of evaluation and calibration start here, beyond those of training batches.
EVALUATION_SEED = 10**9
EVALUATION_ROWS = 64
CALIBRATION_BATCHES = 4
# Steps between comparisons of the masks before and after an update.
PROBE_EVERY = 50


def run_recall(job: Job, device: str) -> dict[str, Any]:
    """Trains one model and measures its recall, at its learned thresholds and at the study's usages.

    Returns:
        `parameters`; `losses`, see `block_means`; `flicker`, the fraction of masks that one update changed,
        every 50 steps; `accuracy` and `usage`, by requested usage (`"learned"` or a fraction) and number of pairs.
    """
    task, training = RecallTask(**job.settings["task"]), job.training
    model = job.build(task.vocab_size, device)
    use_gradient(model, job.settings["gradient"])
    if job.settings.get("oracle"):
        use_oracle(model, task)
    probe = _Probe(model, task.batch(EVALUATION_SEED - 1, training.rows)[0].to(device))

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return task.batch(job.seed * 1_000_003 + step, training.rows)

    losses = fit(model, batch_at, training, job.name, probe.watch if model.config.num_hybrid_layers else None)
    asked: list[float | None] = [None]
    if model.config.num_hybrid_layers:
        batches = (task.batch(EVALUATION_SEED + 1000 + i, EVALUATION_ROWS)[0] for i in range(CALIBRATION_BATCHES))
        if model.config.router != "recency":
            calibrate(model, batches)
        asked += job.settings["usages"]
    accuracy: dict[str, dict[int, float]] = {}
    usage: dict[str, dict[int, float]] = {}
    for kv_usage in asked:
        key = "learned" if kv_usage is None else str(kv_usage)
        measured = {pairs: _measure(model, task, pairs, kv_usage) for pairs in job.settings["pairs"]}
        accuracy[key] = {pairs: x[0] for pairs, x in measured.items()}
        usage[key] = {pairs: x[1] for pairs, x in measured.items()}
    return {
        "parameters": model.num_parameters(),
        "losses": block_means(losses),
        "flicker": probe.flicker,
        "accuracy": accuracy,
        "usage": usage,
    }


@torch.no_grad()
def _measure(model: HAMForCausalLM, task: RecallTask, pairs: int, kv_usage: float | None) -> tuple[float, float]:
    """The fraction of values predicted correctly, and the fraction of tokens kept, in rows with `pairs` pairs."""
    ids, labels = (x.to(model.device) for x in task.batch(EVALUATION_SEED + pairs, EVALUATION_ROWS, pairs))
    if model.config.num_hybrid_layers:
        arguments = routing_arguments(model.config, ids.shape[1], kv_usage)
        with UsageMeter(model) as meter:
            logits = model(input_ids=ids, use_cache=False, **arguments).logits
        # A meter counts what is admitted, also what a budget drops later.
        budget = arguments.get("kv_budget", ids.shape[1])
        usage = min(meter.read()["usage"].mean().item(), budget / ids.shape[1])
    else:
        logits = model(input_ids=ids, use_cache=False).logits
        usage = model.config.layer_types.count("full_attention") / model.config.num_hidden_layers
    asked = labels[:, 1:] != IGNORED
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[asked]
    return right.float().mean().item(), usage


class _Probe:
    """Measures the fraction of masks of a fixed batch that one update changes."""

    def __init__(self, model: HAMForCausalLM, ids: torch.Tensor):
        self.model, self.ids = model, ids
        self.flicker: list[float] = []
        self._before: torch.Tensor | None = None

    @torch.no_grad()
    def watch(self, step: int) -> None:
        """Compares the masks before and after the last of every 50 steps."""
        if (step + 1) % PROBE_EVERY > 0 and (step + 2) % PROBE_EVERY > 0:
            return
        self.model.eval()
        scores = self.model(input_ids=self.ids, use_cache=False, output_routing_scores=True).routing_scores
        thresholds = thresholds_of(self.model).values()
        kept = torch.stack([x >= threshold for x, threshold in zip(scores, thresholds, strict=True)])
        self.model.train()
        if (step + 1) % PROBE_EVERY == 0 and self._before is not None:
            self.flicker.append((kept != self._before).float().mean().item())
        self._before = kept
