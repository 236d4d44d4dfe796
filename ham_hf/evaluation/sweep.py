# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Finds the smallest memory whose loss on a text stays within what is allowed."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from .report import mean_and_error

Result = dict[str, Any]
# Where the search for a usage, and for one threshold of all heads, begins: from everything kept to nothing.
VALUES = {"kv_usage": (1.0, 0.75, 0.5, 0.25, 0.1, 0.0), "threshold": (0.0, 0.2, 0.4, 0.6, 0.8, 1.01)}


class Found(NamedTuple):
    """The outcome of a search.

    Attributes:
        best: the result that holds the least of those before the first that is not allowed.
        results: all that were measured, from most kept to least.
    """

    best: Result
    results: list[Result]


def rise(result: Result, everything: Result) -> tuple[float, float]:
    """The rise of the mean loss over that of everything kept, as a fraction of the latter, and its standard error."""
    base = statistics.mean(everything["losses"])
    return mean_and_error([(a - b) / base for a, b in zip(result["losses"], everything["losses"], strict=True)])


def search(
    measure: Callable[[dict[str, float]], Result], knob: str, everything: Result, allowed: float, steps: int
) -> Found:
    """Looks for the last value, on the way from most kept to least, at which the loss has risen no more than allowed.

    It measures the knob's `VALUES` up to the first that is not allowed, and then halves the interval before that one.

    Args:
        measure: function from an argument of the model's calls to its result.
        knob: name of the argument.
        everything: the result with everything kept, which rises are counted from.
        allowed: largest rise of the loss, as a fraction: 0.01 is 1%.
        steps: number of halvings.
    """
    values = VALUES[knob]
    good, results = values[0], {}
    for value in values:
        results[value] = measure({knob: value})
        if rise(results[value], everything)[0] > allowed:
            bad = value
            for _ in range(steps):
                middle = round((good + bad) / 2, 4)
                results[middle] = measure({knob: middle})
                if rise(results[middle], everything)[0] > allowed:
                    bad = middle
                else:
                    good = middle
            break
        good = value
    order = sorted(results, reverse=values[0] > values[-1])
    return Found(results[good], [results[value] for value in order])
