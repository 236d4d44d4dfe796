# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The tables and plots of a study, from stored results alone."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from ham_hf.evaluation.markdown import table
from ham_hf.files import write_whole

from . import plots
from .language_report import language_table, selection_differences, selection_table
from .results import LEARNED, Result, arms_of, bytes_held, kept_fraction, recall_accuracy, select, spread, with_error
from .study import COMPARED


def recall_table(results: list[Result]) -> str:
    """A row per arm and task: accuracy by usage over all pairs, and accuracy (with usage) by number of pairs.

    Accuracies by number of pairs are at the learned thresholds.
    """
    pairs = list(results[0]["accuracy"][LEARNED])
    usages = [str(x) for x in results[0]["settings"]["usages"]]
    heads = [f"{x} pairs" for x in pairs] + [f"all, {float(x):.0%} kept" for x in usages]
    rows = []
    for task in sorted({x["task"] for x in results}):
        for arm in arms_of(results):
            runs = select(results, task=task, arm=arm)
            if not runs:
                continue
            kept = statistics.mean(kept_fraction(x) for x in runs)
            hybrid = usages[0] in runs[0]["accuracy"]
            cells = [_accuracy_and_kept(runs, n) if hybrid else _accuracy(runs, n) for n in pairs]
            cells += [spread([recall_accuracy(x, u) for x in runs]) if hybrid else "" for u in usages]
            held = f"{statistics.mean(bytes_held(x) for x in runs) / 1024:.1f}"
            rows.append([task, arm, len(runs), f"{kept:.0%}", held, *cells])
    return table(["filler", "model", "seeds", "kept", "KiB held", *heads], rows) + "\n"


def _accuracy(runs: list[Result], pairs: str) -> str:
    return spread([x["accuracy"][LEARNED][pairs] for x in runs])


def _accuracy_and_kept(runs: list[Result], pairs: str) -> str:
    kept = statistics.mean(x["usage"][LEARNED][pairs] for x in runs)
    return f"{_accuracy(runs, pairs)} ({kept:.0%})"


def differences(results: list[Result], comparisons: Iterable[tuple[str, str]]) -> str:
    """A row per comparison and task: difference of two arms, paired by seed, and the usage of both.

    Differences, with standard errors, are over all numbers of pairs, and for the fewest and the most pairs, which
    differ in the number of tokens to keep; each is followed by the number of seeds in which the first arm is ahead.
    """
    columns = "comparison | filler | seeds | kept | all pairs (seeds above 0) | fewest pairs | most pairs"
    rows = []
    for first, second in comparisons:
        for task in sorted({x["task"] for x in results}):
            runs = [{x["seed"]: x for x in select(results, task=task, arm=arm)} for arm in (first, second)]
            both = [(runs[0][seed], runs[1][seed]) for seed in sorted(runs[0].keys() & runs[1].keys())]
            if not both:
                continue
            kept = [f"{statistics.mean(kept_fraction(x) for x in arm):.0%}" for arm in zip(*both, strict=True)]
            numbers = list(both[0][0]["accuracy"][LEARNED])
            cells = [f"{first} - {second}", task, str(len(both)), " - ".join(kept)]
            for chosen in (numbers, numbers[:1], numbers[-1:]):
                accuracy = [
                    [statistics.mean(z["accuracy"][LEARNED][n] for n in chosen) for z in pair] for pair in both
                ]
                gaps = [x - y for x, y in accuracy]
                cells.append(f"{with_error(gaps)} ({sum(gap > 0 for gap in gaps)})")
            rows.append(cells)
    return table(columns.split(" | "), rows) + "\n"


def gradient_table(results: list[Result]) -> str:
    """A row per task, router and way of training it: accuracy over all pairs and last loss, by seed, and flicker."""
    flicker = "masks changed by an update, early | late"
    columns = f"filler | router | seeds | accuracy | of each seed | last loss of each | {flicker}"
    rows = []
    for task in sorted({x["task"] for x in results}):
        of_task = select(results, task=task)
        for arm in arms_of(x for x in results if x["task"] == task):
            runs = select(of_task, arm=arm)
            scores = [recall_accuracy(x) for x in runs]
            each, losses = (", ".join(f"{x:.2f}" for x in y) for y in (scores, [x["losses"][-1] for x in runs]))
            rows.append([task, arm, len(runs), spread(scores), each, losses, *_flicker(runs)])
    return table(columns.split(" | "), rows) + "\n"


