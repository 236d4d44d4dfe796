# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Multi-query associative recall: pairs hidden among filler, then keys that ask for their values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ham_hf.training.recipe import at_least

FILLERS = ("random", "pattern")
IGNORED = -100


@dataclass(frozen=True)
class RecallTask:
    """Rows that hold pairs of a key and a value at random places, and end in queries (after arXiv 2312.04927).

    Filler consists of values, so that no token shows by itself that it belongs to a pair, unless filler is `marked`.
    Keys are token ids from 0, values follow, and then the tokens of marked filler.

    Attributes:
        filler: `"random"`, or `"pattern"`: a few values of the row that repeat, which an RNN can predict.
        pairs: possible numbers of pairs in a row; a training row draws one of them.
        length: tokens in a row; three for each pair if that is more.
        queries: pairs asked for at the end of a row, each a key and its value; two tokens each.
        keys: number of different keys, at least as many as pairs.
        values: number of different values.
        period: tokens after which a pattern repeats.
        marked: True to give filler tokens of its own, as many as there are values.
    """

    filler: str
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    length: int = 96
    queries: int = 16
    keys: int = 64
    values: int = 64
    period: int = 8
    marked: bool = False

    def __post_init__(self) -> None:
        if self.filler not in FILLERS:
            raise ValueError(f"`filler` must be one of {FILLERS}, got {self.filler!r}.")
        for name in ("length", "queries", "keys", "values", "period"):
            at_least(name, getattr(self, name), 1)
        self.check_pairs(self.pairs)

    def check_pairs(self, pairs: Sequence[int]) -> None:
        """Raises `ValueError` for numbers of pairs for which there are not enough keys."""
        if not pairs or min(pairs) < 1 or max(pairs) > self.keys:
            raise ValueError(f"`pairs` must lie between 1 and {self.keys}, the number of keys, got {pairs}.")

    @property
    def vocab_size(self) -> int:
        """Keys, values and marked filler."""
        return self.keys + self.values * (1 + self.marked)

    def batch(self, seed: int, rows: int, pairs: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, `[rows, T]` int64 each; labels are -100 except for the values asked for.

        Args:
            seed: seed of all random choices.
            rows: number of rows.
            pairs: number of pairs in every row, instead of a drawn one; training need not have seen it.
        """
        random = np.random.default_rng(seed)
        length = self.row_length(pairs or max(self.pairs))
        drawn = [self._row(random, pairs or int(random.choice(self.pairs)), length) for _ in range(rows)]
        tokens, labels = (torch.from_numpy(np.stack(x)) for x in zip(*drawn, strict=True))
        return tokens, labels

    def row_length(self, pairs: int) -> int:
        """Tokens in a row that has room for so many pairs."""
        return max(self.length, 3 * pairs, 2 * pairs + 2 * min(pairs, self.queries))

    def asked_for(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[rows, T]` bool: the keys in rows of `tokens` `[rows, T]` that come again at the end, and their values."""
        same = (tokens[:, :, None] == tokens[:, None]) & (tokens < self.keys)[:, None]
        keys = same.triu(1).any(2)
        return keys | keys.roll(1, 1)

    def _row(self, random: np.random.Generator, pairs: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        # Filler between pairs, and before and after them, up to the queries.
        fillers = length - 2 * min(pairs, self.queries) - 2 * pairs
        filler = random.integers(self.values, size=fillers) + self.keys + self.values * self.marked
        if self.filler == "pattern":
            filler = np.resize(filler[: self.period], fillers)
        keys = random.permutation(self.keys)[:pairs]
        values = random.integers(self.values, size=pairs) + self.keys
        # A pair counts as one item among the fillers, so that it is never split.
        is_pair = np.zeros(fillers + pairs, dtype=bool)
        is_pair[random.permutation(fillers + pairs)[:pairs]] = True
        widths = np.where(is_pair, 2, 1)
        starts = np.cumsum(widths) - widths
        row = np.empty(length, dtype=np.int64)
        row[starts[~is_pair]] = filler
        row[starts[is_pair]], row[starts[is_pair] + 1] = keys, values
        asked = random.permutation(pairs)[: self.queries]
        row[-2 * len(asked) :: 2], row[1 - 2 * len(asked) :: 2] = keys[asked], values[asked]
        labels = np.full_like(row, IGNORED)
        labels[1 - 2 * len(asked) :: 2] = values[asked]
        return row, labels
