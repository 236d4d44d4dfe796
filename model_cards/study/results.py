# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads the results of a study."""

import statistics
from collections.abc import Iterable
from typing import Any

Result = dict[str, Any]
# What is compared arm by arm: recall with the thresholds that training drove to the target.
LEARNED = "learned"


def select(results: Iterable[Result], **wanted: Any) -> list[Result]:
    """Results whose fields have the wanted values, in the order of their seeds."""
    found = [x for x in results if all(x[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda x: x["seed"])


def arms_of(results: Iterable[Result]) -> list[str]:
    """The arms, each once, in the order of the results."""
    return list(dict.fromkeys(x["arm"] for x in results))


def recall_accuracy(result: Result, kept: str = LEARNED) -> float:
    """The mean over numbers of pairs; a model without hybrid layers has one figure, whatever is asked for."""
    accuracy = result["accuracy"]
    return statistics.mean(accuracy.get(kept, accuracy[LEARNED]).values())


def kept_fraction(result: Result) -> float:
    """The fraction of tokens kept at the learned thresholds, the mean over numbers of pairs."""
    return statistics.mean(result["usage"][LEARNED].values())
