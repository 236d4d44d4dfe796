# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Hybrid Associative Memories for Hugging Face Transformers; importing it registers the Auto classes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "HAMCache",
    "HAMConfig",
    "HAMForCausalLM",
    "HAMForQuestionAnswering",
    "HAMForSequenceClassification",
    "HAMForTokenClassification",
    "HAMModel",
    "HAMPreTrainedModel",
]


def _imported_by_the_command() -> bool:
    """True while `ham-hf` or `python -m ham_hf.cli` starts; Python looks up a `-m` module under that name."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":
        return "ham_hf.cli" in sys.orig_argv
    return Path(program).stem.removesuffix("-script") == "ham-hf"


# `ham-hf --help` must answer at once, so the command imports PyTorch and registers classes only for a model.
if TYPE_CHECKING or not _imported_by_the_command():
    from .auto_classes import (
        HAMCache,
        HAMConfig,
        HAMForCausalLM,
        HAMForQuestionAnswering,
        HAMForSequenceClassification,
        HAMForTokenClassification,
        HAMModel,
        HAMPreTrainedModel,
    )


def __getattr__(name: str) -> Any:
    """Imports and registers the public classes on first use, in the process of a command."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import auto_classes

    return getattr(auto_classes, name)
