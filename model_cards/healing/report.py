# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The table and the plot of healing, from stored results alone."""

import math
import statistics
from pathlib import Path
from typing import Any

from ham_hf.evaluation.markdown import table

from .settings import RUNS, Run, Settings


def before_healing(figures: dict[str, Any]) -> str:
    """The held-out losses before healing, on one line."""
    names = {"source": "source", "100%": "converted", "50%": "at 50%", "25%": "at 25%", "opened": "gates opened"}
    losses = ", ".join(f"{name} {figures[key]['loss']:.4f}" for key, name in names.items())
    return f"Held-out loss before healing (nats/token): {losses}"


def done(results: dict[str, Any]) -> list[tuple[str, Run]]:
    """The ways to heal that have results."""
    return [(name, run) for name, run in RUNS.items() if name in results]


def to_markdown(results: dict[str, Any], settings: Settings) -> str:
    """A row per model; the difference is paired window by window with the source, with its standard error."""
    source = results["unhealed"]["source"]
    rows: list[list[str]] = []

    def add(name: str, figures: dict[str, Any]) -> None:
        differences = [a - b for a, b in zip(figures["losses"], source["losses"], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        percent = [100 * x / source["loss"] for x in (statistics.mean(differences), error)]
        above = f"{percent[0]:+.2f}% ± {percent[1]:.2f}%"
        rows.append([name, f"{figures['kept']:.1%}", f"{figures['loss']:.4f}", above])

    add("source", source)
    add("source, trained on for as many tokens", results["trained_on"])
    for usage in ("100%", "50%", "25%", "0%"):
        add(f"converted, not healed, {usage}", results["unhealed"][usage])
    add("converted, gates opened, 100%", results["unhealed"]["opened"])
    for name, run in done(results):
        curve = results[name]["curve"]
        add(f"{run.label}; on the way, at 50%", next(x for x in curve if x["step"] == settings.half_until))
        add(f"{run.label}; in the end, at 25%", curve[-1])
        add(f"{run.label}; in the end, asked for 50%", results[name]["asked"]["50%"])
    tokens = settings.rows * settings.context
    tail = (
        f"{results['windows']} windows of {settings.context} tokens; ± are standard errors over windows, of one seed. "
        f"The source was trained for {settings.source_steps} steps of {tokens} tokens, healing takes "
        f"{settings.steps}, and is at 50% after the first {settings.half_until}. On the way, and in the end at 25%, "
        "the learned thresholds decide what is kept; where a usage was asked for, score quantiles do."
    )
    columns = ["model", "kept", "held-out loss (nats/token)", "above the source"]
    return f"{table(columns, rows)}\n\n{tail}\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Held-out loss and usage over the schedule, one line for each way to heal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    source = results["unhealed"]["source"]["loss"]
    for name, run in done(results):
        curve = results[name]["curve"]
        steps = [0, *(x["step"] for x in curve)]
        first = results["unhealed"]["opened" if run.opened else "100%"]
        top.plot(steps, [first["loss"], *(x["loss"] for x in curve)], ".-", label=run.label)
        bottom.plot(steps, [100 * first["kept"], *(100 * x["kept"] for x in curve)], ".-")
    for factor, name, style in ((1, "source", "-"), (1.02, "source + 2%", "--"), (1.05, "source + 5%", ":")):
        top.axhline(source * factor, color="grey", linestyle=style, label=name)
    top.axhline(results["trained_on"]["loss"], color="black", linestyle="-.", label="source, trained on")
    top.set(ylabel="held-out loss (nats/token)", title="Healing a converted Llama")
    bottom.set(xlabel="step", ylabel="tokens kept (%)", ylim=(0, 105))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
