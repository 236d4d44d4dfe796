# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The models and the tokens that fill the caches of these tests."""

import pytest
import torch

from ham_hf import HAMForCausalLM
from tests.cache.caches import MIXED


@pytest.fixture(scope="module")
def make_model(tiny_config):
    def make(seed=0, dtype=torch.float32, **overrides):
        torch.manual_seed(seed)
        return HAMForCausalLM(tiny_config(**overrides)).eval().to(dtype).requires_grad_(False)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    """One layer of each kind and a second hybrid one, whose scores depend on what the first kept."""
    return make_model(num_hidden_layers=4, layer_types=list(MIXED))


@pytest.fixture
def ids():
    return torch.randint(1, 97, (3, 60))


@pytest.fixture
def mask():
    """Padding on the left in one row, in the middle in another (a prompt padded on the right, then continued)."""
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, 18:25] = 0
    return mask
