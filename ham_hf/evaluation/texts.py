# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads the text to judge a model by: plain files, folders of them, JSON Lines and Parquet."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .calibration import spread_windows

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
# What is read of a folder; a file named alone may be called anything, and is plain text.
FOLDER_SUFFIXES = (".txt", ".md", ".rst", *JSON_LINES, PARQUET)


def read_texts(paths: Iterable[Path], field: str = "text") -> list[str]:
    """The documents of files and folders, in the order of the paths and, within a folder, of the names.

    A plain file is one document. JSON Lines have one in each line, Parquet in each row, under the name `field`.

    Args:
        paths: UTF-8 files, or folders, which are searched through for `FOLDER_SUFFIXES`; hidden files are left out.
        field: the field, or the column, with the text.

    Raises:
        ValueError: for a file that is missing, is not what its name says or lacks the field; for a folder without
            text; and if no document holds more than white space.
        ImportError: for Parquet without pyarrow.
    """
    texts = [text for path in paths for file in files_of(path) for text in documents_of(file, field)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("`paths` must name files with text, got only empty ones.")
    return texts


def files_of(path: Path) -> list[Path]:
    """The path itself, or the files with text in a folder and its folders."""
    if not path.is_dir():
        return [path]
    visible = [x for x in sorted(path.rglob("*")) if not any(p.startswith(".") for p in x.relative_to(path).parts)]
    files = [x for x in visible if x.is_file() and x.suffix in FOLDER_SUFFIXES]
    if not files:
        raise ValueError(f"The folder {path} holds no file that ends in {', '.join(FOLDER_SUFFIXES)}.")
    return files


def documents_of(path: Path, field: str) -> Iterator[str]:
    """The documents of a file."""
    if path.suffix == PARQUET:
        yield from parquet_column(path, field)
        return
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: it is not UTF-8 text.") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    if path.suffix not in JSON_LINES:
        yield content
        return
    # `splitlines` would also part at separators that JSON allows within a string.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}, must be a JSON object with the string `{field}`, got {line!r}.")
        yield text


def parquet_column(path: Path, field: str) -> list[str]:
    """The strings of a column."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if field not in table.column_names:
        raise ValueError(f"{path} must have the column `{field}`, got {table.column_names}.")
    column = table.column(field).to_pylist()
    if not all(isinstance(x, str) for x in column):
        raise ValueError(f"{path} must have strings in the column `{field}`, got {table.schema.field(field).type}.")
    return column


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The token ids of all documents, each but the last followed by the tokenizer's end of text, if it has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        stream += [*(end if stream else []), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return stream


def text_windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, count: int) -> torch.Tensor:
    """`[N, length]` int64 windows at equal distances over the documents, N at most `count`; none overlaps another.

    Where the tokenizer puts a token before every text, such as Llama's, it stands before every window.

    Raises:
        ValueError: if the documents together are shorter than one window.
    """
    special = tokenizer("")["input_ids"][:1]
    beginning = special if special == [tokenizer.bos_token_id] else []
    windows = torch.cat(spread_windows(token_stream(tokenizer, texts), length - len(beginning), count))
    return torch.cat([torch.tensor([beginning], dtype=torch.int64).expand(len(windows), -1), windows], 1)
