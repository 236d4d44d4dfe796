# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The tables and the picture of healing, from stored rows alone."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ham_hf.evaluation.markdown import table
from ham_hf.evaluation.report import mean_and_error

from ..rows import Row
from .settings import ARMS, Settings

STAGES = ("converted", "transferred", "healed")
# Figures of each window, with the name and the unit of the plot.
FIGURES = {
    "loss": "text (nats/token above the source)",
    "second_time": "passages read before (nats/token above the source)",
    "needle": "needles' tokens found (%)",
}
# What the second table compares, all at the end of healing.
PAIRS = (
    ("cosine", "random"),
    ("l2", "random"),
    ("l2", "cosine"),
    ("l2-window", "l2"),
    ("l2-window", "recency"),
    ("cosine", "no-transfer"),
    ("cosine", "no-teacher"),
    ("no-transfer", "shut"),
)

Means = dict[int, float]


def in_words(row: Row) -> str:
    """The means of a row on one line."""
    loss, again, needles = (statistics.mean(row[figure]) for figure in FIGURES)
    return f"loss {loss:.4f}, of passages read before {again:.4f} (nats/token), needles {needles:.1%}"


def by_seed(rows: list[Row], arm: str, stage: str, figure: str) -> Means:
    """The mean over windows of a figure, for each seed that has it."""
    found = [row for row in rows if (row["arm"], row["stage"]) == (arm, stage)]
    return {row["seed"]: statistics.mean(row[figure]) for row in found}


def minus(one: Means, other: Means) -> list[float]:
    """The differences of the seeds that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def told(values: list[float], form: Callable[[float], str], error_form: Callable[[float], str]) -> str:
    """The mean with its standard error over seeds."""
    mean, error = mean_and_error(values)
    return form(mean) if math.isnan(error) else f"{form(mean)} ± {error_form(error)}"


def above(rows: list[Row], arm: str, stage: str, figure: str) -> str:
    """A loss above the source's, paired by seed."""
    gaps = minus(by_seed(rows, arm, stage, figure), by_seed(rows, "source", "trained", figure))
    return told(gaps, "{:+.3f}".format, "{:.3f}".format)


def line_of(rows: list[Row], name: str, arm: str, stage: str) -> list[str] | None:
    """A row of the first table; `None` if there is no result."""
    own = [row for row in rows if (row["arm"], row["stage"]) == (arm, stage)]
    if not own:
        return None
    gates = [row["rnn_gate"] for row in own if "rnn_gate" in row]
    return [
        name,
        stage,
        f"{statistics.mean(row['held'] for row in own):.1%}",
        above(rows, arm, stage, "loss"),
        above(rows, arm, stage, "second_time"),
        told([*by_seed(rows, arm, stage, "needle").values()], "{:.1%}".format, "{:.1%}".format),
        f"{statistics.mean(gates):.2f}" if gates else "",
    ]


def to_markdown(rows: list[Row], settings: Settings) -> str:
    """A row for each model; then the differences between arms, paired by seed."""
    lines = [line_of(rows, "the source", "source", stage) for stage in ("trained", "trained on")]
    lines.append(line_of(rows, "everything", "everything", "converted"))
    lines += [line_of(rows, arm.label, name, stage) for name, arm in ARMS.items() for stage in STAGES]
    columns = ["what is held", "stage", "share", "loss of text", "second time", "needles", "RNN's gate"]
    source = [by_seed(rows, "source", "trained", x).values() for x in ("loss", "second_time")]
    text, again = (statistics.mean(x) for x in source)
    seeds, windows = sorted({row["seed"] for row in rows}), len(rows[0]["loss"])
    tokens = settings.rows * settings.context
    tail = (
        f"{len(seeds)} seeds of everything, {windows} windows of {settings.context} tokens; ± are standard errors "
        f"over seeds. Losses are nats/token above the source's, {text:.3f} on text and {again:.3f} the second time. "
        f"The source was trained for {settings.source_steps:,} steps of {tokens:,} tokens; transfer takes "
        f"{settings.transfer_steps} and healing {settings.steps}, on the same new text. The source that is trained on "
        "has seen as much of it."
    )
    found = [line for line in lines if line is not None]
    return f"{table(columns, found)}\n\n{tail}\n{differences(rows)}"


def differences(rows: list[Row]) -> str:
    """A row for each pair of arms of which both were healed; empty if there is none."""
    lines = []
    for one, other in PAIRS:
        gaps = {x: minus(by_seed(rows, one, "healed", x), by_seed(rows, other, "healed", x)) for x in FIGURES}
        if gaps["loss"]:
            lines.append(
                [
                    f"{ARMS[one].label} - {ARMS[other].label}",
                    *(told(gaps[x], "{:+.3f}".format, "{:.3f}".format) for x in ("loss", "second_time")),
                    told([100 * x for x in gaps["needle"]], "{:+.1f} points".format, "{:.1f}".format),
                ]
            )
    columns = ["difference when healed, by seed", "loss of text", "second time", "needles"]
    return f"\n{table(columns, lines)}\n" if lines else ""


def plot(rows: list[Row], path: Path) -> None:
    """Each figure along the stages, one line for each arm: the mean over seeds, and its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(13, 4.6), layout="constrained")
    for axis, (name, label) in zip(axes, FIGURES.items(), strict=True):
        source = by_seed(rows, "source", "trained", name)
        for number, (arm, settings) in enumerate(ARMS.items()):
            points = [(x, _shown(by_seed(rows, arm, stage, name), source, name)) for x, stage in enumerate(STAGES)]
            points = [(x, values) for x, values in points if values]
            if not points:
                continue
            means, errors = zip(*(mean_and_error(values) for _, values in points), strict=True)
            # Side by side, so that one does not hide another.
            places = [x + 0.05 * (number - (len(ARMS) - 1) / 2) for x, _ in points]
            bars = [0 if math.isnan(x) else x for x in errors]
            style = "-" if settings.transfer else "--"
            axis.errorbar(
                places, means, bars, fmt=f"o{style}", color=colormaps["tab10"](number), label=settings.label, capsize=2
            )
        if name == "needle":
            axis.axhline(100 * statistics.mean(source.values()), color="black", label="the source")
        else:
            axis.axhline(0, color="black")
        axis.set(xticks=range(len(STAGES)), xticklabels=STAGES, ylabel=label)
        axis.grid(alpha=0.3)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(path)


def _shown(own: Means, source: Means, figure: str) -> list[Any]:
    """What the plot shows of each seed: a percentage, or a difference from the source."""
    return [100 * x for x in own.values()] if figure == "needle" else minus(own, source)
