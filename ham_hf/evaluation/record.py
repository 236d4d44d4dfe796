# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The rows of a measurement in a file, so that it goes on where it was interrupted."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..files import append_row, read_rows

# Values of each tensor that `fingerprint` reads.
FINGERPRINT_VALUES = 4096


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration and of the beginning of each tensor, which tells one checkpoint from another."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, x in model.state_dict().items():
        beginning = x.flatten()[:FINGERPRINT_VALUES].detach().cpu().contiguous()
        digest.update(name.encode() + beginning.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Record:
    """Figures by key, in JSON Lines: the first row tells what is measured, each other one holds a key and figures.

    Args:
        path: the file. If it exists it must be a record of the same model and inputs.
        model: the model that is measured, on its device.
        inputs: what it is measured on.

    Raises:
        ValueError: if the file is a record of something else.
    """

    def __init__(self, path: Path, model: PreTrainedModel, inputs: dict[str, Any]):
        self.path = path
        identity = {
            "model": fingerprint(model),
            **inputs,
            "dtype": str(model.dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        rows = read_rows(path)
        if not rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_row(path, identity)
        elif rows[0] != identity:
            changed = [name for name, value in identity.items() if rows[0].get(name) != value]
            raise ValueError(f"{path} holds an evaluation of another {', '.join(changed)}: give a new folder.")
        self._figures = {json.dumps(row["key"]): row["figures"] for row in rows[1:]}

    def __contains__(self, key: dict[str, Any]) -> bool:
        """True if the key has figures."""
        return json.dumps(key) in self._figures

    def __getitem__(self, key: dict[str, Any]) -> dict[str, Any]:
        """The figures of a key."""
        return self._figures[json.dumps(key)]

    def __setitem__(self, key: dict[str, Any], figures: dict[str, Any]) -> None:
        """Writes the figures of a key to the file."""
        append_row(self.path, {"key": key, "figures": figures})
        self._figures[json.dumps(key)] = figures
