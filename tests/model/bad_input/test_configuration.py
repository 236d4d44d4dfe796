# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A wrong configuration is refused with an error that names the field and tells what it takes."""

import math
import re

import pytest
from huggingface_hub.errors import StrictDataclassError

from ham_hf import HAMConfig, HAMModel
from tests.model.bad_input.refusals import HUGE, NAN, VOCABULARY

SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "value_head_dim max_position_embeddings conv_kernel_size router_hidden_size"
)
SWITCHES = (
    "use_cache tie_word_embeddings attention_bias mlp_bias attention_conv qk_norm rnn_output_norm "
    "output_gate allow_neg_eigval attention_post_norm zero_centered_norms"
)
LINEAR_SHAPE = "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim"
LINEAR = dict(zip(LINEAR_SHAPE.split(), (2, 4, 6, 5), strict=True))


def rope(**overrides):
    return {"rope_type": "default", "rope_theta": 10000.0} | overrides


FIELDS = {
    **{name: [0, -1, 2.0, "4", True, NAN, [4]] for name in SIZES.split()},
    **{name: ["yes", None, 1, 0.0, NAN] for name in SWITCHES.split()},
    "kv_output_norm": ["yes", 1, 0.0, NAN],
    **{name: [0, -1, 2.0, "4", True, NAN, [4], 4] for name in LINEAR_SHAPE.split()},
    "linear_output_gate": ["swish", 1, 0.0, NAN],
    "router_aux_loss_coef": [-0.1, NAN, math.inf, "1", True],
    "output_norm_eps": [0.0, -1.0, NAN, math.inf, "1", True],
    "initializer_range": [0.0, -1.0, NAN, math.inf, "1", None, True],
    "rms_norm_eps": [0.0, -1.0, NAN, math.inf, "1", None, True],
    "target_kv_usage": [
        -0.1,
        1.1,
        NAN,
        math.inf,
        "1",
        True,
        [],
        [0.5],
        [0.5] * 3,
        [0.5, 1.1],
        [0.5, NAN],
        [0.5, True],
        [0.5, "a"],
        [0.5, None],
        (0.5, 0.5),
        {"all": 0.5},
    ],
    "threshold": [
        NAN,
        "1",
        True,
        (0.1, 0.2),
        [0.1],
        [0.1] * 3,
        [],
        [0.1, NAN],
        [0.1, "a"],
        [True, False],
        {"all": 0.1},
    ],
    **{
        name: [-1, 2**40, 2.0, "4", None, True, [4], [4] * 3, [4, -1]]
        for name in ("attention_window", "attention_sinks")
    },
    "threshold_scope": ["heads", None, 3],
    "head_importance": [
        1.0,
        "1",
        [],
        [0.5, 0.5],
        [[0.5, 0.5]],
        [[0.5, 0.5]] * 3,
        [[0.5], [0.5]],
        [[0.5, 0.5], [0.5, -0.1]],
        [[0.5, 0.5], [0.5, NAN]],
        [[0.5, 0.5], [0.5, math.inf]],
        [[0.5, 0.5], [0.5, 2**54]],
        [[0.5, 0.5], [0.5, 10**400]],
        [[0.5, 0.5], [0.5, True]],
        [[0.5, 0.5], [0.5, "a"]],
        [[0.5, 0.5], [0.5, [0.5]]],
        ((0.5, 0.5), (0.5, 0.5)),
        {"0": [0.5, 0.5]},
    ],
    "usage_division": ["heads", "", None, 3],
    "router": ["mlp", "", None, 3],
    "hidden_act": ["no such", None, 3],
    "layer_types": [["hybrid"], ["hybrid"] * 3, [], "hybrid", ["hybrid", "ham"], [1, 2]],
    "rope_parameters": [
        "default",
        [1],
        3.0,
        rope(rope_type="spiral"),
        rope(rope_theta=NAN),
        rope(rope_theta=-1.0),
        rope(rope_theta=0.0),
        rope(rope_theta="x"),
        rope(rope_theta=None),
        rope(rope_type="linear", factor=0.5),
        rope(rope_type="linear", factor=NAN),
        *(rope(partial_rotary_factor=factor) for factor in (0, -0.5, 1.5, NAN, "0.5", True, None)),
        {"hybrid": rope()},
    ],
    "pad_token_id": [-1, VOCABULARY, "a", 1.5, True, [0]],
    "bos_token_id": ["a", 1.5, True],
    "eos_token_id": ["a", 1.5, [1.5], True],
}
TOGETHER = [
    (
        {"target_kv_usage": [0.5, 0.5], "threshold_scope": "model"},
        "write one number, or `threshold_scope='layer'`",
    ),
    ({"num_attention_heads": 3}, "`num_attention_heads` (3) must be a multiple of `num_key_value_heads` (2)"),
    ({"num_key_value_heads": 8}, "`num_attention_heads` (4) must be a multiple of `num_key_value_heads` (8)"),
    ({"head_dim": 7}, "RoPE needs an even `head_dim`, got 7; or set `rope_parameters=None`"),
    (
        {"head_dim": 8, "rope_parameters": rope(partial_rotary_factor=0.4)},
        "`rope_parameters['partial_rotary_factor']` times `head_dim` (8) must be an even number of dimensions, at "
        "least 2, got 3 with 0.4",
    ),
    (
        {"head_dim": 8, "rope_parameters": rope(partial_rotary_factor=0.1)},
        "must be an even number of dimensions, at least 2, got 0 with 0.1",
    ),
    (LINEAR | {"linear_value_head_dim": None}, "must be given all four, or all left None"),
    (
        LINEAR | {"linear_num_key_heads": 3},
        "`linear_num_value_heads` (4) must be a multiple of `linear_num_key_heads` (3)",
    ),
    (LINEAR | {"linear_key_head_dim": 0}, "`linear_key_head_dim` must be at least 1, got 0"),
    ({"qk_norm": "head"}, "`qk_norm` must be True (per head), 'projection' (over all heads at once) or False"),
    ({"output_gate": "swish"}, "`output_gate` must be True, False or one of ('silu', 'sigmoid'), got 'swish'"),
    ({"hidden_size": 2}, "`head_dim` must be at least 1, got 0"),
    ({"num_hidden_layers": 3, "layer_types": ["hybrid"] * 2}, "`num_hidden_layers` (3)"),
    (
        {"layer_types": ["hybrid", "linear_attention"], "threshold": [0.1, 0.2]},
        "`threshold` must have one entry per hybrid layer (1), got 2",
    ),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_configuration_fields(tiny_config, field, value):
    with pytest.raises(StrictDataclassError, match=rf"['`]{field}"):
        tiny_config(**{field: value})


def test_every_configuration_field_has_a_wrong_value():
    assert set(HAMConfig.__annotations__) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_numbers_that_do_not_fit_anywhere(tiny_config, field):
    """No field takes them, and none stumbles over them; infinity fits thresholds alone."""
    for value in (HUGE, -HUGE, 2**63, [HUGE]):
        with pytest.raises(StrictDataclassError, match=rf"`{field}` must fit in 64 bits, got an int of \d+ bits"):
            tiny_config(**{field: value})
    for value in (math.inf, -math.inf, [math.inf]):
        if field != "threshold":
            with pytest.raises(StrictDataclassError, match=rf"['`]{field}"):
                tiny_config(**{field: value})


@pytest.mark.parametrize(("values", "message"), TOGETHER)
def test_configuration_fields_that_do_not_fit_together(tiny_config, values, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        tiny_config(**values)


def test_a_configuration_changed_into_a_wrong_one(tiny_config, tmp_path):
    """A wrong type is refused when it is set; a wrong combination when a model is made of it or when it is saved."""
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="head_dim"):
        config.head_dim = "8"
    assert config.head_dim == 8
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="`num_key_value_heads`"):
        HAMModel(config)
    with pytest.raises(StrictDataclassError, match="`num_key_value_heads`"):
        config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"`rope_parameters\['factor'\]` must be given"):
        tiny_config(rope_parameters=rope(rope_type="linear"))
