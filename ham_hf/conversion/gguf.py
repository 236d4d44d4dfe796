# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads a checkpoint in one GGUF file (llama.cpp) as Transformers does: dequantised to float32."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    __version__,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.quantization_config import GgufConfig

from .shards import Tensors

SUFFIX = ".gguf"
PACKAGES = ("gguf", "accelerate")
# Fields that Transformers adds when it reads GGUF; a checkpoint of plain weights has none of them.
READING_FIELDS = ("quantization_config", "_name_or_path", "_model_name_or_path")
SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")


# Errors of Transformers' readers on a file that is cut off, garbled or of another model.
READING_ERRORS = (ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError, struct.error)


@contextmanager
def naming(folder: Path, file: str) -> Iterator[None]:
    """Turns an error in reading a file into a `ValueError` that names the file."""
    try:
        yield
    except READING_ERRORS as error:
        raise ValueError(f"Transformers {__version__} cannot read {folder / file}: {error}") from error


def check_packages() -> None:
    """Raises `ImportError` that says what to install."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Reading GGUF takes the package(s) {', '.join(missing)}, which the extra `gguf` brings: pip install "
            "'ham-hf[gguf]'"
        )


def find_gguf(folder: Path, name: str | None) -> str | None:
    """The name of the GGUF file to read in `folder`, or `None` if the folder holds a checkpoint of safetensors.

    Raises:
        ValueError: if there is no such file, or the folder holds nothing else and `name` does not say which.
    """
    files = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    if name is not None and name not in files:
        raise ValueError(f"`--gguf-file` must name a file in {folder}, got {name!r}; there are {files}.")
    if name is None and files and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds GGUF: say which with `--gguf-file`, one of {files}.")
    return name


def read_config(folder: Path, file: str) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration in a GGUF file, and the content of a config.json for its plain weights."""
    with naming(folder, file):
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
    fields = json.loads(config.to_json_string())
    fields = {name: value for name, value in fields.items() if name not in READING_FIELDS}
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return AutoConfig.for_model(**fields), fields


def read_tokenizer(folder: Path, file: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with the special tokens of its model, which Transformers 5.17 gets wrong."""
    with naming(folder, file):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    for name in SPECIAL_TOKENS:
        number = getattr(config, f"{name}_token_id", None)
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    return tokenizer


def read_model(folder: Path, file: str) -> torch.nn.Module:
    """Transformers' model of a GGUF file, with plain weights in float32."""
    plain = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    with naming(folder, file):
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **plain).eval()


class GGUFTensors(Tensors):
    """The tensors of a GGUF file, under their names in Transformers; all are in memory at once."""

    def __init__(self, folder: Path, file: str):
        super().__init__(folder, [file])
        self._tensors = read_model(folder, file).state_dict()

    def names(self) -> set[str]:
        """Every tensor."""
        return set(self._tensors)

    def get(self, name: str) -> torch.Tensor:
        """A tensor; raises `ValueError` if there is none of this name."""
        self.check_name(name)
        return self._tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._tensors[name].dtype
