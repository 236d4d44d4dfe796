# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The tables and plots of a study, from stored results alone."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...files import write_whole

Result = dict[str, Any]
# What is compared arm by arm: recall with the thresholds that training drove to the target.
LEARNED = "learned"


def select(results: Iterable[Result], **wanted: Any) -> list[Result]:
    """Results whose fields have the wanted values, in the order of their seeds."""
    found = [x for x in results if all(x[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda x: x["seed"])


def arms_of(results: Iterable[Result]) -> list[str]:
    """The arms, each once, in the order that plots and tables share."""
    return sorted({x["arm"] for x in results}, key=ORDER.index)


# Baselines first, then HAM by router, then other ways to train a learned router.
ORDER = (
    "transformer interleaved gdn cosine residual learned learned-error random learned-ramp log-bias straight-through"
).split()


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def recall_accuracy(result: Result, kept: str = LEARNED) -> float:
    """The mean over numbers of pairs; a model without hybrid layers has one figure, whatever is asked for."""
    accuracy = result["accuracy"]
    return statistics.mean(accuracy.get(kept, accuracy[LEARNED]).values())


def recall_table(results: list[Result]) -> str:
    """A row per arm and task: accuracy by number of pairs at the learned thresholds, and by usage over all pairs."""
    pairs = list(results[0]["accuracy"][LEARNED])
    usages = [str(x) for x in results[0]["settings"]["usages"]]
    heads = [f"{x} pairs" for x in pairs] + [f"all, {float(x):.0%} kept" for x in usages]
    lines = [
        f"| filler | model | seeds | kept | {' | '.join(heads)} |",
        "|---" * (4 + len(heads)) + "|",
    ]
    for task in sorted({x["task"] for x in results}):
        for arm in arms_of(results):
            runs = select(results, task=task, arm=arm)
            if not runs:
                continue
            kept = statistics.mean(statistics.mean(x["usage"][LEARNED].values()) for x in runs)
            cells = [spread([x["accuracy"][LEARNED][n] for x in runs]) for n in pairs]
            hybrid = usages[0] in runs[0]["accuracy"]
            cells += [spread([recall_accuracy(x, u) for x in runs]) if hybrid else "" for u in usages]
            lines.append(f"| {task} | {arm} | {len(runs)} | {kept:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def differences(results: list[Result], comparisons: Iterable[tuple[str, str]]) -> str:
    """A row per comparison, part and task: the difference in accuracy of two arms, seed by seed."""
    lines = ["| comparison | filler | seeds | difference | seeds in which it is above 0 |", "|---|---|---|---|---|"]
    for first, second in comparisons:
        for task in sorted({x["task"] for x in results}):
            scores = [
                {x["seed"]: recall_accuracy(x) for x in select(results, task=task, arm=y)} for y in (first, second)
            ]
            common = sorted(scores[0].keys() & scores[1].keys())
            if not common:
                continue
            gaps = [scores[0][seed] - scores[1][seed] for seed in common]
            above = sum(gap > 0 for gap in gaps)
            lines.append(f"| {first} - {second} | {task} | {len(gaps)} | {spread(gaps)} | {above} |")
    return "\n".join(lines) + "\n"


def gradient_table(results: list[Result]) -> str:
    """A row per router and way of training it: accuracy over all pairs, by seed, and how its masks flicker."""
    heads = "router | seeds | accuracy | of each seed | masks changed by an update, early | late"
    lines = [f"| {heads} |", "|---" * 6 + "|"]
    for arm in arms_of(results):
        runs = select(results, arm=arm)
        scores = [recall_accuracy(x) for x in runs]
        third = max(1, len(runs[0]["flicker"]) // 3)
        early = statistics.mean(statistics.mean(x["flicker"][:third]) for x in runs)
        late = statistics.mean(statistics.mean(x["flicker"][-third:]) for x in runs)
        each = ", ".join(f"{x:.2f}" for x in scores)
        lines.append(f"| {arm} | {len(runs)} | {spread(scores)} | {each} | {early:.1%} | {late:.1%} |")
    return "\n".join(lines) + "\n"


def language_table(results: list[Result]) -> str:
    """A row per arm: held-out loss by usage, and recall of needles by distance at the learned thresholds."""
    usages = [str(x) for x in results[0]["settings"]["usages"]]
    distances = list(results[0]["needle"][LEARNED])
    heads = [f"loss, {float(x):.0%} kept" for x in usages] + [f"needle, {x} tokens" for x in distances]
    lines = [f"| model | parameters | loss | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for arm in arms_of(results):
        runs = select(results, arm=arm)
        cells = [spread([statistics.mean(x["held_out"][LEARNED]) for x in runs])]
        hybrid = usages[0] in runs[0]["held_out"]
        cells += [spread([statistics.mean(x["held_out"][u]) for x in runs]) if hybrid else "" for u in usages]
        cells += [spread([x["needle"][LEARNED][n] for x in runs]) for n in distances]
        lines.append(f"| {arm} | {runs[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# Which arms the paper's claims, and what it leaves open, are about: the first minus the second.
QUESTIONS = (
    ("cosine", "gdn"),
    ("cosine", "random"),
    ("learned", "cosine"),
    ("learned-error", "learned"),
    ("learned-error", "cosine"),
    ("learned-ramp", "learned"),
    ("log-bias", "learned"),
    ("straight-through", "learned"),
)


def write_report(results: list[Result], output: Path) -> list[Path]:
    """Writes `study.md`, `differences.md` and the plots of the parts that have results; returns what was written.

    Raises:
        ValueError: if there are none.
    """
    from . import plots

    if not results:
        raise ValueError(f"`results` is empty: there is nothing to report in {output}.")
    recall = [x for x in results if x["part"] == "recall"]
    routers = [x for x in results if x["part"] == "gradients"]
    language = [x for x in results if x["part"] == "language"]
    sections, written = [], []
    if recall:
        sections += ["## Recall\n", recall_table(recall)]
        written.append(plots.plot_recall(recall, output / "recall.png"))
    if routers:
        sections += ["## Routers, and gradients of a learned one\n", recall_table(routers), gradient_table(routers)]
        written.append(plots.plot_gradients(routers, output / "gradients.png"))
    if language:
        sections += ["## Language and needles\n", language_table(language)]
        written.append(plots.plot_language(language, output / "language.png"))
        written.append(plots.plot_scores(language, output / "scores.png"))
    if recall or routers:
        compared = differences(recall + routers, QUESTIONS)
        sections += ["## Differences in accuracy\n", compared]
        write_whole(output / "differences.md", compared)
        written.insert(0, output / "differences.md")
    write_whole(output / "study.md", "\n".join(sections))
    return [output / "study.md", *written]
