# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads and writes checkpoints of safetensors one tensor at a time, so that no model is ever whole in memory."""

import collections
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ham_hf.files import write_whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How one tensor of a new checkpoint is made.

    Attributes:
        name: the new tensor.
        sources: tensors of the old checkpoint, handed to `make` in this order.
        make: what turns them into the new tensor.
        dtype: of the new tensor; `None` takes that of the first source, or of most of the old checkpoint.
    """

    name: str
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    dtype: torch.dtype | None = None


def copied(name: str, source: str) -> Recipe:
    """The tensor `name`, equal to `source`."""
    return Recipe(name, (source,), lambda x: x)


class Weights:
    """The tensors of a folder of safetensors, sharded or not, read when asked for.

    Args:
        folder: where the safetensors are.
        rename: turns the name of a tensor in the files into the name by which it is known here.

    Raises `ValueError` for a folder without safetensors, an index that points elsewhere, two tensors of one name, and
    dtypes that are not plain floating point (quantised weights).
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = lambda name: name):
        self.folder = folder
        self.files = {}
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
                raise ValueError(
                    f"{INDEX} must hold a `weight_map` of tensors to files, got {folder / INDEX} without."
                )
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                names = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ValueError(
                f"`source` must hold {SINGLE} or {INDEX}, got {folder} without either. Load it with its own library "
                "and save it with `save_pretrained`, which writes safetensors."
            )
        for shard in sorted(set(names.values())):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ValueError(f"`source` must hold the files that its {INDEX} names, got {shard!r}.")
            self.files[shard] = safe_open(folder / shard, "pt")
        self.stored = {rename(name): (shard, name) for name, shard in names.items()}
        if len(self.stored) < len(names):
            raise ValueError(f"`source` must hold every tensor once, got {len(names) - len(self.stored)} twice.")
        for name in self.stored:
            if self._slice(name).get_dtype() not in DTYPES:
                raise ValueError(
                    f"`source` must hold plain weights ({', '.join(DTYPES)}), got {self._slice(name).get_dtype()} for "
                    f"{name}. Quantised checkpoints are not converted: take the original one."
                )

    def names(self) -> set[str]:
        """Every tensor in the folder."""
        return set(self.stored)

    def get(self, name: str) -> torch.Tensor:
        """Reads a tensor."""
        shard, stored_name = self.stored[name]
        return self.files[shard].get_tensor(stored_name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, which is not read."""
        return DTYPES[self._slice(name).get_dtype()]

    def main_dtype(self) -> torch.dtype:
        """The dtype that most tensors have."""
        return collections.Counter(map(self.dtype, sorted(self.stored))).most_common(1)[0][0]

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and time of change of configuration and shards: what a run that goes on must find unchanged."""
        stats = {name: (self.folder / name).stat() for name in ("config.json", *self.files)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def _slice(self, name: str) -> Any:
        shard, stored_name = self.stored[name]
        return self.files[shard].get_slice(stored_name)


def check_recipes(
    recipes: dict[str, Recipe], shapes: dict[str, torch.Size], left_out: Iterable[str], old: Weights
) -> None:
    """Refuses, with `ValueError`, recipes that miss a tensor of the new model or leave one of the old unused."""
    if recipes.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - recipes.keys()), sorted(recipes.keys() - shapes.keys())
        raise ValueError(f"The new model has no recipe for {missing[:5]}, and no place for {unknown[:5]}.")
    read = {source for recipe in recipes.values() for source in recipe.sources}
    missing = sorted(read - old.names())
    unread = sorted(old.names() - read - set(left_out))
    if missing:
        raise ValueError(f"`source` lacks {len(missing)} tensors that its configuration implies: {missing[:5]}.")
    if unread:
        raise ValueError(f"`source` holds {len(unread)} tensors that HAM has no place for: {unread[:5]}.")


def write_shards(
    recipes: dict[str, Recipe], shapes: dict[str, torch.Size], old: Weights, folder: Path, max_shard_size: str
) -> None:
    """Makes every tensor and writes it to `folder`, shard by shard; shards that are there already stay.

    Args:
        recipes: by the name of what they make.
        shapes: of the new tensors.
        old: the checkpoint to make them from.
        folder: where the shards, and the index if there are several, go.
        max_shard_size: such as `"5GB"`.

    Raises:
        ValueError: if a tensor comes out in another shape than `shapes` has.
    """
    dtypes, main_dtype = {}, old.main_dtype()
    for name, recipe in recipes.items():
        dtypes[name] = recipe.dtype or (old.dtype(recipe.sources[0]) if recipe.sources else main_dtype)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()},
        max_shard_size=max_shard_size,
    )
    with tqdm(total=plan.metadata["total_size"], unit="B", unit_scale=True, desc="tensors") as bar:
        for filename, names in plan.filename_to_tensors.items():
            if not (folder / filename).is_file():
                tensors = {name: _make(recipes[name], shapes[name], old).to(dtypes[name]) for name in names}
                partial = folder / f"{filename}.writing"
                save_file(tensors, partial, metadata={"format": "pt"})
                os.replace(partial, folder / filename)
            bar.update(sum(shapes[name].numel() * dtypes[name].itemsize for name in names))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_whole(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _make(recipe: Recipe, shape: torch.Size, old: Weights) -> torch.Tensor:
    tensors = [old.get(source) for source in recipe.sources]
    try:
        tensor = recipe.make(*tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{recipe.name} cannot be made of {', '.join(recipe.sources)}: configuration and weights disagree; {error}"
        ) from error
    if tensor.shape != shape:
        raise ValueError(
            f"{recipe.name} must have the shape {list(shape)}, got {list(tensor.shape)} from "
            f"{', '.join(recipe.sources)}: configuration and weights disagree."
        )
    return tensor.contiguous()
