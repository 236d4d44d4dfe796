# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures a model at several settings of its memory, window by window, and goes on where it was interrupted."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import append_row, read_rows
from .losses import WindowFigures, summary, window_figures

Memory = dict[str, Any]
# Values of each tensor that `fingerprint` reads.
FINGERPRINT_VALUES = 4096


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration and of the beginning of each tensor, which tells one checkpoint from another."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, x in model.state_dict().items():
        beginning = x.flatten()[:FINGERPRINT_VALUES].detach().cpu().contiguous()
        digest.update(name.encode() + beginning.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Evaluation:
    """Figures of a model on windows of text, kept in a file of JSON Lines, one row for each window and setting.

    Args:
        model: a causal language model, in evaluation mode and on its device.
        windows: `[N, T]` int64 token ids.
        record: the file. If it exists it must come from the same model and windows, and what is in it is not measured
            again.
        batch_size: windows in one call.

    Raises:
        ValueError: if the file holds an evaluation of something else.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, record: Path, batch_size: int = 1):
        self.model, self.windows, self.record, self.batch_size = model, windows, record, batch_size
        identity = {
            "model": fingerprint(model),
            "text": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "windows": list(windows.shape),
            "dtype": str(model.dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        rows = read_rows(record)
        if not rows:
            record.parent.mkdir(parents=True, exist_ok=True)
            append_row(record, identity)
        elif rows[0] != identity:
            changed = [name for name, value in identity.items() if rows[0].get(name) != value]
            raise ValueError(f"{record} holds an evaluation of another {', '.join(changed)}: give a new folder.")
        self._figures = {
            (json.dumps(row["memory"]), row["window"]): WindowFigures(**row["figures"]) for row in rows[1:]
        }

    def missing(self, memory: Memory) -> list[int]:
        """The windows that are not yet measured at a setting."""
        return [i for i in range(len(self.windows)) if (json.dumps(memory), i) not in self._figures]

    def measure(self, memory: Memory, progress: Any = None) -> dict[str, Any]:
        """The means of all windows at a setting, see `summary`; measures what is missing.

        Args:
            memory: arguments of the model's calls: `threshold`, `kv_usage` and `kv_budget` of a HAM.
            progress: a tqdm bar that counts windows.
        """
        missing = self.missing(memory)
        for start in range(0, len(missing), self.batch_size):
            indices = missing[start : start + self.batch_size]
            figures = window_figures(self.model, self.windows[indices], **memory)
            for i, x in zip(indices, figures, strict=True):
                append_row(self.record, {"memory": memory, "window": i, "figures": x._asdict()})
                self._figures[json.dumps(memory), i] = x
            if progress is not None:
                progress.update(len(indices))
        return summary([self._figures[json.dumps(memory), i] for i in range(len(self.windows))])

    def results(self, memories: Iterable[Memory]) -> list[dict[str, Any]]:
        """What `usage.json` holds of each setting, with a progress bar on a terminal that tells the time left."""
        memories = list(memories)
        total = sum(len(self.missing(memory)) for memory in memories)
        with tqdm(total=total, desc="evaluate", unit="window", disable=None) as progress:
            return [result(memory, self.measure(memory, progress)) for memory in memories]


def result(memory: Memory, figures: dict[str, Any]) -> dict[str, Any]:
    """A setting with its figures; arguments that are not given are `None`."""
    return {name: memory.get(name) for name in ("kv_usage", "threshold", "kv_budget")} | figures
