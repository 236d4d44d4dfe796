# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads and writes safetensors checkpoints one tensor at a time, so that no whole model is in memory."""

import collections
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import write_whole
from ..files_ham import whole_file
from ..hub.sources import read_json
from ..loading_ham import open_weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorRule:
    """Rule that makes one tensor of a new checkpoint.

    Attributes:
        name: the new tensor.
        sources: tensors of the old checkpoint, passed to `make` in this order.
        make: function from the sources to the new tensor.
        dtype: dtype of the new tensor; `None` takes that of the first source, or of most of the old checkpoint.
    """

    name: str
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    dtype: torch.dtype | None = None


def copied(name: str, source: str) -> TensorRule:
    """The tensor `name`, equal to `source`."""
    return TensorRule(name, (source,), lambda x: x)


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as Transformers finds them: one, or else the shards of its index.

    Raises:
        ValueError: if a file is missing, or the index is invalid or names files elsewhere.
    """
    names, index = {SAFE_WEIGHTS_NAME}, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} must hold a `weight_map` from tensors to files.")
        names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(
                f"A checkpoint must hold all of its safetensors weights, got {folder} without {name}. Weights in "
                "other formats become safetensors when the library that made them loads and saves them again."
            )
    return [folder / name for name in sorted(names)]


class Tensors(ABC):
    """The tensors of a checkpoint by their names, in any storage.

    Args:
        folder: folder of the checkpoint.
        files: the names of the files that hold them.
    """

    def __init__(self, folder: Path, files: Iterable[str]):
        self.folder = folder
        self.files = list(files)

    @abstractmethod
    def names(self) -> set[str]:
        """Every tensor."""

    @abstractmethod
    def get(self, name: str) -> torch.Tensor:
        """Reads a tensor; raises `ValueError` if there is none of this name."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""

    def check_name(self, name: str) -> None:
        """Raises `ValueError` if there is no tensor of this name."""
        if name not in self.names():
            raise ValueError(f"`source` lacks the tensor {name}, which its configuration implies.")

    def main_dtype(self) -> torch.dtype:
        """The dtype of most tensors."""
        return collections.Counter(map(self.dtype, sorted(self.names()))).most_common(1)[0][0]

    def fingerprint(self) -> dict[str, list[int]]:
        """Size and modification time of configuration and weights, which a resumed run must find unchanged."""
        paths = {name: self.folder / name for name in (CONFIG_NAME, *self.files)}
        stats = {name: path.stat() for name, path in paths.items() if path.is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class Weights(Tensors):
    """The tensors of a folder of safetensors, sharded or not, read when asked for.

    Args:
        folder: folder of the safetensors.
        rename: turns the name of a tensor in the files into its name here.

    Raises `ValueError` as `find_weights` does, for files that are not whole, for two tensors of one name, and for
    dtypes that are not plain floating point (quantised weights).
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = lambda name: name):
        self._open = {path.name: open_weights(path) for path in find_weights(folder)}
        super().__init__(folder, self._open)
        names = [(rename(name), (shard, name)) for shard, x in self._open.items() for name in x.keys()]  # noqa: SIM118
        self.stored = dict(names)
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
        """Reads a tensor; raises `ValueError` if there is none of this name."""
        self.check_name(name)
        shard, stored_name = self.stored[name]
        return self._open[shard].get_tensor(stored_name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        return DTYPES[self._slice(name).get_dtype()]

    def _slice(self, name: str) -> Any:
        shard, stored_name = self.stored[name]
        return self._open[shard].get_slice(stored_name)


def check_rules(
    rules: dict[str, TensorRule], shapes: dict[str, torch.Size], left_out: Iterable[str], old: Tensors
) -> None:
    """Raises `ValueError` for rules that miss a tensor of the new model or leave one of the old model unused."""
    if rules.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - rules.keys()), sorted(rules.keys() - shapes.keys())
        raise ValueError(f"The new model has no rule for {missing[:5]}, and no place for {unknown[:5]}.")
    read = {source for rule in rules.values() for source in rule.sources}
    missing = sorted(read - old.names())
    unread = sorted(old.names() - read - set(left_out))
    if missing:
        raise ValueError(f"`source` lacks {len(missing)} tensors that its configuration implies: {missing[:5]}.")
    if unread:
        raise ValueError(f"`source` holds {len(unread)} tensors that the new model has no place for: {unread[:5]}.")


def write_shards(
    rules: dict[str, TensorRule], shapes: dict[str, torch.Size], old: Tensors, folder: Path, max_shard_size: str
) -> None:
    """Makes every tensor and writes it to `folder`, shard by shard; existing shards stay.

    Args:
        rules: rules by the name of the new tensor.
        shapes: shapes of the new tensors.
        old: the checkpoint to make them from.
        folder: folder for the shards, and for the index if there are several.
        max_shard_size: size of the largest shard, such as `"5GB"`.

    Raises:
        ValueError: if a tensor comes out in another shape than `shapes` has.
    """
    dtypes, main_dtype = {}, old.main_dtype()
    for name, rule in rules.items():
        dtypes[name] = rule.dtype or (old.dtype(rule.sources[0]) if rule.sources else main_dtype)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()},
        max_shard_size=max_shard_size,
    )
    with tqdm(total=plan.metadata["total_size"], unit="B", unit_scale=True, desc="tensors") as bar:
        for filename, names in plan.filename_to_tensors.items():
            if not (folder / filename).is_file():
                tensors = {name: _make(rules[name], shapes[name], old).to(dtypes[name]) for name in names}
                with whole_file(folder / filename) as unfinished:
                    save_file(tensors, unfinished, metadata={"format": "pt"})
            bar.update(sum(shapes[name].numel() * dtypes[name].itemsize for name in names))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_whole(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _make(rule: TensorRule, shape: torch.Size, old: Tensors) -> torch.Tensor:
    tensors = [old.get(source) for source in rule.sources]
    try:
        tensor = rule.make(*tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{rule.name} cannot be made of {', '.join(rule.sources)}: configuration and weights disagree; {error}"
        ) from error
    if tensor.shape != shape:
        raise ValueError(
            f"{rule.name} must have the shape {list(shape)}, got {list(tensor.shape)} from "
            f"{', '.join(rule.sources)}: configuration and weights disagree."
        )
    return tensor.contiguous()
