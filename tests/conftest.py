# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What several test files share: a small configuration, and deterministic random numbers."""

import os
from collections.abc import Callable

import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter, which must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ham_hf import HAMConfig


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., HAMConfig]:
    """A function that makes the configuration of a model small enough to run thousands of times; overrides by name."""

    def make(**overrides) -> HAMConfig:
        settings = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": 0,
        }
        return HAMConfig(**(settings | overrides))

    return make
