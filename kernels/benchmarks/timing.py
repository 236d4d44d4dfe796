# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Timing for the kernels' benchmarks: medians of CUDA events, competitors in turn, the L2 cache flushed."""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Larger than any L2 cache, so that a call finds nothing there from the call before.
FLUSH_BYTES = 256 * 2**20


def median_ms(functions: dict[str, Callable[[], Any]], repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median time of each function in milliseconds on the current GPU.

    The functions take turns, so that a change of the GPU's clock affects all of them. The flush before each call also
    gives the CPU a head start of about 0.1 ms. Pass a function of many small launches through `captured` first;
    otherwise its time is that of the launches.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        for function in functions.values():
            function()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            function()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in events.items()}


def without_grad(function: Callable[[], Any]) -> Callable[[], Any]:
    """A function that runs `function` without gradients, as inference does."""

    def run_without_grad() -> Any:
        with torch.no_grad():
            return function()

    return run_without_grad


def captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of a CUDA graph of `function`, which must neither synchronise nor change shapes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, tunes and fills the allocator's pools, which a capture does not allow
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_bandwidth(num_bytes: int = 2**30) -> float:
    """Bytes per second that a large copy reads and writes on the current GPU, the bound of a memory-bound kernel."""
    source = torch.empty(num_bytes, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / (1e-3 * median_ms({"copy": lambda: target.copy_(source)})["copy"])


def row(what: str, against: str, at_most: float, ours_ms: float, other_ms: float) -> dict[str, Any]:
    """One line of a result table; `meets` is yes if our time is at most `at_most` times the other's."""
    ratio = ours_ms / other_ms
    return {
        "what": what,
        "against": against,
        "target": round(at_most, 4),
        "ours_ms": round(ours_ms, 4),
        "other_ms": round(other_ms, 4),
        "ratio": round(ratio, 4),
        "meets": ratio <= at_most,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows, which have the same keys, as a Markdown table."""
    if not rows:
        return "No rows."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(_cell, row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(run: Callable[[bool], Iterator[dict[str, Any]]], description: str | None) -> None:
    """The command line of a benchmark whose rows `run(quick)` yields."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("No NVIDIA GPU: nothing to measure.")
        return
    print(markdown(list(run(quick))))
