# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A sweep finds the smallest memory that is allowed."""

import math

import pytest

from ham_hf.evaluation.sweep import VALUES, rise, search


def measured(loss_at, knob):
    """Results whose loss is a function of the knob's value; and the values asked for, in order."""
    asked = []

    def measure(memory):
        (value,) = memory.values()
        assert list(memory) == [knob]
        asked.append(value)
        return {knob: value, "losses": [2 * loss_at(value), 2 * loss_at(value)]}

    return measure, asked


@pytest.mark.parametrize("allowed", [0.001, 0.01, 0.1])
def test_the_smallest_usage_is_found_to_the_last_halving(allowed):
    measure, asked = measured(lambda u: 1 + (1 - u) ** 2, "kv_usage")
    everything = {"losses": [2.0, 2.0]}
    found = search(measure, "kv_usage", everything, allowed, 8)
    exact = 1 - math.sqrt(allowed)
    assert 0 <= found.best["kv_usage"] - exact < 0.25 / 2**8 + 1e-4
    assert rise(found.best, everything)[0] <= allowed
    values = [x["kv_usage"] for x in found.results]
    assert values == sorted(asked, reverse=True)
    assert min(asked) == max(x for x in VALUES["kv_usage"] if x < exact), "none below the first that is not allowed"


def test_thresholds_rise_on_the_way():
    measure, _ = measured(lambda tau: 1 + max(0, tau - 0.3), "threshold")
    found = search(measure, "threshold", {"losses": [2.0, 2.0]}, 0.05, 6)
    assert 0 <= 0.35 - found.best["threshold"] < 0.2 / 2**6 + 1e-4
    values = [x["threshold"] for x in found.results]
    assert values == sorted(values)


def test_everything_or_nothing_may_be_best():
    measure, asked = measured(lambda u: 1.0, "kv_usage")
    assert search(measure, "kv_usage", {"losses": [2.0, 2.0]}, 0.0, 4).best["kv_usage"] == 0
    assert asked == list(VALUES["kv_usage"])
    measure, _ = measured(lambda u: 1 + (u < 1), "kv_usage")
    assert search(measure, "kv_usage", {"losses": [2.0, 2.0]}, 0.01, 3).best["kv_usage"] == 1


def test_a_rise_is_paired_and_a_fraction_of_the_mean():
    mean, error = rise({"losses": [2.2, 4.0]}, {"losses": [2.0, 4.0]})
    assert mean == pytest.approx(0.1 / 3)
    assert error == pytest.approx(0.1 / 3)
    assert math.isnan(rise({"losses": [1.0]}, {"losses": [1.0]})[1])
