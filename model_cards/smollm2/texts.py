# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Text that ships with Python (topics of its help, PSF licence): one half to calibrate on, the other to judge by."""

from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

from ham_hf.evaluation.importance import Example, needle_examples

CONTEXT = 1024
CALIBRATION_WINDOWS, CALIBRATION_NEEDLES = 4, 4


def halves() -> tuple[str, str]:
    """The text to calibrate on, and the text to judge by: no paragraph is in both.

    The topics overlap, so a paragraph of the first half is left out if the second half has its words too.
    """
    names = sorted(topics)
    middle = len(names) // 2
    judged = paragraphs(names[middle:])
    told = {words(x) for x in judged}
    calibration = [x for x in paragraphs(names[:middle]) if words(x) not in told]
    return "\n\n".join(calibration), "\n\n".join(judged)


def paragraphs(names: list[str]) -> list[str]:
    """The paragraphs of some topics, each once, in order."""
    return list(dict.fromkeys(x for name in names for x in topics[name].split("\n\n") if x.strip()))


def words(paragraph: str) -> tuple[str, ...]:
    """The words of a paragraph, however it is laid out."""
    return tuple(paragraph.split())


def windows(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[torch.Tensor]:
    """`count` windows `[1, CONTEXT]` int64 that do not overlap, spread evenly over a text."""
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    available = tokens.shape[1] // CONTEXT
    if not 0 < count <= available:
        raise ValueError(f"`count` must be from 1 to {available}, the windows in this text, got {count}.")
    starts = [CONTEXT * (i * available // count) for i in range(count)]
    return [tokens[:, start : start + CONTEXT] for start in starts]


def calibration_windows(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Windows `[1, CONTEXT]` for `ham_hf.evaluation.calibrate`."""
    return windows(halves()[0], tokenizer, CALIBRATION_WINDOWS)


def calibration_needles(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Prompts for `ham_hf.evaluation.importance.head_importance`."""
    ids = tokenizer(halves()[0], add_special_tokens=False)["input_ids"]
    return needle_examples(tokenizer, ids, CALIBRATION_NEEDLES, CONTEXT, seed=0)


def judged_windows(tokenizer: PreTrainedTokenizerBase, count: int) -> list[torch.Tensor]:
    """`count` windows `[1, CONTEXT]` of text of which the calibration saw nothing."""
    return windows(halves()[1], tokenizer, count)
