# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Tokens for a small model, and readings made up without one."""

import torch

from ham_hf.inspection import Passage, Reading


def passage(length, vocab_size=97):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(2, vocab_size, (1, length), generator=generator)
    return Passage(ids, tuple(f" {i}" for i in ids[0].tolist()), length)


def made_up(length, layers=(0, 2), heads=2, texts=None, **changes):
    """A reading of random scores, kept from 0.5 on, whose query is the last token."""
    generator = torch.Generator().manual_seed(length)
    scores = torch.rand(len(layers), length, heads, generator=generator)
    kept = scores >= 0.5
    visible = kept.clone()
    visible[:, -1] = True
    weights = torch.rand(len(layers), heads, 2, length, generator=generator)
    weights = (weights * visible.mT[:, :, None]).flatten(1, 2)
    fields = {
        "setting": "threshold 0.5",
        "router": "cosine",
        "texts": texts or tuple(f" w{i}" for i in range(length)),
        "first": 0,
        "seen": length,
        "layers": layers,
        "left_out": ((1, "linear_attention"),),
        "windows": (0,) * len(layers),
        "sinks": (0,) * len(layers),
        "thresholds": torch.full((len(layers), heads), 0.5),
        "scores": scores,
        "kept": kept,
        "held": kept,
        "decay": torch.rand(len(layers), length, heads, generator=generator),
        "query": length - 1,
        "attention": weights / weights.sum(-1, keepdim=True),
        "visible": visible,
    }
    return Reading(**(fields | changes))
