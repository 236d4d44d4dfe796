# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Cuts a text into the tokens that a model reads and the words that a picture shows for them."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Passage:
    """The tokens of one text.

    Attributes:
        ids: `[1, T]` int64.
        texts: `T` strings. They join to the text where the tokenizer says where its tokens lie in it; of tokens that
            share a character the first has it, and the others are empty.
        total: tokens of the whole text, `T` unless it was cut.
    """

    ids: torch.Tensor
    texts: tuple[str, ...]
    total: int

    @classmethod
    def of(cls, tokenizer: Any, text: str, length: int | None = None) -> "Passage":
        """Cuts `text` into tokens.

        Args:
            tokenizer: the model's.
            text: the text.
            length: most tokens to take, the first ones; `None` for all.

        Raises:
            ValueError: if `text` holds no token, or `length` is below 1.
        """
        if length is not None and length < 1:
            raise ValueError(f"`length` must be a positive int or None, got {length}.")
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids = encoded["input_ids"]
        if not ids:
            raise ValueError(f"`text` must hold at least one token, got {text[:40]!r}.")
        taken = ids[:length]
        if tokenizer.is_fast:
            texts = _texts_at(text, encoded["offset_mapping"][:length])
        else:
            texts = [tokenizer.decode([i]) for i in taken]
        special = tokenizer.all_special_ids
        texts = [x or (tokenizer.decode([i]) if i in special else "") for x, i in zip(texts, taken, strict=True)]
        return cls(torch.tensor([taken]), tuple(texts), len(ids))


def _texts_at(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """The part of `text` that each token adds, with what lies between it and the token before."""
    texts, done = [], 0
    for start, end in offsets:
        end = max(end, done) if end > start else done  # a special token lies nowhere
        texts.append(text[done:end])
        done = end
    return texts
