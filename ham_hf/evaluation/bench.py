# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of HAM against Transformers' own models of the same shape, alternating in one run.

Usage: ``python -m ham_hf.evaluation.bench`` (or ``make bench``); ``--output DIR`` also writes the tables.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from .. import HAMCache, HAMConfig, HAMForCausalLM
from ..files import write_whole
from .calibration import calibrate

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "vocab_size": 4096,
    "num_attention_heads": 8,
    "head_dim": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def build_ham(kv_heads: int) -> HAMForCausalLM:
    """A HAM with random weights, whose thresholds for a wanted usage come from calibration on random tokens."""
    model = HAMForCausalLM(HAMConfig(**SHAPE, num_key_value_heads=kv_heads, rope_parameters=ROPE)).eval()
    calibrate(model, [random_tokens(2048)])
    return model


def build_llama(kv_heads: int) -> LlamaForCausalLM:
    """Transformers' Llama of the same shape."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=kv_heads, rope_parameters=ROPE)).eval()


def build_qwen3_next(kv_heads: int) -> Qwen3NextForCausalLM:
    """Transformers' Qwen3-Next of the same shape: Gated DeltaNet and attention 3:1, dense MLPs, PyTorch path.

    Its linear layers have as many value heads as the others have query heads, and at least half as many key heads, as
    in the released models.
    """
    heads = SHAPE["num_attention_heads"]
    config = Qwen3NextConfig(
        **SHAPE,
        num_key_value_heads=kv_heads,
        linear_num_key_heads=max(kv_heads, heads // 2),
        linear_num_value_heads=heads,
        linear_key_head_dim=SHAPE["head_dim"],
        linear_value_head_dim=SHAPE["head_dim"],
        mlp_only_layers=list(range(SHAPE["num_hidden_layers"])),
    )
    return Qwen3NextForCausalLM(config).eval()


def random_tokens(length: int) -> torch.Tensor:
    """`[1, length]` token ids."""
    return torch.randint(SHAPE["vocab_size"], (1, length))


def alternate(first: Callable[[], None], second: Callable[[], None], runs: int) -> list[tuple[float, float]]:
    """Seconds of both, run in turn after one warm-up, so that drifts of the machine meet both alike."""
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
def bench_prefill(ham: HAMForCausalLM, length: int, kv_usage: float, runs: int) -> dict:
    """Prefill of one prompt, HAM against Qwen3-Next."""
    kv_heads = ham.config.num_key_value_heads
    other, tokens = build_qwen3_next(kv_heads), random_tokens(length)
    pairs = alternate(
        lambda: ham(tokens, kv_usage=kv_usage, logits_to_keep=1), lambda: other(tokens, logits_to_keep=1), runs
    )
    cache = ham(tokens, kv_usage=kv_usage, logits_to_keep=1).past_key_values
    name = f"prefill of {length} tokens at {kv_usage:.0%} usage, against Qwen3-Next"
    return {"what": name, "kv_heads": kv_heads, "usage": cache.kv_usage().mean().item(), **summarise(pairs)}


@torch.no_grad()
def bench_decode(ham: HAMForCausalLM, length: int, kv_usage: float, runs: int, steps: int = 8) -> dict:
    """Decoding `steps` tokens at a time after a long prompt, HAM against Llama with DynamicCache."""
    kv_heads = ham.config.num_key_value_heads
    other, tokens = build_llama(kv_heads), random_tokens(length)
    ham_cache, other_cache = HAMCache(ham.config), DynamicCache(config=other.config)
    ham(tokens, kv_usage=kv_usage, past_key_values=ham_cache, logits_to_keep=1)
    other(tokens, past_key_values=other_cache, logits_to_keep=1)

    def decode_ham() -> None:
        for _ in range(steps):
            ham(tokens[:, :1], past_key_values=ham_cache, kv_usage=kv_usage)

    def decode_other() -> None:
        for _ in range(steps):
            other(tokens[:, :1], past_key_values=other_cache)

    pairs = alternate(decode_ham, decode_other, runs)
    result = {"what": f"decoding after {length} tokens at {kv_usage:.0%} usage, against Llama", **summarise(pairs)}
    dense = sum(keys.nbytes + values.nbytes for keys, values, _ in other_cache)
    return result | {
        "kv_heads": kv_heads,
        "usage": ham_cache.kv_usage().mean().item(),
        "ham_cache_bytes": ham_cache.memory_bytes(),
        "other_cache_bytes": dense,
    }


def environment() -> dict[str, str | int]:
    """What the figures were measured with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def to_markdown(results: list[dict], made_with: dict) -> str:
    """The results as a table."""
    lines = ["| what | key/value heads | times as fast (median) | smallest | largest |", "|---|---|---|---|---|"]
    for x in results:
        lines.append(
            f"| {x['what']} | {x['kv_heads']} | {x['speedup']:.2f} | {x['speedup_min']:.2f} | {x['speedup_max']:.2f} |"
        )
    versions = ", ".join(f"{name} {value}" for name, value in made_with.items())
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    return "\n".join([*lines, "", f"Shape: {shape}; random weights, float32. Made with {versions}."]) + "\n"


def main() -> None:
    """Runs both comparisons and prints, and with `--output` writes, the table."""
    parser = argparse.ArgumentParser(description="Speed and memory of HAM against Transformers' own models.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--runs", type=int, default=7, help="timed pairs of each comparison (default %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for bench.json and bench.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = []
    for kv_heads in (8, 2):
        ham = build_ham(kv_heads)
        results.append(bench_prefill(ham, 4096, 0.5, arguments.runs))
        results.append(bench_decode(ham, 8192, 0.25, arguments.runs))
    made_with = environment()
    table = to_markdown(results, made_with)
    print(table)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        payload = json.dumps({"environment": made_with, "shape": SHAPE, "results": results}, indent=2)
        write_whole(arguments.output / "bench.json", payload + "\n")
        write_whole(arguments.output / "bench.md", table)


if __name__ == "__main__":
    main()
