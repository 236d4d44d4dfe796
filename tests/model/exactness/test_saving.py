# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A saved model comes back bit by bit."""

import itertools

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.configuration_ham import ROUTERS
from tests.model.exactness.wide_models import MIXED, WIDE, make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_model_comes_back_bit_equal(router, dtype, tiny_config, tmp_path):
    config = tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED, attention_bias=True, **WIDE)
    model = make_model(config)
    for layer in model.model.layers:
        mixer = layer.mixer
        if mixer.layer_type == "hybrid":
            mixer.threshold.data.uniform_(0.3, 0.7)
            mixer.score_quantiles.copy_(torch.rand_like(mixer.score_quantiles).sort(-1).values)
    model.save_pretrained(tmp_path / "first")
    model = HAMForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype).eval()
    model.save_pretrained(tmp_path / "second")
    loaded = HAMForCausalLM.from_pretrained(tmp_path / "second", dtype=dtype).eval()

    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        assert state[name].dtype == x.dtype, name
        assert torch.equal(state[name], x), name
    single = ("threshold", "A_log", "dt_bias", "score_quantiles")
    assert all(state[name].dtype == torch.float32 for name in state if name.endswith(single))
    assert {name.rsplit(".", 1)[-1] for name in state if name.endswith(single)} == set(single)
    assert state["lm_head.weight"].dtype == dtype
    different = {"_name_or_path"}
    mine, theirs = loaded.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in mine.items() if k not in different} == {
        k: v for k, v in theirs.items() if k not in different
    }

    ids = torch.randint(1, 97, (2, 30))
    usage = [] if router == "recency" else [{"kv_usage": 0.3}]
    for arguments in ({}, {"threshold": 0.4}, *usage, {"kv_budget": 3}):
        actual, wanted = (m(ids, output_routing_scores=True, **arguments) for m in (loaded, model))
        assert torch.equal(actual.logits, wanted.logits)
        assert all(torch.equal(x, y) for x, y in zip(actual.routing_scores, wanted.routing_scores, strict=True))
        for layer, (row, head) in itertools.product((0, 2, 3), itertools.product(range(2), range(2))):
            kept = [m.cache.kept_positions(layer)[row][head] for m in (actual, wanted)]
            assert torch.equal(*kept)
