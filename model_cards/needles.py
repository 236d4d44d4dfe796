# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Needles of random tokens in text, which is followed by their beginning: the model is to say the rest."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

# Seeds of needles start here, beyond those of training batches.
SEED = 10**9
# Random tokens of a needle, and how many of them, at its start, are the question; the others are the answer.
NEEDLE, QUESTION = 10, 2
# Fractions of the text before the question at which needles lie.
DEPTHS = (0.1, 0.5, 0.9)


def with_needle(text: torch.Tensor, distance: int, index: int, vocab_size: int) -> tuple[torch.Tensor, int]:
    """Puts a needle among tokens `[1, T]`, and again at the end.

    Args:
        text: int64 token ids, at least `distance - NEEDLE`.
        distance: tokens before the question, those of the needle among them.
        index: number of the needle, which decides its tokens and its depth.
        vocab_size: number of different tokens.

    Returns:
        `[1, distance + NEEDLE]` token ids, and the needle's position.
    """
    random = np.random.default_rng([SEED, index])
    needle = torch.from_numpy(random.integers(vocab_size, size=NEEDLE))[None]
    place = int(DEPTHS[index % len(DEPTHS)] * (distance - NEEDLE))
    text = text[:, : distance - NEEDLE]
    return torch.cat([text[:, :place], needle, text[:, place:], needle], dim=1), place


@torch.no_grad()
def answered(model: PreTrainedModel, ids: torch.Tensor, **memory: Any) -> list[float]:
    """For each row of `[B, T]` ids that ends in a needle, the fraction of the answer that the model ranks first.

    `memory` are further arguments of the model's call.
    """
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=NEEDLE, **memory).logits
    right = logits[:, QUESTION - 1 : -1].argmax(-1) == ids[:, QUESTION - NEEDLE :]
    return right.float().mean(1).tolist()
