# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Text as rows of tokens for training: streamed, packed without leaks, in an order that can be resumed."""

import glob
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from .recipe import FORMATS, DataRecipe

# Characters that are tokenised at a time; at least one document.
CHARACTERS_AT_A_TIME = 2**18
SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}


class Position(NamedTuple):
    """Start of a block of rows: the documents to read again, and an offset into them.

    Attributes:
        row: number of rows before it since the beginning of training.
        passes: number of complete passes over the data before it.
        held_out: number of rows of this pass that are still to be left out.
        source: the state of the `datasets.IterableDataset` before the documents that the block begins with.
        offset: number of tokens of these documents that belong to earlier rows.
    """

    row: int
    passes: int
    held_out: int
    source: dict[str, Any] | None
    offset: int


def open_documents(recipe: DataRecipe, seed: int) -> datasets.IterableDataset:
    """The documents of a recipe, with their text in `recipe.column`, read as they are needed.

    The seed decides the order of files; documents keep their order within a file.
    """
    if recipe.files is None:
        found = datasets.load_dataset(recipe.name, recipe.config, split=recipe.split, streaming=recipe.streaming)
        return found if recipe.streaming else found.to_iterable_dataset()
    paths = recipe.paths()
    random.Random(seed).shuffle(paths)
    kind = FORMATS[paths[0].suffix]
    options = {"sample_by": SAMPLE_BY[recipe.document]} if kind == "text" else {}
    files = [glob.escape(str(path.resolve())) for path in paths]
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


