# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures the loss of SmolLM2 as a HAM, before any training, against the tokens that it holds.

Usage: ``python -m model_cards.smollm2.measure``

Writes a row to results.jsonl for each run; run again, it goes on after the last one.
"""

import argparse
import itertools
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.files import append_row, read_rows

from ..rows import current_commit
from .checkpoint import CACHE, checkpoint
from .texts import CALIBRATION_WINDOWS, CONTEXT, calibration_windows, judged_windows

RESULTS = Path(__file__).with_name("results.jsonl")
ROUTERS = ("l2", "cosine", "random")
WINDOWS_AND_SINKS = ((64, 4), (0, 0), (128, 4))
ASKED = (0.25, 0.5)
# The arms that are compared with each other closely are judged by all windows, the others by every second.
JUDGED_WINDOWS = 8


@dataclass(frozen=True)
class Arm:
    """One setting of the memory.

    Attributes:
        window: last tokens that attention sees in any case.
        sinks: first tokens that are always kept.
        router: source of the scores; `None` where no score is read, as all or none of the other tokens are kept.
        asked: the fraction of tokens that the router is asked for.
    """

    window: int
    sinks: int
    router: str | None
    asked: float


EVERYTHING = Arm(0, 0, None, 1.0)
MAIN = (EVERYTHING, *(Arm(64, 4, router, 0.25) for router in ROUTERS))


def arms() -> list[Arm]:
    """All arms; those that matter most come first."""
    nothing = [Arm(window, sinks, None, 0.0) for window, sinks in WINDOWS_AND_SINKS]
    asked = [
        Arm(window, sinks, router, usage)
        for usage, (window, sinks), router in itertools.product(ASKED, WINDOWS_AND_SINKS, ROUTERS)
    ]
    tenth = [Arm(64, 4, router, 0.1) for router in ROUTERS]
    return list(dict.fromkeys([*MAIN, *nothing, *asked, *tenth]))


def load(path: Path, router: str | None, window: int = 0, sinks: int = 0) -> HAMForCausalLM:
    """The model in float32 with a router, a window and sinks of one's choice, all heads asked for the same usage."""
    choice: dict[str, Any] = {"attention_window": window, "attention_sinks": sinks, "usage_division": "even"}
    if router is not None:
        choice["router"] = router
    return HAMForCausalLM.from_pretrained(path, dtype=torch.float32, **choice).eval()


@cache
def quantiles(path: Path, router: str) -> dict[str, torch.Tensor]:
    """The calibrated `score_quantiles` `[Hk, levels]` float32 of every layer, which no window changes."""
    model = load(path, router)
    calibrate(model, calibration_windows(AutoTokenizer.from_pretrained(path)))
    return {name: x for name, x in model.state_dict().items() if name.endswith("score_quantiles")}


@torch.no_grad()
def measure(path: Path, arm: Arm, texts: list[torch.Tensor]) -> dict[str, Any]:
    """Losses (nats a token) of `[1, T]` texts read in one call each, and what the cache holds at the end of them.

    `held` is the fraction of tokens in memory, those of window and sinks included; `kept` the fraction that the router
    kept: both are means over texts, layers and heads.
    """
    model = load(path, arm.router, arm.window, arm.sinks)
    if arm.router is not None:
        model.load_state_dict(quantiles(path, arm.router), strict=False)
    memory = {"threshold": 0.0} if arm == EVERYTHING else {"kv_usage": arm.asked}
    losses, held, kept = [], [], []
    start = time.perf_counter()
    for tokens in tqdm(texts, desc=str(arm), leave=False):
        outputs = model(input_ids=tokens, labels=tokens, use_cache=True, **memory)
        losses.append(outputs.loss.item())
        held.append(outputs.cache.held_tokens().float().mean().item() / tokens.shape[1])
        kept.append(outputs.cache.kept_tokens().float().mean().item() / tokens.shape[1])
    figures = {"held": statistics.mean(held), "kept": statistics.mean(kept), "losses": losses}
    return figures | {"loss": statistics.mean(losses), "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Measures every arm that has no row yet."""
    parser = argparse.ArgumentParser(description="Loss of SmolLM2 as a HAM against the tokens held.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the HAM (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the rows (default: %(default)s)")
    arguments = parser.parse_args()
    path = checkpoint(arguments.cache)
    texts = judged_windows(AutoTokenizer.from_pretrained(path), JUDGED_WINDOWS)
    shared = {
        "context": CONTEXT,
        "calibration_windows": CALIBRATION_WINDOWS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": current_commit(),
    }
    done = [row["arm"] for row in read_rows(arguments.results)]
    for arm in arms():
        if asdict(arm) not in done:
            row = {"arm": asdict(arm), **measure(path, arm, texts if arm in MAIN else texts[::2]), **shared}
            append_row(arguments.results, row)
            print(f"{arm}: held {row['held']:.1%}, loss {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
