# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Keeps the results of healing as JSON Lines, a row per measured stage."""

import json
from pathlib import Path
from typing import Any

from ham_hf.files import read_rows, write_whole

# Fields that all stages share.
SHARED = ("settings", "windows")


def write_results(results: dict[str, Any], path: Path) -> None:
    """Writes a row for each stage: its name (`run`), the shared fields, and its `figures`."""
    shared = {name: results[name] for name in SHARED}
    rows = [{"run": name, **shared, "figures": x} for name, x in results.items() if name not in SHARED]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_results(path: Path) -> dict[str, Any]:
    """Reads the results that `write_results` wrote."""
    rows = read_rows(path)
    return {name: rows[0][name] for name in SHARED} | {row["run"]: row["figures"] for row in rows}
