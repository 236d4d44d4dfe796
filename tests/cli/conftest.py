# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints and an environment without colours, for all tests of the command."""

import pytest
import torch
from transformers.utils import logging

from tests.cli.calls import byte_tokenizer, save, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("plain"), tokenizer, tiny_model(len(tokenizer)))


@pytest.fixture(scope="module")
def calibrated_checkpoint(tmp_path_factory, tokenizer):
    model = tiny_model(len(tokenizer))
    for layer in model.model.layers:
        layer.mixer.score_quantiles.copy_(torch.linspace(0.2, 0.8, layer.mixer.score_quantiles.shape[1]))
    return save(tmp_path_factory.mktemp("calibrated"), tokenizer, model)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No colour forced from outside, and Transformers' logging left as it was found."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
