# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures presses of kvpress, in an environment of their own; `presses.py` calls it.

Usage: ``python press_arms.py MODEL JOBS RESULTS COMMIT``
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kvpress import (
    DuoAttentionPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import DynamicCache, LlamaForCausalLM

# Presses that choose without the question, by the fraction of the context that they drop.
PRESSES: dict[str, Callable[[float], Any]] = {
    "StreamingLLM": StreamingLLMPress,
    "Knorm": KnormPress,
    "KeyDiff": KeyDiffPress,
    "LagKV": LagKVPress,
    "ExpectedAttention": ExpectedAttentionPress,
    "TOVA": TOVAPress,
    "SnapKV": SnapKVPress,
}
DUO, SNAP_SEES = "DuoAttention, our importance", "SnapKV, sees the question"
SINKS, WINDOW = 4, 64


class ImportancePress(DuoAttentionPress):
    """DuoAttention with given scores of the heads: some keep everything, the others a window and sinks.

    Args:
        dropped: fraction of the tokens to drop, over all heads.
        length: tokens of the context.
        importance: `[layers, heads]`.
    """

    def __init__(self, dropped: float, length: int, importance: list[list[float]]):
        super().__init__(head_compression_ratio=min(1.0, dropped / (1 - (SINKS + WINDOW) / length)))
        self.importance = np.array(importance)

    def post_init_from_model(self, model: LlamaForCausalLM) -> None:
        """Chooses the heads."""
        self.sink_size, self.recent_size = SINKS, WINDOW
        order = np.argsort(self.importance, axis=None)[: round(self.importance.size * self.head_compression_ratio)]
        self.streaming_mask = torch.zeros(self.importance.shape, dtype=torch.bool)
        self.streaming_mask[np.unravel_index(order, self.importance.shape)] = True


@torch.no_grad()
def figures(model: LlamaForCausalLM, press: Any, context: list[int], rest: list[int], answer: int) -> dict[str, Any]:
    """Whether the last `answer` tokens of `rest` are the likeliest after a pressed context, and their loss."""
    cache, ids = DynamicCache(), torch.tensor([rest])
    with press(model):
        model.model(input_ids=torch.tensor([context]), past_key_values=cache)
    # Positions go on as if nothing had been dropped.
    positions = torch.arange(len(context), len(context) + len(rest))[None]
    logits = model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=answer + 1).logits
    logits, wanted = logits[0, :-1], ids[0, -answer:]
    return {
        "found": bool((logits.argmax(-1) == wanted).all()),
        "loss": F.cross_entropy(logits.float(), wanted).item(),
    }


def arms_of(job: dict[str, Any], importance: list[list[float]]) -> dict[str, tuple[Any, list[int], list[int]]]:
    """For each arm: the press, the context that it reads, and what follows."""
    context, rest, dropped = job["context"], job["rest"], 1 - job["bytes"]
    arms = {name: (press(dropped), context, rest) for name, press in PRESSES.items()}
    arms[DUO] = (ImportancePress(dropped, len(context), importance), context, rest)
    if job["kind"] == "needle":
        # All but the last token before the answer.
        cut = len(rest) - job["answer"] - 1
        arms[SNAP_SEES] = (SnapKVPress(dropped), context + rest[:cut], rest[cut:])
    return arms


def main() -> None:
    """Appends the rows that are not there yet."""
    folder, work, results, commit = sys.argv[1:]
    content = json.loads(Path(work).read_text())
    path = Path(results)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    done = {(row["arm"], row["level"], row["kind"], row["index"]) for row in rows}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for number, job in enumerate(content["jobs"], 1):
        print(f"\rPresses: {number} of {len(content['jobs'])}", end="", flush=True)
        key = {"level": job["level"], "kind": job["kind"], "index": job["index"]}
        for arm, (press, context, rest) in arms_of(job, content["importance"]).items():
            if (arm, *key.values()) not in done:
                row = {"arm": arm, **key, **figures(model, press, context, rest, job["answer"])}
                with path.open("a") as file:
                    file.write(json.dumps(row | {"bytes": job["bytes"], "commit": commit}) + "\n")
    print()


if __name__ == "__main__":
    main()
