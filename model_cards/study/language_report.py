# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The tables of the studies on text: loss and needles against usage, and the cost of training with a selection."""

import statistics

from ham_hf.evaluation.markdown import table

from .results import LEARNED, Result, arms_of, select, spread, with_error

# Everything kept, as a key of results.
EVERYTHING = "1.0"
# Pairs of arms that tell the cost of a selection, and what lowers it: the first minus the second.
SELECTIONS = (
    ("random", "all-kept"),
    ("cosine", "all-kept"),
    ("cosine", "random"),
    ("cosine-window", "all-kept"),
    ("cosine-window", "cosine"),
    ("frozen", "cosine"),
    ("cosine-ramp", "cosine"),
    ("l2", "cosine"),
    ("cosine", "gdn"),
    ("interleaved-3", "cosine-window"),
)


def language_table(results: list[Result]) -> str:
    """A row per arm: held-out loss by usage (and the fraction kept of this text), and recall of needles by distance.

    The loss without a usage, and the needles, are at the learned thresholds.
    """
    usages = [str(x) for x in results[0]["settings"]["usages"]]
    distances = list(results[0]["needle"][LEARNED])
    heads = [f"loss, {float(x):.0%} asked" for x in usages] + [f"needle, {x} tokens" for x in distances]
    rows = []
    for arm in arms_of(results):
        runs = select(results, arm=arm)
        asked = usages if usages[0] in runs[0]["held_out"] else [""] * len(usages)
        cells = [_loss_and_kept(runs, usage) if usage else "" for usage in (LEARNED, *asked)]
        cells += [spread([x["needle"][LEARNED][n] for x in runs]) for n in distances]
        rows.append([arm, f"{runs[0]['parameters']:,}", len(runs), *cells])
    return table(["model", "parameters", "seeds", "loss (kept)", *heads], rows) + "\n"


def _loss_and_kept(runs: list[Result], usage: str) -> str:
    kept = statistics.mean(x["usage"][usage] for x in runs)
    return f"{spread([statistics.mean(x['held_out'][usage]) for x in runs])} ({kept:.0%})"


def selection_table(results: list[Result]) -> str:
    """A row per arm: the loss of the last steps of training, and held-out losses as trained and with everything kept.

    Losses are in nats per token, mean and standard error over seeds; those of training are of the mix of text and of
    rows that repeat themselves.
    """
    heads = ["text", "its end, read a second time", "first tokens", "repeated tokens", "text, everything kept"]
    rows = []
    for arm in arms_of(results):
        runs = select(results, arm=arm)
        kept = statistics.mean(x["usage"][LEARNED] for x in runs)
        names = ("held_out", "second_time", "first", "repeated")
        cells = [with_error([_mean(x, name) for x in runs]) for name in names]
        everything = EVERYTHING in runs[0]["held_out"]
        cells.append(with_error([_mean(x, "held_out", EVERYTHING) for x in runs]) if everything else "")
        rows.append([arm, len(runs), f"{kept:.0%}", with_error([x["losses"][-1] for x in runs]), *cells])
    return table(["model", "seeds", "kept", "training's mix", *heads], rows) + "\n"


def selection_differences(results: list[Result]) -> str:
    """A row per pair of arms: the differences of held-out losses, paired by seed, with standard errors."""
    rows = []
    for first, second in SELECTIONS:
        runs = [{x["seed"]: x for x in select(results, arm=arm)} for arm in (first, second)]
        seeds = sorted(runs[0].keys() & runs[1].keys())
        if not seeds:
            continue
        cells = [f"{first} - {second}", str(len(seeds))]
        for name, asked in (("held_out", LEARNED), ("second_time", LEARNED), ("held_out", EVERYTHING)):
            gaps = [_mean(runs[0][seed], name, asked) - _mean(runs[1][seed], name, asked) for seed in seeds]
            cells.append(f"{with_error(gaps)} ({sum(gap < 0 for gap in gaps)})")
        rows.append(cells)
    heads = ["text (seeds below 0)", "its end, read a second time", "text, everything kept"]
    return table(["difference", "seeds", *heads], rows) + "\n"


def _mean(result: Result, name: str, asked: str = LEARNED) -> float:
    """The mean over windows; a model without hybrid layers has one figure for every usage."""
    figures = result[name]
    return statistics.mean(x for x in figures.get(asked, figures[LEARNED]) if x is not None)
