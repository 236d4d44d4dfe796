# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures the loss and the memory of a model at several settings of its memory, window by window."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .losses import WindowFigures, summary, window_figures
from .record import Record

Memory = dict[str, Any]


class Evaluation:
    """Figures of a model on windows of text, see `window_figures`, which a file remembers.

    Args:
        model: a causal language model, in evaluation mode and on its device.
        windows: `[N, T]` int64 token ids.
        record: the file, see `Record`; what is in it is not measured again.
        batch_size: windows in one call.

    Raises:
        ValueError: if the file holds an evaluation of something else.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, record: Path, batch_size: int = 1):
        self.model, self.windows, self.batch_size = model, windows, batch_size
        text = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        self.record = Record(record, model, {"text": text, "windows": list(windows.shape)})

    def missing(self, memory: Memory) -> list[int]:
        """The windows that are not yet measured at a setting."""
        return [i for i in range(len(self.windows)) if {"memory": memory, "window": i} not in self.record]

    def measure(self, memory: Memory, progress: Any = None) -> dict[str, Any]:
        """The means of all windows at a setting, see `summary`, with the arguments of the setting.

        Args:
            memory: arguments of the model's calls: `threshold`, `kv_usage` and `kv_budget` of a HAM.
            progress: a tqdm bar that counts windows.
        """
        missing = self.missing(memory)
        for start in range(0, len(missing), self.batch_size):
            indices = missing[start : start + self.batch_size]
            figures = window_figures(self.model, self.windows[indices], **memory)
            for i, x in zip(indices, figures, strict=True):
                self.record[{"memory": memory, "window": i}] = x._asdict()
            if progress is not None:
                progress.update(len(indices))
        rows = [self.record[{"memory": memory, "window": i}] for i in range(len(self.windows))]
        return setting(memory) | summary([WindowFigures(**x) for x in rows])

    def results(self, memories: Iterable[Memory]) -> list[dict[str, Any]]:
        """What `usage.json` holds of each setting, with a progress bar on a terminal that tells the time left."""
        memories = list(memories)
        total = sum(len(self.missing(memory)) for memory in memories)
        with tqdm(total=total, desc="evaluate", unit="window", disable=None) as progress:
            return [self.measure(memory, progress) for memory in memories]


def setting(memory: Memory) -> Memory:
    """All arguments of a setting; those that are not given are `None`."""
    return {name: memory.get(name) for name in ("kv_usage", "threshold", "kv_budget")}
