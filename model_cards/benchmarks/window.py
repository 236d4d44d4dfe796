# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What a window costs: a prefill and a decoding step beside those of a HAM that holds as many tokens without one.

Usage: ``python -m model_cards.benchmarks.window --output model_cards/benchmarks``
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.evaluation.markdown import table
from ham_hf.files import write_whole

from .bench import alternate, environment, in_fresh_process, summarise
from .bench_models import ROPE, SHAPE, random_tokens

WINDOW, SINKS = 64, 4
LENGTH, STEPS = 8192, 8


def build(kv_heads: int, window: int, sinks: int) -> HAMForCausalLM:
    """A HAM of half the benchmarks' depth, whose router keeps random tokens, so that usage is what is asked for."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": SHAPE["num_hidden_layers"] // 2}
    memory: dict[str, Any] = {"router": "random", "attention_window": window, "attention_sinks": sinks}
    model = HAMForCausalLM(HAMConfig(**shape, num_key_value_heads=kv_heads, rope_parameters=ROPE, **memory)).eval()
    calibrate(model, [random_tokens(2048)])
    return model


@torch.no_grad()
def compare(kv_heads: int, usage: float, runs: int, threads: int) -> list[dict[str, Any]]:
    """Prefill and decoding with a window, beside a HAM that holds as many tokens of a prompt without one."""
    torch.set_num_threads(threads)
    with_window, without = build(kv_heads, WINDOW, SINKS), build(kv_heads, 0, 0)
    tokens, caches, usages = random_tokens(LENGTH), {}, {}
    for model in (with_window, without):
        # The router is asked for less, as the window holds tokens of its own.
        usages[model] = usage if model is without else (usage * LENGTH - WINDOW) / (LENGTH - WINDOW)
        caches[model] = HAMCache(model.config)
        model(tokens, kv_usage=usages[model], cache=caches[model], logits_to_keep=1)

    def prefill(model: HAMForCausalLM) -> None:
        model(tokens, kv_usage=usages[model], logits_to_keep=1)

    def decode(model: HAMForCausalLM) -> None:
        for _ in range(STEPS):
            model(tokens[:, :1], cache=caches[model], kv_usage=usages[model])

    held = [caches[model].kv_usage().mean().item() for model in (with_window, without)]
    results = []
    for what, function in ((f"prefill of {LENGTH} tokens", prefill), (f"decoding after {LENGTH} tokens", decode)):
        pairs = alternate(lambda f=function: f(without), lambda f=function: f(with_window), runs)  # type: ignore[misc]
        results.append({"what": what, "kv_heads": kv_heads, "held": held, **summarise(pairs)})
    return results


def to_markdown(results: list[dict[str, Any]], made_with: dict[str, Any]) -> str:
    """A row for each comparison."""
    columns = ["what", "KV heads", "held, with and without", "time with / without", "smallest", "largest"]
    rows = [
        [
            x["what"],
            x["kv_heads"],
            " and ".join(f"{share:.1%}" for share in x["held"]),
            *(f"{x[name]:.2f}" for name in ("speedup", "speedup_min", "speedup_max")),
        ]
        for x in results
    ]
    versions = ", ".join(f"{name} {value}" for name, value in made_with.items())
    tail = f"Window {WINDOW}, {SINKS} sinks, random router; float32. Made with {versions}."
    return f"{table(columns, rows)}\n\n{tail}\n"


def main() -> None:
    """Measures, prints the table, and writes window.md to `--output`."""
    parser = argparse.ArgumentParser(description="What a window costs beside as many tokens held without one.")
    parser.add_argument("--runs", type=int, default=5, help="alternating pairs (default %(default)s)")
    parser.add_argument("--usage", type=float, default=0.25, help="fraction of the tokens held (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for window.md")
    arguments = parser.parse_args()
    made_with, results = environment(), []
    for kv_heads in (8, 2):
        results += in_fresh_process(compare, kv_heads, arguments.usage, arguments.runs, made_with["threads"])
    report = to_markdown(results, made_with)
    print(report)
    if arguments.output is not None:
        write_whole(arguments.output / "window.md", report)


if __name__ == "__main__":
    main()
