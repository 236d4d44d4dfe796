# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Conversion, a script's declaration of its kind of source: configurations, rules for tensors, requirements."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..configuration_ham import HAMConfig
from .shards import TensorRule
from .verification import transformers_logits, transformers_model


@dataclass(frozen=True)
class Requirement:
    """A condition on a tensor of a HAM, without which the way back loses something; an error then `says` why."""

    name: str
    holds: Callable[[torch.Tensor], bool]
    says: str


def no_preparation() -> None:
    """Imports nothing, for sources that Transformers has."""


@dataclass(frozen=True)
class Conversion:
    """A script's knowledge of its source.

    Attributes:
        script: the script's file name.
        model_types: the `model_type`s that it reads.
        ham_config: configuration of the HAM that computes the same; `ValueError` names a feature that HAM lacks.
        to_ham: rules for every tensor of the HAM.
        from_ham: rules for every tensor of the source.
        requirements: conditions on a HAM for the way back.
        prepare: imports the source's classes into Transformers; `ImportError` says what to install.
        logits: `[B, T, vocabulary]` float32 that the source's own code computes from a folder and tokens `[B, T]`.
        source_code: name of the code that computes them, for the card, given the architecture.
        empty_source: the source's model of a configuration, with the tensors that its files hold.
        rename: turns a tensor's name in the source's files, which may differ, into the one that the rules use.
        inert: a pattern of the HAM's tensors that only its shut memory reads.
        summary: the state of the new HAM, for the user.
        reads_gguf: True if a source may be a GGUF file, as Transformers reads it.
        takes_window: True if the HAM's attention layers keep every token at first, so that a window changes nothing
            until a threshold drops tokens.
        left_out: a pattern of the source's tensors that a HAM does not need; `None` if it needs them all.
        left_out_because: the reason, for the user.
    """

    script: str
    model_types: tuple[str, ...]
    ham_config: Callable[[Any], HAMConfig]
    to_ham: Callable[[Any, HAMConfig], Iterable[TensorRule]]
    from_ham: Callable[[Any, HAMConfig], Iterable[TensorRule]]
    requirements: Callable[[Any, HAMConfig], Iterable[Requirement]]
    inert: str
    summary: str
    prepare: Callable[[], None] = no_preparation
    logits: Callable[[Path, torch.Tensor], torch.Tensor] = transformers_logits
    source_code: Callable[[str], str] = str
    empty_source: Callable[[Any], torch.nn.Module] = transformers_model
    rename: Callable[[str], str] = lambda name: name
    reads_gguf: bool = False
    takes_window: bool = False
    left_out: str | None = None
    left_out_because: str = ""
