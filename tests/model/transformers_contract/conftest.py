# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Small models of HAM layers only, and with a layer of each kind."""

import pytest

from ham_hf import HAMConfig, HAMForCausalLM
from tests.model.models import LAYERS, distinct


@pytest.fixture(params=list(LAYERS))
def config(request, tiny_config) -> HAMConfig:
    """A small configuration: HAM layers only, then one layer of each kind."""
    types = LAYERS[request.param]
    return tiny_config(layer_types=types, num_hidden_layers=len(types))


@pytest.fixture
def model(config) -> HAMForCausalLM:
    """A causal LM that keeps some tokens and drops others, with logits far enough apart to compare tokens."""
    return distinct(HAMForCausalLM(config)).eval()
