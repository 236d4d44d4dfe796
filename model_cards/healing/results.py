# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Keeps the results of healing as JSON Lines, a row for each stage that was measured."""

import json
from pathlib import Path
from typing import Any

from ham_hf.files import write_whole

from ..rows import read_rows

# What all stages have in common.
SHARED = ("settings", "windows")


def write_results(results: dict[str, Any], path: Path) -> None:
    """Writes a row for each stage: its name (`run`), what all have in common, and its `figures`."""
    shared = {name: results[name] for name in SHARED}
    rows = [{"run": name, **shared, "figures": x} for name, x in results.items() if name not in SHARED]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` was given."""
    rows = read_rows(path)
    return {name: rows[0][name] for name in SHARED} | {row["run"]: row["figures"] for row in rows}
