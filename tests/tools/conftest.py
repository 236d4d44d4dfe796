# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures for the tests of other people's tools: the embedded checkpoint, loaded, and with its code beside it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ham_hf import HAMForCausalLM

CHECKPOINT = Path(__file__).parents[2] / "ham_hf" / "checkpoints" / "ham-tiny"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The folder of the embedded checkpoint."""
    return CHECKPOINT


@pytest.fixture
def model() -> HAMForCausalLM:
    """The embedded checkpoint in float32; a new one for each test, because tools change models."""
    return HAMForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def with_code(tmp_path_factory) -> Path:
    """A copy of the embedded checkpoint that carries its code, with a chat template."""
    folder = tmp_path_factory.mktemp("with_code")
    HAMForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder
