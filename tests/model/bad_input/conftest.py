# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A small model, and a cache that it has filled."""

import pytest
import torch

from ham_hf import HAMCache, HAMForCausalLM
from tests.model.bad_input.refusals import ROWS, SEEN, VOCABULARY


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return HAMForCausalLM(tiny_config()).eval().requires_grad_(False)


@pytest.fixture
def cache(model):
    cache = HAMCache(model.config)
    model(torch.randint(1, VOCABULARY, (ROWS, SEEN)), cache=cache, threshold=0.5)
    return cache
