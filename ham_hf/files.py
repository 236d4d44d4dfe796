# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes and copies files whole or not at all, for the tools."""

import shutil
from pathlib import Path

from .files_ham import whole_file


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path`, see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def copy_whole(source: Path, target: Path) -> None:
    """Copies `source` to `target`, see `whole_file`."""
    with whole_file(target) as unfinished:
        shutil.copyfile(source, unfinished)
