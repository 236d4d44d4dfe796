# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The documents of a corpus, as files of JSON Lines: one for training and one that is held out."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

SPLIT_FILES = {"train": "train.jsonl", "held_out": "held_out.jsonl"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One complete work: a book or a speech."""

    source: str
    title: str
    text: str


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Writes one JSON object per line; the file appears only when it is complete."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_documents(path: Path) -> list[Document]:
    """Reads a file written by ``write_documents``."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; build it, in a checkout of the repository, "
            f"with 'python -m model_cards.ham_tiny.corpus --output {path.parent}'."
        )
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]
