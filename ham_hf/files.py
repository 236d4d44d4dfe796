# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes and copies files whole or not at all, and files of rows a row at a time, for the tools."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .files_ham import whole_file


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path`, see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def copy_whole(source: Path, target: Path) -> None:
    """Copies `source` to `target`, see `whole_file`."""
    with whole_file(target) as unfinished:
        shutil.copyfile(source, unfinished)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON Lines, none if there is no file; leaves out an interrupted row at its end."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row to a file, replacing an interrupted row at its end."""
    line = json.dumps(row).encode() + b"\n"
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
