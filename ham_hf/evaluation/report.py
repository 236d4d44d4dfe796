# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Shows the results of an evaluation: loss and bytes against what the memory holds, as tables and pictures."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .losses import PARTS, repeated_size
from .markdown import table

Result = dict[str, Any]
# How the memory can be set; a budget may come with a threshold.
KNOBS = ("kv_budget", "kv_usage", "threshold", "learned")


def setting_name(result: Result) -> str:
    """What the memory was asked for."""
    parts = []
    if result["kv_usage"] is not None:
        parts.append(f"{100 * result['kv_usage']:.4g}%")
    if result.get("threshold") is not None:
        parts.append(f"threshold {result['threshold']:g}")
    if result.get("kv_budget") is not None:
        parts.append(f"budget {result['kv_budget']}")
    return ", ".join(parts) or ("the model" if result["usage"] is None else "learned")


def keeps_everything(result: Result) -> bool:
    """True for a setting that the others can be compared with."""
    return result["usage"] == 1


def knob(result: Result) -> str:
    """The argument that set the memory."""
    return next((name for name in KNOBS if result.get(name) is not None), "learned")


def held_share(result: Result) -> float:
    """The fraction of the tokens in memory; older files tell what was kept, which was the same."""
    held = result.get("held")
    return result["usage"] if held is None else held


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which of a single value is NaN."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def above(result: Result, everything: Result) -> str:
    """The difference of the losses, window by window, with its standard error."""
    mean, error = mean_and_error([a - b for a, b in zip(result["losses"], everything["losses"], strict=True)])
    return f"{mean:+.4f} ± {error:.4f}"


def to_markdown(results: list[Result], context: int) -> str:
    """A row for each setting; a model without routers has no columns of what they keep."""
    everything = next((x for x in results if keeps_everything(x)), None)
    holds_more = any(x.get("held") is not None and round(x["held"] - x["usage"], 4) for x in results)
    columns = {
        "asked for": setting_name,
        "kept": lambda x: f"{x['usage']:.1%}",
        "held": lambda x: f"{held_share(x):.1%}",
        "loss (nats/token)": lambda x: f"{x['loss']:.4f}",
        "perplexity": lambda x: f"{math.exp(x['loss']):.2f}",
        "above everything kept": lambda x: above(x, everything or x),
        "second time": lambda x: f"{x['recall_loss']:.3f}",
        "cache KiB": lambda x: kibibytes(x["kv_bytes"]),
        "full cache KiB": lambda x: kibibytes(x["full_kv_bytes"]),
    }
    if not holds_more:
        del columns["held"]
    if everything is None:
        for name in ("kept", "above everything kept", "full cache KiB"):
            del columns[name]
    rows = [[cell(x) for cell in columns.values()] for x in results]
    count = len(results[0]["losses"])
    states = results[0]["state_bytes"]
    tail = (
        f"{count} windows of {context} tokens"
        + ("" if states is None else f"; the states of fixed size add {states / 1024:.0f} KiB")
        + f". Second time: over the last {repeated_size(context)} tokens of a window, when they repeat its first ones."
    )
    return f"{table(list(columns), rows)}\n\n{tail}\n"


def kibibytes(size: int | None) -> str:
    """Bytes in KiB."""
    return "" if size is None else f"{size / 1024:.0f}"


def parts_to_markdown(results: list[Result]) -> str:
    """The losses of first and of repeated tokens, and of each part of the windows."""
    columns = ["asked for", "first", "repeated", *(f"{n + 1}/{PARTS}" for n in range(PARTS))]
    rows = [
        [
            setting_name(x),
            *("" if x[name] is None else f"{x[name]:.3f}" for name in ("first_loss", "repeated_loss")),
            *(f"{loss:.3f}" for loss in x["losses_by_part"]),
        ]
        for x in results
    ]
    tail = (
        "Losses in nats/token. Repeated: the token and the two before it have occurred in this order earlier in the "
        "window; first: all others. n/8: the n-th eighth of the windows."
    )
    return f"{table(columns, rows)}\n\n{tail}\n"


def plot(results: list[Result], path: Path) -> None:
    """Losses and bytes against the tokens held, and losses along the windows, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [x for x in results if x["usage"] is not None]
    has_parts = all("losses_by_part" in x for x in shown)
    figure, axes = pyplot.subplots(1, 3 + has_parts, figsize=(12 + 4 * has_parts, 3.4), layout="constrained")
    left, middle, right = axes[:3]
    for name in KNOBS:
        points = sorted((x for x in shown if knob(x) == name), key=held_share)
        held = [100 * held_share(x) for x in points]
        if not points:
            continue
        left.plot(held, [x["loss"] for x in points], "o-", label=name)
        middle.plot(held, [x["recall_loss"] for x in points], "o-", label=name)
        right.plot(held, [x["kv_bytes"] / 1024 for x in points], "o-", label=name)
    left.set(xlabel="tokens held (%)", ylabel="loss (nats/token)", title="Accuracy against memory")
    middle.set(xlabel="tokens held (%)", ylabel="loss, second time (nats/token)", title="A passage seen before")
    right.axhline(shown[0]["full_kv_bytes"] / 1024, color="grey", linestyle="--", label="full KV cache")
    right.set(xlabel="tokens held (%)", ylabel="KiB held", title="Bytes of kept tokens", ylim=(0, None))
    right.legend(fontsize="small")
    if has_parts:
        for x in shown:
            axes[3].plot(range(1, PARTS + 1), x["losses_by_part"], "o-", markersize=3, label=setting_name(x))
        axes[3].set(xlabel="eighth of the window", ylabel="loss (nats/token)", title="Along the window")
        axes[3].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
