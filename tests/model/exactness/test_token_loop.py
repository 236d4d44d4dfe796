# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The model computes the formulas of the design."""

import pytest
import torch

from ham_hf.configuration_ham import ROUTERS
from tests.model.exactness.token_loop import TokenLoop
from tests.model.exactness.wide_models import MIXED, WIDE, make_model, median_thresholds


@pytest.mark.parametrize("switches", ["default", "bare", "biased", "borrowed", "window"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_model_is_the_design(router, switches, tiny_config):
    overrides = {
        "default": {},
        "bare": {
            "attention_conv": False,
            "qk_norm": False,
            "rnn_output_norm": False,
            "kv_output_norm": False,
            "output_gate": False,
            "rope_parameters": None,
        },
        "biased": {"attention_bias": True, "mlp_bias": True, "value_head_dim": 6, "conv_kernel_size": 2},
        "borrowed": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 7,
            "allow_neg_eigval": True,
            "output_gate": "sigmoid",
            "linear_output_gate": "silu",
            "zero_centered_norms": True,
            "output_norm_eps": 5e-2,
            "qk_norm": "projection",
            "attention_post_norm": True,
        },
        "window": {"attention_window": 5, "attention_sinks": 4},
    }[switches]
    config = tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED, **WIDE, **overrides)
    model = make_model(config)
    ids = torch.randint(1, 97, (1, 40))
    limits = median_thresholds(model, ids)
    loop = TokenLoop(model, {0: limits[0], 3: limits[1]})
    expected = loop.run(ids[0])
    output = model(ids, threshold=limits[:, None])
    assert (output.logits[0] - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
    for layer in (0, 2, 3):
        kept = [x.tolist() for x in output.cache.kept_positions(layer)[0]]
        assert kept == loop.kept_positions[layer]
    usage = output.cache.kept_tokens() / 40
    assert (usage[2] == 1).all()
    assert ((usage[[0, 3]] > 0.05) & (usage[[0, 3]] < 0.95)).all(), "the thresholds must divide the tokens"
