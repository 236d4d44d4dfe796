# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Draws rows of training text from a corpus, and makes some repeat text or names, to teach recall."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .documents import SPLIT_FILES, read_documents


def held_out_windows(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, context: int, per_document: int
) -> list[torch.Tensor]:
    """`[1, context]` windows of held-out text: the first `per_document` of each document that do not overlap."""
    windows = []
    for document in read_documents(corpus / SPLIT_FILES["held_out"]):
        tokens = [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(document.text).ids]
        starts = range(0, len(tokens) - context + 1, context)
        windows += [torch.tensor([tokens[start : start + context]]) for start in starts[:per_document]]
    if not windows:
        raise ValueError(f"`context` {context} is longer than every held-out document in {corpus}.")
    return windows


class TokenSampler:
    """Windows of training text: a pure function of the step, so that a resumed run sees the same ones."""

    def __init__(self, corpus: Path, split: str, tokenizer: PreTrainedTokenizerBase, book_weight: float = 1.0):
        documents = read_documents(corpus / SPLIT_FILES[split])
        encode = tokenizer.backend_tokenizer.encode
        ends = [tokenizer.eos_token_id]
        self.documents = [np.array(ends + encode(d.text).ids + ends, dtype=np.int64) for d in documents]
        weights = [
            len(x) * (1.0 if "sotu" in d.source else book_weight)
            for x, d in zip(self.documents, documents, strict=True)
        ]
        self.probabilities = np.array(weights) / sum(weights)
        self.vocab_size = len(tokenizer)

    def batch(
        self, seed: int, rows: int, length: int, repeats: tuple[float, float] = (0.0, 0.0), names: float = 0.0
    ) -> torch.Tensor:
        """`[rows, length]` token ids, each row a window of one document, unless it repeats its beginning to its end.

        Args:
            seed: seed of all random choices.
            rows: number of windows.
            length: tokens in each.
            repeats: fractions of rows that repeat 4 to `length / 2` tokens of text, and as many random tokens.
            names: fraction of rows with 1 to 4 names, of 2 to 6 random tokens each, inserted at 4 to 16 places.
        """
        random = np.random.default_rng(seed)
        windows = []
        for document in random.choice(len(self.documents), size=rows, p=self.probabilities):
            tokens = self.documents[document]
            start = random.integers(0, max(1, len(tokens) - length + 1))
            windows.append(np.resize(tokens[start : start + length], length))
        batch = np.stack(windows)
        for row in batch:
            kind = random.uniform()
            if kind < sum(repeats):
                period = int(np.exp(random.uniform(np.log(4), np.log(length // 2 + 1))))
                if kind >= repeats[0]:
                    row[:period] = random.integers(self.vocab_size, size=period)
                row[:] = np.resize(row[:period], length)
        for row in batch:
            if random.uniform() < names:
                lengths = random.integers(2, 7, size=random.integers(1, 5))
                known = [random.integers(self.vocab_size, size=n) for n in lengths]
                told = [known[i] for i in random.integers(len(known), size=random.integers(4, 17))]
                places = np.repeat(random.integers(length, size=len(told)), [len(name) for name in told])
                row[:] = np.insert(row, places, np.concatenate(told))[:length]
        return torch.from_numpy(batch)
