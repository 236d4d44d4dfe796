# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of HAM against Transformers' own models of the same shape, alternating in one run.

Each comparison has a process of its own: memory freed by an earlier comparison would be reused without the page faults
of new memory, which would change the times of later ones.

Usage: ``python -m model_cards.benchmarks.bench`` (or ``make bench``); ``--output DIR`` also writes the tables.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.evaluation.markdown import row, table
from ham_hf.files import write_whole
from ham_hf.inputs_ham import CACHE_NAME

from .bench_models import SHAPE, build_ham, build_llama, build_qwen3_next, learn_thresholds, random_tokens


def alternate(first: Callable[[], None], second: Callable[[], None], runs: int) -> list[tuple[float, float]]:
    """Seconds of both, run in turn after one warm-up, so that drifts of the machine affect both alike."""
    first()
    second()
    pairs = []
    for _ in range(runs):
        times = []
        for function in (first, second):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        pairs.append((times[0], times[1]))
    return pairs


def summarise(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Median seconds of both and the median, smallest and largest ratio of second to first, pair by pair."""
    ratios = [second / first for first, second in pairs]
    return {
        "ham_seconds": statistics.median(x for x, _ in pairs),
        "other_seconds": statistics.median(x for _, x in pairs),
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
    }


@torch.no_grad()
def bench_prefill(
    ham: HAMForCausalLM, length: int, kv_usage: float, rows: int, runs: int, logits_to_keep: int = 1
) -> dict:
    """Prefill of `rows` prompts at once, HAM against Qwen3-Next, with the last logits as in `generate`, or all (0)."""
    kv_heads = ham.config.num_key_value_heads
    other, tokens = build_qwen3_next(kv_heads), random_tokens(length, rows)
    pairs = alternate(
        lambda: ham(tokens, kv_usage=kv_usage, logits_to_keep=logits_to_keep),
        lambda: other(tokens, logits_to_keep=logits_to_keep),
        runs,
    )
    cache = ham(tokens, kv_usage=kv_usage, logits_to_keep=1).cache
    logits = "" if logits_to_keep else " and logits of all"
    name = f"prefill of {length} tokens at {kv_usage:.0%} usage{logits}, against Qwen3-Next"
    usage = cache.kv_usage().mean().item()
    return {"what": name, "kv_heads": kv_heads, "rows": rows, "usage": usage, **summarise(pairs)}


@torch.no_grad()
def bench_decode(ham: HAMForCausalLM, length: int, kv_usage: float, rows: int, runs: int, steps: int = 8) -> dict:
    """Decoding `steps` tokens of each row at a time after long prompts, HAM against Llama with DynamicCache."""
    kv_heads = ham.config.num_key_value_heads
    other, tokens = build_llama(kv_heads), random_tokens(length, rows)
    ham_cache, other_cache = HAMCache(ham.config), DynamicCache(config=other.config)
    ham(tokens, kv_usage=kv_usage, cache=ham_cache, logits_to_keep=1)
    other(tokens, **{CACHE_NAME: other_cache}, logits_to_keep=1)

    def decode_ham() -> None:
        for _ in range(steps):
            ham(tokens[:, :1], cache=ham_cache, kv_usage=kv_usage)

    def decode_other() -> None:
        for _ in range(steps):
            other(tokens[:, :1], **{CACHE_NAME: other_cache})

    pairs = alternate(decode_ham, decode_other, runs)
    result = {"what": f"decoding after {length} tokens at {kv_usage:.0%} usage, against Llama", **summarise(pairs)}
    dense = sum(keys.nbytes + values.nbytes for keys, values, _ in other_cache)
    return result | {
        "kv_heads": kv_heads,
        "rows": rows,
        "usage": ham_cache.kv_usage().mean().item(),
        "ham_cache_bytes": ham_cache.memory_bytes(),
        "other_cache_bytes": dense,
    }


def training_step(model: PreTrainedModel, length: int) -> Callable[[], None]:
    """A function that does a forward and backward pass over one row of `length` tokens."""
    model.train()
    tokens = random_tokens(length)

    def step() -> None:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def bench_training(ham: HAMForCausalLM, length: int, kv_usage: float, runs: int) -> dict:
    """Forward and backward, HAM with learning thresholds that keep `kv_usage`, against Qwen3-Next."""
    kv_heads = ham.config.num_key_value_heads
    learn_thresholds(ham, kv_usage)
    pairs = alternate(training_step(ham, length), training_step(build_qwen3_next(kv_heads), length), runs)
    ham.zero_grad()
    ham.eval()
    name = f"training step on {length} tokens at {kv_usage:.0%} usage, against Qwen3-Next"
    return {"what": name, "kv_heads": kv_heads, "rows": 1, **summarise(pairs)}


def bench_training_memory(kv_heads: int, length: int, kv_usage: float) -> dict:
    """Peak memory of training, weights and gradients included, each model in a fresh process."""
    ham = in_fresh_process(training_memory, True, kv_heads, length, kv_usage)
    other = in_fresh_process(training_memory, False, kv_heads, length, kv_usage)
    name = f"training step on {length} tokens at {kv_usage:.0%} usage, against Qwen3-Next"
    return {"what": name, "kv_heads": kv_heads, "ham_peak_bytes": ham, "other_peak_bytes": other}


def training_memory(is_ham: bool, kv_heads: int, length: int, kv_usage: float) -> int:
    """Bytes by which building and training a model raises this process's peak of resident memory, by Linux's count."""
    before = _peak_of_this_process()
    torch.manual_seed(0)
    model = build_ham(kv_heads) if is_ham else build_qwen3_next(kv_heads)
    if isinstance(model, HAMForCausalLM):
        learn_thresholds(model, kv_usage)
    step = training_step(model, length)
    step()
    step()
    return _peak_of_this_process() - before


def _peak_of_this_process() -> int:
    # Not `resource.getrusage`, in which a process inherits the peak of its parent.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a module's function in a new process, and returns its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def compare(bench: Callable[..., dict], threads: int, kv_heads: int, *arguments: Any) -> dict:
    """Runs a comparison with a new HAM on `threads` threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return bench(build_ham(kv_heads), *arguments)


def environment() -> dict[str, str | int]:
    """Versions and machine of the measurements, and the settings of glibc's allocator, if any."""
    made_with: dict[str, str | int] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if "GLIBC_TUNABLES" in os.environ:
        made_with["GLIBC_TUNABLES"] = os.environ["GLIBC_TUNABLES"]
    return made_with


def speed_cells(result: dict) -> list[str]:
    """A speed as the cells of a row."""
    ratios = (f"{result[name]:.2f}" for name in ("speedup", "speedup_min", "speedup_max"))
    return [result["what"], f"{result['kv_heads']}", f"{result['rows']}", *ratios]


def memory_cells(result: dict) -> list[str]:
    """Peaks of memory as the cells of a row."""
    ham, other = result["ham_peak_bytes"], result["other_peak_bytes"]
    return [result["what"], f"{result['kv_heads']}", f"{ham >> 20}", f"{other >> 20}", f"{ham / other:.2f}"]


def to_markdown(results: list[dict], made_with: dict) -> str:
    """The results as a table of speeds and, if memory was measured, a table of memory."""
    columns = ["what", "key/value heads", "rows", "times as fast (median)", "smallest", "largest"]
    parts = [table(columns, (speed_cells(x) for x in results if "speedup" in x))]
    memory = [memory_cells(x) for x in results if "ham_peak_bytes" in x]
    if memory:
        columns = ["peak memory of a", "key/value heads", "HAM (MiB)", "other (MiB)", "ratio"]
        parts.append(table(columns, memory))
    versions = ", ".join(f"{name} {value}" for name, value in made_with.items())
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    parts.append(f"Shape: {shape}; random weights, float32. Made with {versions}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Runs the comparisons and prints, and with `--output` writes, the table."""
    parser = argparse.ArgumentParser(description="Speed and memory of HAM against Transformers' own models.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--runs", type=int, default=7, help="timed pairs of each comparison (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for bench.json and bench.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs, results = arguments.runs, []
    for kv_heads in (8, 2):
        comparisons: list[tuple] = [(bench_training, 2048, 0.5, runs)]
        for rows in (1, 4):
            comparisons.append((bench_prefill, 4096, 0.5, rows, runs))
            comparisons.append((bench_prefill, 4096, 0.5, rows, runs, 0))
            comparisons.append((bench_decode, 8192, 0.25, rows, runs))
        for bench, *rest in comparisons:
            results.append(in_fresh_process(compare, bench, arguments.threads, kv_heads, *rest))
            print(row(speed_cells(results[-1])), file=sys.stderr, flush=True)
        if sys.platform == "linux":
            results.append(bench_training_memory(kv_heads, 2048, 0.5))
    made_with = environment()
    report = to_markdown(results, made_with)
    print(report)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        payload = json.dumps({"environment": made_with, "shape": SHAPE, "results": results}, indent=2)
        write_whole(arguments.output / "bench.json", payload + "\n")
        write_whole(arguments.output / "bench.md", report)


if __name__ == "__main__":
    main()