class PackedRows(IterableDataset):
    """Endless rows of `context` tokens, cut from the documents one after another, each ended by the EOS token.

    A row is `input_ids`, `position_ids` and `labels`, int64 `[context]`. Positions restart where a document begins,
    which tells HAM to keep documents apart, and the first token of each has the label -100, as nothing before it
    predicts it. A document that is cut goes on in the next row, which does not see the earlier part. Tokens at the end
    of a pass that do not fill a row are dropped. Rows are shuffled within blocks; the order depends on the seed and
    the pass alone.

    Args:
        recipe: source of the text.
        tokenizer: tokenizer with an EOS token.
        context: tokens in a row.
        seed: seed of the order.
        held_out: number of rows to leave out at the beginning of every pass.

    Raises:
        ValueError: on iteration, if the data has no such column, or fills no row.
    """

    def __init__(
        self, recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, context: int, seed: int, held_out: int = 0
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("`tokenizer` must have an EOS token, which ends every document; it has none.")
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.context = context
        self.seed = seed
        self.held_out = held_out
        self.documents = open_documents(recipe, seed)
        self.begin, self.start = Position(0, 0, held_out, None, 0), 0
        # Blocks that have begun, and may hold the row after the last checkpoint.
        self.blocks = [self.begin]

    def state_dict(self, row: int) -> dict[str, Any]:
        """State for `load_state_dict` to go on with `row`, as plain JSON; forgets the blocks before it."""
        while len(self.blocks) > 1 and self.blocks[1].row <= row:
            del self.blocks[0]
        return {"row": row, "block": self.blocks[0]._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration begin with the row of `state_dict`."""
        self.begin, self.start = Position(**state["block"]), state["row"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields rows from the last loaded one on, or from the first."""
        self.blocks = [self.begin]
        skip = self.start - self.begin.row
        for position, rows in self._blocks(self.begin):
            if position.row > self.begin.row:
                self.blocks.append(position)
            order = np.random.default_rng([self.seed, position.passes, position.row]).permutation(len(rows))
            for index in order[skip:]:
                yield row_of(*rows[index])
            skip = 0

    def first_rows(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first rows in the order of the data, held out or not; fewer if the data has fewer."""
        rows = []
        for _, _, tokens, starts in self._pass(None, 0):
            rows.append(row_of(tokens, starts))
            if len(rows) == count:
                break
        return rows

    def _blocks(self, at: Position) -> Iterator[tuple[Position, list[tuple[np.ndarray, np.ndarray]]]]:
        """Yields blocks of rows with their start, in all passes over the data, one after the other."""
        while True:
            rows: list[tuple[np.ndarray, np.ndarray]] = []
            begun, before = at, at.row
            for source, offset, tokens, starts in self._pass(at.source, at.offset):
                if at.held_out:
                    at = at._replace(held_out=at.held_out - 1)
                    continue
                if not rows:
                    begun = Position(at.row, at.passes, 0, source, offset)
                rows.append((tokens, starts))
                at = at._replace(row=at.row + 1)
                if len(rows) == self.recipe.shuffle_rows:
                    yield begun, rows
                    rows = []
            if rows:
                yield begun, rows
            if at.row == before and at.source is None:
                raise ValueError(
                    f"`data` has too little text: it must fill at least one row of {self.context} tokens"
                    + (f" beside the {self.held_out} for evaluation." if self.held_out else ".")
                )
            at = Position(at.row, at.passes + 1, self.held_out, None, 0)

    def _pass(
        self, source: dict[str, Any] | None, offset: int
    ) -> Iterator[tuple[dict[str, Any] | None, int, np.ndarray, np.ndarray]]:
        """Yields the rows of one pass from a place in it: the place, tokens, and bools where a document starts."""
        tokens, starts = np.empty(0, np.int32), np.empty(0, bool)
        places: list[tuple[int, dict[str, Any] | None, int]] = []  # offset in `tokens` where documents begin
        for state, new_tokens, new_starts in self._tokens(source):
            skip, offset = offset, 0
            places.append((len(tokens), state, skip))
            tokens = np.concatenate([tokens, new_tokens[skip:]])
            starts = np.concatenate([starts, new_starts[skip:]])
            used = 0
            while len(tokens) - used >= self.context:
                begin, state, skipped = [x for x in places if x[0] <= used][-1]
                row = slice(used, used + self.context)
                yield state, used - begin + skipped, tokens[row], starts[row]
                used += self.context
            tokens, starts = tokens[used:], starts[used:]
            kept = max(i for i, x in enumerate(places) if x[0] <= used)
            places = [(begin - used, state, skipped) for begin, state, skipped in places[kept:]]

    def _tokens(self, source: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any] | None, np.ndarray, np.ndarray]]:
        """Yields a few documents at a time: the state before them, their tokens, and bools where each begins."""
        if source is None:
            self.documents = open_documents(self.recipe, self.seed)
        else:
            self.documents.load_state_dict(source)
        texts: list[str] = []
        state, characters = source, 0
        for document in self._documents():
            texts.append(self._text(document))
            characters += 1 + len(texts[-1])
            if characters >= CHARACTERS_AT_A_TIME:
                yield state, *self._encode(texts)
                texts, state, characters = [], self.documents.state_dict(), 0
        if texts:
            yield state, *self._encode(texts)

    def _documents(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.documents
        except UnicodeDecodeError as error:
            raise ValueError(f"`data` must be UTF-8 text in every file: {error}.") from error

    def _text(self, document: dict[str, Any]) -> str:
        text = document.get(self.recipe.column)
        if not isinstance(text, str):
            found = f"{type(text).__name__} there" if self.recipe.column in document else f"columns {sorted(document)}"
            raise ValueError(f"`data: column` must name a column of text, got {self.recipe.column!r} and {found}.")
        return text

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        end = self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        documents = [ids if ids[-1] == end else [*ids, end] for ids in encoded if ids]
        tokens = np.concatenate([np.empty(0, np.int32), *(np.array(ids, np.int32) for ids in documents)])
        starts = np.zeros(len(tokens), bool)
        starts[np.cumsum([0, *map(len, documents)])[:-1]] = True
        return tokens, starts


def row_of(tokens: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
    """A model's inputs: `input_ids`, `position_ids` that restart with each document, and `labels`."""
    place = np.arange(len(tokens))
    begin = np.maximum.accumulate(np.where(starts, place, 0))
    input_ids = torch.from_numpy(tokens.astype(np.int64))
    labels = input_ids.masked_fill(torch.from_numpy(starts), -100)
    return {"input_ids": input_ids, "position_ids": torch.from_numpy(place - begin), "labels": labels}
