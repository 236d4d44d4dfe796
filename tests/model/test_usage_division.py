# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`kv_usage` is divided over heads by importance: the important keep everything, and the mean is what was asked."""

import math

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.routing_ham import usage_shares, usage_threshold

USAGES = [0.0, 1e-9, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.99, 1.0]


@pytest.fixture
def config_of(tiny_config):
    """A function that makes a configuration of `importance`, a list of numbers a hybrid layer."""

    def make(importance, **overrides):
        heads = len(importance[0])
        shape = {"num_attention_heads": 2 * heads, "num_key_value_heads": heads, "hidden_size": 8 * heads}
        return tiny_config(num_hidden_layers=len(importance), head_importance=importance, **(shape | overrides))

    return make


def random_importance(layers, heads):
    return torch.rand(layers, heads).tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 3), (30, 3), (4, 8)])
def test_the_mean_is_what_was_asked_and_every_share_a_fraction(config_of, size):
    config = config_of(random_importance(*size))
    for kv_usage in USAGES:
        shares = usage_shares(config, kv_usage)
        assert shares.shape == size
        assert shares.mean().item() == pytest.approx(kv_usage, abs=1e-12)
        assert ((shares >= 0) & (shares <= 1)).all()
    assert (usage_shares(config, 0.0) == 0).all(), "nothing, exactly"
    assert (usage_shares(config, 1.0) == 1).all(), "everything, exactly"


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (30, 3)])
def test_every_share_grows_steadily(config_of, size):
    config, steps = config_of(random_importance(*size)), 2000
    before = usage_shares(config, 0.0)
    heads = math.prod(size)
    for step in range(1, steps + 1):
        shares = usage_shares(config, step / steps)
        assert (shares >= before).all()
        # The steepest is the head at the border, which passes from u**2 to 1 while the border moves by one head.
        assert (shares - before).max() < 2 * heads / steps
        before = shares


def test_the_most_important_heads_keep_everything_and_the_others_alike(config_of):
    config = config_of([[3.0, 0.0], [1.0, 7.0], [2.0, 0.5]])
    shares = usage_shares(config, 0.5)  # two heads of six, and a quarter of the others
    assert torch.equal(shares, torch.tensor([[1, 0.25], [0.25, 1], [0.25, 0.25]], dtype=torch.float64))
    quarter = usage_shares(config, 0.25)  # 1.2 heads, and a sixteenth
    assert quarter[1, 1] == 1
    assert quarter[0, 0].item() == pytest.approx(0.2 + 0.8 / 16)
    assert (quarter.flatten()[[1, 2, 4, 5]] == 1 / 16).all()


def test_of_equals_the_first_comes_first(config_of):
    shares = usage_shares(config_of([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), 0.5)
    assert torch.equal(shares, torch.tensor([[0.25, 1], [1, 0.25], [0.25, 0.25]], dtype=torch.float64))


def test_one_head_keeps_what_is_asked(config_of):
    for kv_usage in USAGES:
        assert usage_shares(config_of([[0.3]]), kv_usage).item() == pytest.approx(kv_usage, abs=1e-15)


@pytest.mark.parametrize(
    "overrides", [{"head_importance": None}, {"usage_division": "even"}], ids=["unmeasured", "switched off"]
)
def test_an_even_division_has_the_thresholds_of_one_usage(config_of, overrides):
    """Bit for bit those of a number, and of the formula for one quantile after another."""
    config = config_of(random_importance(3, 2))
    for name, value in overrides.items():
        setattr(config, name, value)
    quantiles = torch.rand(3, 2, 65).sort(-1).values
    for kv_usage in [*USAGES, *torch.rand(50).tolist()]:
        assert (usage_shares(config, kv_usage) == kv_usage).all()
        found = usage_threshold(quantiles, usage_shares(config, kv_usage))
        assert torch.equal(found, usage_threshold(quantiles, kv_usage))
        if 0 < kv_usage < 1:
            level = (1 - kv_usage) * 64
            low = min(math.floor(level), 63)
            assert torch.equal(found, torch.lerp(quantiles[..., low], quantiles[..., low + 1], level - low))


def test_each_head_has_the_threshold_of_its_share():
    quantiles = torch.rand(3, 2, 65).sort(-1).values
    shares = torch.tensor([[0.0, 1.0], [0.25, 0.5], [1e-9, 0.999]], dtype=torch.float64)
    thresholds = usage_threshold(quantiles, shares)
    assert thresholds.dtype == torch.float32
    for layer in range(3):
        for head in range(2):
            assert thresholds[layer, head] == usage_threshold(quantiles[layer, head], shares[layer, head].item())


def test_a_model_keeps_by_importance_and_all_of_it_at_the_ends(tiny_config):
    layer_types, importance = ["hybrid", "linear_attention", "hybrid"], [[0.1, 5.0], [0.0, 2.0]]
    config = tiny_config(num_hidden_layers=3, layer_types=layer_types, head_importance=importance)
    model = HAMForCausalLM(config).eval()
    quantiles = torch.linspace(0.4, 0.6, 65).expand(2, -1)
    for layer in (model.model.layers[0], model.model.layers[2]):
        layer.mixer.score_quantiles.copy_(quantiles)
    ids = torch.randint(1, 97, (2, 50))
    for kv_usage in (0.0, 1.0):
        held = model(ids, use_cache=True, kv_usage=kv_usage).cache.kv_usage()[[0, 2]]
        assert (held == kv_usage).all()
    rules = model.model.retention(2, kv_usage=0.5)
    assert rules[1].threshold is None
    assert rules[0].threshold.shape == (1, 2)
    # A third of four heads: the first whole, and a third of the second.
    assert rules[0].threshold[0, 1] == 0
    others = [rules[0].threshold[0, 0], rules[2].threshold[0, 0]]
    assert others == [usage_threshold(quantiles[:1], 0.25)[0]] * 2
    assert rules[2].threshold[0, 1] == usage_threshold(quantiles[:1], 0.25 + 0.75 / 3)[0]
