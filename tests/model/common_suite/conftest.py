# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Small models with learned and with fixed thresholds, and with a layer of each kind."""

import pytest

from ham_hf import HAMForCausalLM
from tests.model.models import LAYERS, moved

MIXED = LAYERS["mixed"]
CASES = {
    "learned thresholds": {},
    "fixed threshold": {"threshold": 0.5},
    "mixed layers": {"layer_types": MIXED, "num_hidden_layers": len(MIXED)},
}


@pytest.fixture(params=["learned thresholds", pytest.param("fixed threshold", marks=pytest.mark.slow), "mixed layers"])
def config(request, tiny_config):
    return tiny_config(bos_token_id=1, eos_token_id=2, **CASES[request.param])


@pytest.fixture
def every_kind(tiny_config):
    """A layer of each kind, for tests of every class: what differs between them does not depend on the layers."""
    return tiny_config(bos_token_id=1, eos_token_id=2, **CASES["mixed layers"])


@pytest.fixture
def model(config):
    """A causal LM that keeps some tokens and drops others."""
    return moved(HAMForCausalLM(config)).eval()
