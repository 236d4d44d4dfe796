# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Lays out runs as one table, a row per run: usage, memory and loss."""

from rich import box
from rich.table import Table
from rich.text import Text

from ..cache_report_ham import unit_of
from ..paged_store_ham import PAGE_SIZE
from .runs import Run

BARS = "▁▂▃▄▅▆▇█"
# From this many columns on there is room for two spaces between the table's columns.
WIDE = 92


def runs_table(runs: list[Run], width: int) -> Table:
    """The table of `runs` for a console of `width` columns."""
    unit, size = unit_of(max(run.full_kv_bytes for run in runs))
    setting = "kv-\nusage" if runs[0].setting.name == "kv_usage" else "thres-\nhold"
    headers = [setting, "tokens\nseen", "held/\nhead", "total\nusage", "usage by\nlayer"]
    headers += [f"KV held\n{unit}", f"KV full\n{unit}", "held/\nfull", f"state\n{unit}", "tokens\n/s"]
    windows = any(run.kept < run.usage for run in runs)
    if windows:
        headers.insert(3, "router\nkept")
    if any(run.loss is not None for run in runs):
        headers.append("loss on\n2nd half")
    padding = (0, 1 if width >= WIDE else 0, 0, 0)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=padding, pad_edge=False, header_style="bold")
    for header in headers:
        left = header.startswith("usage by")
        table.add_column(header, justify="left" if left else "right", vertical="bottom", overflow="fold")
    for run in runs:
        table.add_row(*cells(run, size, windows))
    return table


def cells(run: Run, unit_size: int, windows: bool) -> list[str | Text]:
    """One row; bytes are divided by `unit_size`; with `windows` the share that the routers kept has a column."""
    row: list[str | Text] = [
        run.setting.label,
        f"{run.tokens_seen:,}",
        f"{run.held_per_head:,.1f}",
        *([f"{run.kept:.1%}"] if windows else []),
        f"{run.usage:.1%}",
        Text(bars(run.usage_by_layer), style="cyan"),
        f"{run.kv_bytes / unit_size:,.1f}",
        f"{run.full_kv_bytes / unit_size:,.1f}",
        f"{run.kv_bytes / run.full_kv_bytes:.0%}",
        f"{run.state_bytes / unit_size:,.1f}",
        f"{run.tokens_per_second:,.0f}" if run.tokens_per_second >= 10 else f"{run.tokens_per_second:.2g}",
    ]
    return row if run.loss is None else [*row, f"{run.loss:.3f}"]


def footnote(scored: bool) -> str:
    """Explanation of the table's numbers."""
    loss = "; loss: nats per token on the second half of the prompt" if scored else ""
    return (
        f"KV held: bytes allocated, in pages of {PAGE_SIZE} tokens a head; KV full: keys and values of every token "
        f"seen; state: convolution and RNN, the same at any length{loss}."
    )


def bars(fractions: list[float]) -> str:
    """A bar one character wide for each fraction."""
    return "".join(BARS[round(min(1.0, fraction) * (len(BARS) - 1))] for fraction in fractions)
