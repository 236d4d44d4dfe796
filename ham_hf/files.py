# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes text files whole or not at all, for the tools."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path` through a file beside it, so that an interrupted write leaves what was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
