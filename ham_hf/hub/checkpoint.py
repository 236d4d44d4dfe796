# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Facts about a checkpoint folder, read from its configuration and the headers of its weights."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import CONFIG_NAME

from ..configuration_ham import HAMConfig
from ..conversion.shards import find_weights
from ..loading_ham import open_weights
from .sources import read_conversion, read_json

# Auto class that loads each head, and the task under which the Hub lists it.
AUTO_CLASSES: dict[str, tuple[str, str | None]] = {
    "HAMForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "HAMForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "HAMForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "HAMForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "HAMModel": ("AutoModel", "feature-extraction"),
}


# Picture of the importance of heads, which `ham-hf calibrate` draws.
HEADS_PLOT = "heads.png"


class Checkpoint(NamedTuple):
    """A checkpoint folder.

    Attributes:
        folder: its path.
        config: its configuration.
        architecture: the name of its class.
        auto_class: the Auto class that loads it; for a class that is not ours, the one that loads its decoder.
        task: the Hub's name of its task, or `None` if it is unknown.
        has_code: True if it holds the code that its configuration names, which loads it without the package.
        weight_files: its safetensors files.
        parameters: number of its parameters by safetensors dtype, without buffers.
        thresholds: `[hybrid layers, Hk]` float32 learned thresholds, or `None` without a hybrid layer.
        calibrated: True if every head has the score quantiles that `kv_usage` needs.
        conversion: conversion.json of the script that made it from another model, or `None`.
        heads_plot: the picture of its heads' importance, or `None`.
    """

    folder: Path
    config: HAMConfig
    architecture: str
    auto_class: str
    task: str | None
    has_code: bool
    weight_files: list[Path]
    parameters: Counter[str]
    thresholds: torch.Tensor | None
    calibrated: bool
    conversion: dict[str, Any] | None
    heads_plot: Path | None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the configuration and the headers of the weights in `folder`.

    Raises:
        ValueError: if `folder` is not a whole HAM checkpoint with safetensors weights, or its conversion.json is
            invalid.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be that of a HAM checkpoint, got {str(folder)!r}, which is not a folder.")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"`folder` must be that of a HAM checkpoint, got {str(folder)!r}, which holds no {CONFIG_NAME}."
        )
    fields = read_json(folder / CONFIG_NAME)
    if fields.get("model_type") != "ham":
        raise ValueError(
            f"`folder` must hold a HAM model ('ham'), got one of type {fields.get('model_type')!r} in {folder}."
        )
    config = HAMConfig.from_pretrained(folder)
    architecture = (config.architectures or ["HAMForCausalLM"])[0]
    auto_class, task = AUTO_CLASSES.get(architecture, ("AutoModel", None))
    modules = [str(entry).partition(".")[0] for entry in (fields.get("auto_map") or {}).values()]
    weight_files = find_weights(folder)
    parameters, routing = read_weights(weight_files)
    thresholds, quantiles = routing["threshold"], routing["score_quantiles"]
    if not len(thresholds) == len(quantiles) == config.num_hybrid_layers:
        raise ValueError(
            f"The weights in {folder} hold {len(thresholds)} thresholds and {len(quantiles)} tables of score "
            f"quantiles for {config.num_hybrid_layers} hybrid layers."
        )
    return Checkpoint(
        folder=folder,
        config=config,
        architecture=architecture,
        auto_class=auto_class,
        task=task,
        has_code=bool(modules) and all((folder / f"{name}.py").is_file() for name in modules),
        weight_files=weight_files,
        parameters=parameters,
        thresholds=torch.stack(thresholds) if thresholds else None,
        calibrated=bool(quantiles) and all(bool((x.amax(-1) > 0).all()) for x in quantiles),
        conversion=read_conversion(folder),
        heads_plot=folder / HEADS_PLOT if (folder / HEADS_PLOT).is_file() else None,
    )


def read_weights(files: list[Path]) -> tuple[Counter[str], dict[str, list[torch.Tensor]]]:
    """Counts parameters by dtype from the headers; loads only the thresholds and score quantiles, `[Hk, ...]` each."""
    parameters: Counter[str] = Counter()
    routing: dict[str, list[torch.Tensor]] = {"threshold": [], "score_quantiles": []}
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                header = file.get_slice(name)
                kind = name.rpartition(".")[2]
                if kind in routing:
                    routing[kind].append(file.get_tensor(name))
                if kind != "score_quantiles":
                    parameters[header.get_dtype()] += torch.Size(header.get_shape()).numel()
    return parameters, routing