def repair_table(results: list[Result]) -> str:
    """A row per router and repair: accuracy over all pairs, and its lead on `CONTROL`, paired by seed.

    Errors are standard errors; tokens are kept by score quantiles, at the first of the study's usages.
    """
    asked = str(results[0]["settings"]["usages"][0])
    columns = f"router | seeds | accuracy, {float(asked):.0%} kept | of each seed | minus {CONTROL} | last loss"
    control = {x["seed"]: recall_accuracy(x, asked) for x in select(results, arm=CONTROL)}
    rows = []
    for arm in arms_of(results):
        runs = select(results, arm=arm)
        scores = {x["seed"]: recall_accuracy(x, asked) for x in runs}
        each = ", ".join(f"{x:.2f}" for x in scores.values())
        leads = [x - control[seed] for seed, x in scores.items() if seed in control]
        loss = statistics.mean(x["losses"][-1] for x in runs)
        lead = with_error(leads) if leads and arm != CONTROL else ""
        rows.append([arm, len(runs), with_error(list(scores.values())), each, lead, f"{loss:.2f}"])
    return table(columns.split(" | "), rows) + "\n"


def _flicker(runs: list[Result]) -> tuple[str, str]:
    """Masks that an update changed in the first and in the last third of training; empty if none were watched."""
    third = max(1, len(runs[0]["flicker"]) // 3)
    if not runs[0]["flicker"]:
        return "", ""
    early, late = (
        statistics.mean(statistics.mean(x["flicker"][part]) for x in runs)
        for part in (slice(None, third), slice(-third, None))
    )
    return f"{early:.1%}", f"{late:.1%}"


# The arm that repairs of the learned router are measured by: the router by default, where nothing cancels a score.
CONTROL = "cosine-free"
# Pairs of arms for the paper's claims and its open questions: the first minus the second.
QUESTIONS = (
    ("cosine", "gdn"),
    ("cosine-10", "gdn"),
    ("cosine-50", "gdn"),
    ("cosine-50", "interleaved"),
    ("cosine", "gdn-equal"),
    ("cosine", "random"),
    ("cosine", "recency"),
    ("l2", "cosine"),
    ("l2", "random"),
    ("received-free", "cosine"),
    ("received-free", "random"),
    ("received-error-free", "received-free"),
    ("oracle", "cosine"),
    ("oracle", "received-free"),
    ("learned", "cosine"),
    ("learned-ramp", "learned"),
    ("log-bias", "learned"),
    ("straight-through", "learned"),
)


def write_report(results: list[Result], arms: list[str], output: Path) -> list[Path]:
    """Writes the tables (`study.md`, and those of README.md apart) and the plots of all parts; returns the files.

    Args:
        results: results of a study with arms in `arms`.
        arms: the arms in the order of the tables; those with results have one colour in all plots.
        output: folder for the files.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError(f"`results` is empty: there is nothing to report in {output}.")
    results = sorted(results, key=lambda x: arms.index(x["arm"]))
    recall = [x for x in results if x["part"] in COMPARED]
    routers = [x for x in recall if x["part"] != "recall"]
    repairs = [x for x in results if x["part"] == "repairs"]
    language = [x for x in results if x["part"] == "language"]
    selection = [x for x in results if x["part"] == "selection"]
    plotted = {x["arm"] for x in recall + language}
    colours = plots.colours_of([arm for arm in arms if arm in plotted])
    sections, written = [], []
    if recall:
        sections += ["## Recall\n", f"± is the standard deviation over seeds.\n\n{recall_table(recall)}"]
        written.append(plots.plot_recall(recall, colours, output / "recall.png"))
    if routers:
        told = f"± is the standard deviation over seeds.\n\n{gradient_table(routers)}"
        sections += ["## Routers, and gradients of a learned one\n", told]
        drawn = [x for x in routers if x["task"] == routers[0]["task"]]
        written.append(plots.plot_gradients(drawn, colours, output / "gradients.png"))
    if repairs:
        compared = repair_table(repairs)
        told = "± is the standard deviation over seeds in the first table, the standard error in the second.\n"
        sections += ["## Repairs of the learned router\n", told, recall_table(repairs), compared]
        write_whole(output / "repairs.md", compared)
        written.append(output / "repairs.md")
    if language:
        sections += [
            "## Language and needles\n",
            f"± is the standard deviation over seeds.\n\n{language_table(language)}",
        ]
        written.append(plots.plot_language(language, colours, output / "language.png"))
        traced = [x for x in language if "traces" in x]
        if traced:
            written.append(plots.plot_scores(traced, output / "scores.png"))
    if selection:
        compared = f"{selection_table(selection)}\n{selection_differences(selection)}"
        sections += ["## Training with a selection\n", compared]
        write_whole(output / "selection.md", compared)
        written.append(output / "selection.md")
    if recall:
        compared = differences(recall, QUESTIONS)
        sections += ["## Differences in accuracy\n", compared]
        write_whole(output / "differences.md", compared)
        written.insert(0, output / "differences.md")
    write_whole(output / "study.md", "\n".join(sections))
    return [output / "study.md", *written]
