# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes tables in Markdown."""

from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table without a line break at its end."""
    return "\n".join([row(columns), "|---" * len(columns) + "|", *map(row, rows)])
