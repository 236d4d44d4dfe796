# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads the results of a study: one file per part, with a row for each job."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ham_hf.configuration_ham import HAMConfig
from ham_hf.evaluation.report import mean_and_error
from ham_hf.files import read_rows

from ..rows import Row
from .job import NAME, Job
from .recall import RecallTask

Result = Row
# Key of results at the thresholds that training drove to the target, which are compared arm by arm.
LEARNED = "learned"


def select(results: Iterable[Result], **wanted: Any) -> list[Result]:
    """Results whose fields have the wanted values, in the order of their seeds."""
    found = [x for x in results if all(x[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda x: x["seed"])


def arms_of(results: Iterable[Result]) -> list[str]:
    """The arms, each once, in the order of the results."""
    return list(dict.fromkeys(x["arm"] for x in results))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def with_error(values: list[float]) -> str:
    """Mean and its standard error over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def recall_accuracy(result: Result, kept: str = LEARNED) -> float:
    """The mean over numbers of pairs; a model without hybrid layers has one figure for every usage."""
    accuracy = result["accuracy"]
    return statistics.mean(accuracy.get(kept, accuracy[LEARNED]).values())


def kept_fraction(result: Result) -> float:
    """The fraction of tokens kept at the learned thresholds, the mean over numbers of pairs."""
    return statistics.mean(result["usage"][LEARNED].values())


def bytes_held(result: Result, kept: str = LEARNED) -> float:
    """Bytes in memory at the end of a row of the recall task, mean over numbers of pairs, all in float32.

    States of the RNN and of its convolution, and the keys and values of kept tokens; a model without hybrid layers has
    one figure for every usage.
    """
    config, task = HAMConfig(**result["settings"]["model"]), RecallTask(**result["settings"]["task"])
    usage = result["usage"].get(kept, result["usage"][LEARNED])
    numbers: list[float] = []
    for kind in config.layer_types:
        shape = config.layer_shape(kind)
        sizes = shape.key_dim + shape.value_dim
        if kind != "full_attention":
            numbers.append(shape.value_heads * shape.key_dim * shape.value_dim)
        if kind != "full_attention" or config.attention_conv:
            numbers.append(sum(shape.channels) * (config.conv_kernel_size - 1))
        if kind != "linear_attention":
            shares = [1.0 if kind == "full_attention" else share for share in usage.values()]
            tokens = [share * task.row_length(int(n)) for share, n in zip(shares, usage, strict=True)]
            numbers.append(shape.key_heads * sizes * statistics.mean(tokens))
    return 4 * sum(numbers)


def result_file(part: str, output: Path) -> Path:
    """The file of a part's results."""
    return output / f"{part}.jsonl"


def results_by_name(jobs: list[Job], output: Path) -> dict[str, Result]:
    """All results in `output` of these jobs' parts, by the names of their jobs."""
    parts = dict.fromkeys(job.part for job in jobs)
    return {NAME.format_map(row): row for part in parts for row in read_rows(result_file(part, output))}


def check_results(jobs: list[Job], output: Path) -> None:
    """Raises `ValueError` for a folder that holds a result of one of these jobs with other settings."""
    stored = results_by_name(jobs, output)
    for job in jobs:
        if job.name in stored and stored[job.name]["settings"] != job.settings:
            path = result_file(job.part, output)
            raise ValueError(
                f"{path} holds a result of other settings, {job.name}: give another folder, or remove it."
            )


def read_results(jobs: list[Job], output: Path) -> list[Result]:
    """The results of these jobs in `output`, in the jobs' order."""
    stored = results_by_name(jobs, output)
    return [stored[job.name] for job in jobs if job.name in stored]
