# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Result files: JSON Lines with a row per run, appended when the run is done."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file; leaves out an interrupted row at its end."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: Row) -> None:
    """Appends a row to a file, replacing an interrupted row at its end."""
    line = json.dumps(row).encode() + b"\n"
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def current_commit() -> str | None:
    """The commit of this checkout, with the suffix `-dirty` if its code was changed; `None` outside of git."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head
