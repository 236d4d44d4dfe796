# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The plots of a study."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ham_hf.evaluation.report import mean_and_error

from .fitting import LOSS_BLOCK
from .results import LEARNED, Result, arms_of, bytes_held, recall_accuracy, select

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot

Colours = dict[str, Any]


def colours_of(arms: list[str]) -> Colours:
    """Colours of the arms: ten strong ones first, as neighbours in this map are similar; they repeat after 20."""
    return {arm: colormaps["tab20"]((2 * place) % 20 + place // 10 % 2) for place, arm in enumerate(arms)}


def _save(figure: Any, path: Path) -> Path:
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    pyplot.close(figure)
    partial.replace(path)
    return path


def _line(axis: Any, x: Sequence[float], seeds: list[list[float]], arm: str, colours: Colours) -> None:
    """The mean over seeds as a line, and one standard deviation around it."""
    mean = [statistics.mean(y) for y in zip(*seeds, strict=True)]
    axis.plot(x, mean, "o-", color=colours[arm], label=arm, markersize=4)
    if len(seeds) > 1:
        deviation = [statistics.stdev(y) for y in zip(*seeds, strict=True)]
        low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=colours[arm], alpha=0.15, linewidth=0)


def plot_recall(results: list[Result], colours: Colours, path: Path) -> Path:
    """Accuracy against the number of pairs, and against the bytes held, for each filler."""
    tasks = sorted({x["task"] for x in results})
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(5.5 * len(tasks), 8.5), layout="constrained", squeeze=False)
    lines: dict[str, Any] = {}
    for (upper, lower), task in zip(axes.T, tasks, strict=True):
        for arm in arms_of(results):
            runs = select(results, task=task, arm=arm)
            if not runs:
                continue
            pairs = [int(x) for x in runs[0]["accuracy"][LEARNED]]
            means = [statistics.mean(x["accuracy"][LEARNED][str(n)] for x in runs) for n in pairs]
            (lines[arm],) = upper.plot(pairs, means, "o-", color=colours[arm], markersize=4)
            _recall_by_bytes(lower, runs, arm, colours)
        upper.set(title=f"{task} filler, learned thresholds", xlabel="pairs", ylabel="accuracy", xscale="log")
        upper.set_xticks(pairs, [str(x) for x in pairs])
        upper.minorticks_off()
        title = f"{task} filler, all numbers of pairs"
        lower.set(title=title, xlabel="memory at the end of a row, states included (KiB)", ylabel="accuracy")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=7, fontsize=9)
    for axis in axes.flat:
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    return _save(figure, path)


def _recall_by_bytes(axis: Any, runs: list[Result], arm: str, colours: Colours) -> None:
    """A line over the usages of a model that has some, else a square; and one standard error over seeds."""
    usages: list[str] = [str(x) for x in runs[0]["settings"]["usages"] if str(x) in runs[0]["accuracy"]]
    held = [statistics.mean(bytes_held(x, usage) for x in runs) / 1024 for usage in usages or [LEARNED]]
    seeds = [mean_and_error([recall_accuracy(x, usage) for x in runs]) for usage in usages or [LEARNED]]
    means, errors = zip(*seeds, strict=True)
    axis.errorbar(held, means, errors, fmt="o-" if usages else "s", color=colours[arm], capsize=3, markersize=4)


def plot_gradients(results: list[Result], colours: Colours, path: Path) -> Path:
    """Accuracy of every seed by way of training the router, and the losses on the way."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for place, arm in enumerate(arms_of(results)):
        runs = select(results, arm=arm)
        scores = [recall_accuracy(x) for x in runs]
        left.plot([place] * len(scores), scores, "o", color=colours[arm], alpha=0.6)
        left.plot([place - 0.25, place + 0.25], [statistics.mean(scores)] * 2, color=colours[arm], linewidth=3)
        steps = [LOSS_BLOCK * (i + 1) for i in range(len(runs[0]["losses"]))]
        _line(right, steps, [x["losses"] for x in runs], arm, colours)
    left.set_xticks(range(len(arms_of(results))), arms_of(results), rotation=30, ha="right", fontsize=8)
    left.set(ylabel="accuracy", title="Each seed, and the mean")
    right.set(xlabel="step", ylabel="loss (nats per answer)", title="Training")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return _save(figure, path)


def plot_language(results: list[Result], colours: Colours, path: Path) -> Path:
    """Held-out loss against the fraction kept, and needles against distance."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for arm in arms_of(results):
        runs = select(results, arm=arm)
        asked = [str(x) for x in runs[0]["settings"]["usages"] if str(x) in runs[0]["held_out"]]
        if asked:
            kept = [100 * statistics.mean(x["usage"][u] for x in runs) for u in asked]
            _line(left, kept, [[statistics.mean(x["held_out"][u]) for u in asked] for x in runs], arm, colours)
        else:
            level = statistics.mean(statistics.mean(x["held_out"][LEARNED]) for x in runs)
            left.axhline(level, color=colours[arm], linestyle="--", label=arm)
        distances = [int(x) for x in runs[0]["needle"][LEARNED]]
        _line(right, distances, [list(x["needle"][LEARNED].values()) for x in runs], arm, colours)
    left.set(xlabel="tokens kept (%)", ylabel="held-out loss (nats/token)", title="Loss, moved by threshold alone")
    right.set(xlabel="tokens before the question", ylabel="fraction foreseen", title="Needles", xscale="log")
    right.set_xticks(distances, [str(x) for x in distances])
    right.minorticks_off()
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return _save(figure, path)


def plot_scores(results: list[Result], path: Path) -> Path:
    """Scores and decay along a sequence with a needle, and mean scores by position and layer, of the cosine router.

    Without a result of the cosine router, it plots the first result; all have traces.
    """
    runs = select(results, arm="cosine") or results
    traces = runs[0]["traces"]
    layers = range(len(traces["scores"]))
    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(11, 9), layout="constrained")
    for layer in layers:
        colour = colormaps["viridis"](layer / max(1, len(layers) - 1))
        top.plot(traces["scores"][layer], color=colour, linewidth=0.8, label=f"layer {layer}")
        middle.plot(traces["decay"][layer], color=colour, linewidth=0.8)
        smooth = traces["by_position"][layer]
        bottom.plot([statistics.mean(smooth[max(0, i - 7) : i + 8]) for i in range(len(smooth))], color=colour)
    for axis in (top, middle):
        axis.axvspan(*traces["needle"], color="#b5432e", alpha=0.2)
    top.set(ylabel="routing score", title=f"Along one sequence with a needle (shaded), router {runs[0]['arm']}")
    middle.set(ylabel="decay of the state, exp(g)", xlabel="position")
    bottom.set(ylabel="mean score", xlabel="position", title="Mean over held-out windows, smoothed over 15 positions")
    top.legend(fontsize=8, ncols=len(layers))
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    return _save(figure, path)
