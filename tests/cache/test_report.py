# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The report of a cache tells what its functions return."""

import pytest
import torch

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.cache_report_ham import cache_report, size_in_words

KIB = 2**10


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "layer_types": ["hybrid", "linear_attention"]}
    return HAMForCausalLM(tiny_config(**layers)).eval()


def test_sizes_have_the_unit_that_suits_them():
    told = [size_in_words(x) for x in (0, 1023, KIB, 1536, KIB**2 - 1, 3 * KIB**3)]
    assert told == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "1,024.0 KiB", "3.0 GiB"]


def test_lines():
    usage = torch.tensor([[[0.25, 0.75], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    kinds = ["hybrid", "linear_attention"]
    text = cache_report(torch.tensor([900, 1000]), kinds, usage, 4 * KIB, KIB, 12 * KIB, [3 * KIB, KIB])
    assert text.splitlines() == [
        "rows: 2, each of 900 to 1,000 tokens",
        "held: 62.5% (from 25.0% to 100.0% by head)",
        "memory: 4.0 KiB, 1.0 KiB of them states",
        "keys and values of all tokens: 12.0 KiB",
        "layer  0  hybrid            3.0 KiB, held 62.5% (from 25.0% to 100.0% by head)",
        "layer  1  linear_attention  1.0 KiB",
    ]


def test_a_model_s_cache(model):
    cache = HAMCache(model.config)
    with pytest.raises(ValueError, match="has seen no tokens yet"):
        cache.report()
    with torch.no_grad():
        model(torch.randint(1, 97, (2, 50)), cache=cache, threshold=0.5)
    text = cache.report()
    assert "rows: 2, each of 50 tokens" in text
    assert f"held: {cache.kv_usage()[0].mean().item():.1%} (from" in text
    assert size_in_words(cache.memory_bytes()) in text
    assert size_in_words(cache.full_kv_bytes()) in text
    assert sum(layer.memory_bytes() for layer in cache.layers) == cache.memory_bytes()


def test_a_model_of_linear_layers_holds_no_share(model, tiny_config):
    linear = HAMForCausalLM(tiny_config(layer_types=["linear_attention"] * 2)).eval()
    with torch.no_grad():
        text = linear(torch.randint(1, 97, (1, 9))).cache.report()
    assert "held" not in text
    assert "keys and values" not in text
