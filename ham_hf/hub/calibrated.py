# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes a calibration into a checkpoint folder: everything else in it stays as it is, byte for byte."""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME

from ..conversion.shards import find_weights
from ..evaluation.heads import plot_heads
from ..files import write_whole
from ..files_ham import whole_file
from ..loading_ham import open_weights
from ..modeling_ham import HAMForCausalLM
from .card import build_card
from .checkpoint import HEADS_PLOT, read_checkpoint
from .sources import read_json, read_sources

QUANTILES = "score_quantiles"


def save_calibrated(folder: Path, output: Path, model: HAMForCausalLM) -> list[str]:
    """Writes the checkpoint in `folder` with the score quantiles and the heads' importance of `model` to `output`.

    A new folder appears whole or not at all. In place all files are written before the first is replaced.

    Args:
        folder: the checkpoint that the model was loaded from.
        output: a new folder, or `folder` itself.
        model: the calibrated model.

    Returns:
        The names of the files that differ from those of `folder`.

    Raises:
        ValueError: if `folder` is not a whole checkpoint.
        OSError: if the new files cannot be written.
    """
    in_place = output.exists() and output.samefile(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".calibrated-") as temporary:
        new = Path(temporary) / output.resolve().name
        weights = [x for x in find_weights(folder) if _quantiles_in(x)]
        shutil.copytree(folder, new, ignore=lambda _, names: {x.name for x in weights} & set(names))
        for path in weights:
            _write_weights(path, new / path.name, model)
        changed = [*(x.name for x in weights), *_write_facts(folder, new, output.resolve().name, model)]
        if not in_place:
            os.replace(new, output)
            return changed
        for name in changed:
            os.replace(new / name, folder / name)
    return changed


def _quantiles_in(path: Path) -> list[str]:
    """The names of the score quantiles in a file of weights."""
    with open_weights(path) as file:
        return [name for name in file.keys() if name.endswith(f".{QUANTILES}")]  # noqa: SIM118, not a dict


def _write_weights(path: Path, new: Path, model: HAMForCausalLM) -> None:
    """Copies a file of weights with the quantiles of `model`."""
    quantiles = {name: x for name, x in model.state_dict().items() if name.endswith(f".{QUANTILES}")}
    with open_weights(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata()
    for name in _quantiles_in(path):
        tensors[name] = quantiles[name].cpu().contiguous()
    with whole_file(new) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def _write_facts(folder: Path, new: Path, name: str, model: HAMForCausalLM) -> list[str]:
    """Writes configuration, picture and card of the checkpoint `name`; returns the names of the files."""
    sources = read_sources(folder)
    # A card that was made of more than this folder, or by hand, stays.
    plain = str(build_card(read_checkpoint(folder), sources, sources.metadata.get("name", folder.resolve().name)))
    renewed = (folder / REPOCARD_NAME).is_file() and (folder / REPOCARD_NAME).read_text(encoding="utf-8") == plain
    fields = {"router": model.config.router, "head_importance": model.config.head_importance}
    write_whole(new / CONFIG_NAME, json.dumps(read_json(folder / CONFIG_NAME) | fields, indent=2) + "\n")
    changed = [CONFIG_NAME]
    if model.config.head_importance is not None and importlib.util.find_spec("matplotlib") is not None:
        with whole_file(new / HEADS_PLOT) as unfinished:
            plot_heads(model.config, unfinished)
        changed.append(HEADS_PLOT)
    if renewed:
        card = build_card(read_checkpoint(new), sources, sources.metadata.get("name", name))
        write_whole(new / REPOCARD_NAME, str(card))
        changed.append(REPOCARD_NAME)
    return changed
