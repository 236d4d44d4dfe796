# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Language modelling and needles for one model of the study: loss against usage, recall against distance, scores."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from ham_hf.evaluation import calibrate
from ham_hf.evaluation.losses import window_figures
from ham_hf.inspection.readings import recorded_decays
from ham_hf.modeling_ham import HAMForCausalLM
from ham_hf.training.recipe import at_least
from ham_hf.training.sampling import TokenSampler, held_out_windows

from .fitting import block_means, fit, routing_arguments
from .gradients import use_gradient
from .job import Job

# Seeds of calibration and needles start here, beyond those of training batches.
EVALUATION_SEED = 10**9
CALIBRATION_BATCHES = 16
# Random tokens of a needle, and how many of them, at its start, are the question; the others are the answer.
NEEDLE, QUESTION = 10, 2
NEEDLES = 24
# Fractions of the text before the question at which needles lie.
DEPTHS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class LanguageTask:
    """Settings of training and measurement.

    Attributes:
        context: tokens in a row.
        repeats: the fractions of rows that repeat text and random tokens.
        windows: number of held-out windows of each work.
        distances: numbers of tokens before a question.
    """

    context: int
    repeats: tuple[float, float]
    windows: int
    distances: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.repeats) != 2 or min(self.repeats) < 0 or sum(self.repeats) > 1:
            raise ValueError(f"`repeats` must be two fractions of rows, of text and of noise, got {self.repeats}.")
        at_least("windows", self.windows, 1)
        at_least("context", self.context, 2 * NEEDLE)
        for distance in self.distances:
            at_least("distances", distance, NEEDLE)


class Texts:
    """The text of a corpus in tokens.

    Args:
        corpus: folder written by `model_cards.ham_tiny.corpus`.
        tokenizer: folder of a tokenizer.
    """

    def __init__(self, corpus: Path, tokenizer: Path):
        self.corpus = corpus
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.training = TokenSampler(corpus, "train", self.tokenizer)

    def held_out(self, context: int, per_document: int) -> list[torch.Tensor]:
        """`[1, context]` windows of held-out works."""
        return held_out_windows(self.corpus, self.tokenizer, context, per_document)


def run_language(job: Job, texts: Texts, device: str) -> dict[str, Any]:
    """Trains one model on text and measures it, at its learned thresholds and at the study's usages.

    Returns:
        `parameters`; `losses` of training, see `block_means`; by usage, of every window, the loss (nats per token)
        `held_out`, and those of its end read a `second_time` and of its `first` and `repeated` tokens, as in
        `WindowFigures`; `usage`, by usage, the fraction kept; `needle`, by usage and distance, the fraction of a
        needle's tokens that are predicted; `traces` of hybrid models, see `_traces`.
    """
    task, training, sampler = LanguageTask(**job.settings["task"]), job.training, texts.training
    model = job.build(sampler.vocab_size, device)
    use_gradient(model, job.settings["gradient"])

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = sampler.batch(job.seed * 1_000_003 + step, training.rows, task.context, task.repeats)
        return ids, ids

    losses = fit(model, batch_at, training, job.name)
    asked: list[float | None] = [None]
    if model.config.num_hybrid_layers:
        if model.config.router != "recency":
            calibrate(model, (sampler.batch(EVALUATION_SEED + i, 4, task.context) for i in range(CALIBRATION_BATCHES)))
        asked += job.settings["usages"]
    windows = texts.held_out(task.context, task.windows)
    result: dict[str, Any] = {"parameters": model.num_parameters(), "losses": block_means(losses)}
    for kv_usage in asked:
        key = "learned" if kv_usage is None else str(kv_usage)
        figures = _held_out(model, windows, kv_usage)
        figures["needle"] = {x: _needle(model, windows, x, kv_usage) for x in task.distances}
        for name, figure in figures.items():
            result.setdefault(name, {})[key] = figure
    return result | ({"traces": _traces(model, windows)} if model.config.num_hybrid_layers else {})


def _held_out(model: HAMForCausalLM, windows: list[torch.Tensor], kv_usage: float | None) -> dict[str, Any]:
    """The losses of every window, see `run_language`, and the mean `usage`, 0 without attention."""
    figures = []
    for ids in windows:
        arguments = routing_arguments(model.config, ids.shape[1], kv_usage)
        figures += window_figures(model, ids.to(model.device), **arguments)
    return {
        "held_out": [x.loss for x in figures],
        "second_time": [x.second_time for x in figures],
        "first": [x.first for x in figures],
        "repeated": [x.repeated for x in figures],
        "usage": statistics.mean(x.kept or 0.0 for x in figures),
    }


def _with_needle(window: torch.Tensor, distance: int, index: int, vocab_size: int) -> tuple[torch.Tensor, int]:
    """Text `[1, distance + NEEDLE]` that holds a needle, repeated at its end; and the needle's position."""
    random = np.random.default_rng([EVALUATION_SEED, index])
    needle = torch.from_numpy(random.integers(vocab_size, size=NEEDLE))[None]
    place = int(DEPTHS[index % len(DEPTHS)] * (distance - NEEDLE))
    text = window[:, : distance - NEEDLE]
    return torch.cat([text[:, :place], needle, text[:, place:], needle], dim=1), place


@torch.no_grad()
def _needle(model: HAMForCausalLM, windows: list[torch.Tensor], distance: int, kv_usage: float | None) -> float:
    """The fraction of answer tokens that the model ranks first, over needles at several depths."""
    right = []
    for index in range(NEEDLES):
        # A text longer than a window joins several windows.
        text = torch.cat([windows[(index + i) % len(windows)] for i in range(distance // windows[0].shape[1] + 1)], 1)
        ids = _with_needle(text, distance, index, model.config.vocab_size)[0].to(model.device)
        arguments = routing_arguments(model.config, ids.shape[1], kv_usage)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=NEEDLE, **arguments).logits[0]
        answer = ids[0, QUESTION - NEEDLE :]
        right.append((logits[QUESTION - 1 : -1].argmax(-1) == answer).float().mean().item())
    return sum(right) / len(right)


@torch.no_grad()
def _traces(model: HAMForCausalLM, windows: list[torch.Tensor]) -> dict[str, Any]:
    """Data for plots of scores, averaged over heads.

    Returns:
        `scores` and `decay` `[L, T]` along one window with a needle at `needle` (decay is `exp(g)`); `by_position`
        `[L, T]`, mean scores over all windows.
    """
    ids, place = _with_needle(windows[0], windows[0].shape[1] - NEEDLE, 1, model.config.vocab_size)
    ids = ids.to(model.device)
    with recorded_decays(model) as decays:
        scores = model(input_ids=ids, use_cache=False, output_routing_scores=True).routing_scores
    everywhere = [
        torch.stack(model(input_ids=x.to(model.device), use_cache=False, output_routing_scores=True).routing_scores)
        for x in windows
    ]
    return {
        "needle": [place, place + NEEDLE],
        "scores": torch.stack(scores)[:, 0].mean(-1).tolist(),
        "decay": torch.stack([calls[0][0] for calls in decays.values()]).mean(-1).tolist(),
        "by_position": torch.stack(everywhere).mean((0, 2, 4)).tolist(),
    }
