# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures a model on held-out text: its loss, that of passages read before, and needles."""

import statistics

import torch
from transformers import PreTrainedModel

from ham_hf import HAMForCausalLM
from ham_hf.evaluation.losses import window_figures

from ..needles import NEEDLE, answered, with_needle
from ..rows import Row

ROWS = 8


def measure(model: PreTrainedModel, windows: torch.Tensor, usage: float) -> Row:
    """The figures of `[N, T]` held-out windows, of which a HAM keeps the fraction `usage`.

    Returns:
        `held`, the fraction of tokens in memory at the end; and one figure a window: `loss` and `second_time` (nats
        per token) as in `WindowFigures`, and `needle`, the fraction of the answer that is ranked first where the
        window's text holds a needle.
    """
    model.eval()
    memory = {"kv_usage": usage} if isinstance(model, HAMForCausalLM) else {}
    figures = [x for rows in windows.split(ROWS) for x in window_figures(model, rows, **memory)]
    distance = windows.shape[1] - NEEDLE
    with_needles = torch.cat(
        [with_needle(x[None], distance, i, model.config.vocab_size)[0] for i, x in enumerate(windows)]
    )
    return {
        "held": round(statistics.mean(1.0 if x.held is None else x.held for x in figures), 5),
        "loss": [round(x.loss, 5) for x in figures],
        "second_time": [round(x.second_time, 5) for x in figures],
        "needle": [round(x, 3) for rows in with_needles.split(ROWS) for x in answered(model, rows, **memory)],
    }
