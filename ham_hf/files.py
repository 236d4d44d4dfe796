# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes files whole or not at all, for the tools."""

import os
import shutil
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path` through a file beside it, so that an interrupted write leaves what was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def copy_whole(source: Path, target: Path) -> None:
    """Copies `source` to `target` through a file beside it, so that an interrupted copy leaves what was there."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
