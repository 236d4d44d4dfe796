# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Routing arguments of requests: what is refused, and by which words; what is expected of those that are not."""

import re
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from ham_hf import HAMConfig
from ham_hf.serving.vllm.requests import HAMArguments, Served, expected_usage, routing_of
from tests.serving.vllm.engine import SMALL, small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model(attention_window=4, attention_sinks=2).save_pretrained(folder)
    return folder


@pytest.fixture
def served(folder, monkeypatch):
    """A checkpoint with calibrated scores, a window and sinks."""
    served = Served(HAMConfig.from_pretrained(folder), {}, str(folder))
    monkeypatch.setattr(HAMArguments, "served", served)
    return served


def validate(**arguments):
    HAMArguments.validate_params(SimpleNamespace(extra_args=arguments or None))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"threshold": 0.4},
        {"threshold": 2},
        {"threshold": [0.1, 0.9]},
        {"kv_usage": 0},
        {"kv_usage": 0.25, "kv_budget": 7},
        {"threshold": None, "kv_usage": 1.0},
        {"kv_transfer_params": {}},
    ],
)
def test_what_generate_takes_is_taken(served, arguments):
    validate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": "0.4"}, "`threshold` is '0.4' of type str"),
        ({"threshold": True}, "`threshold` is True"),
        ({"threshold": float("nan")}, "`threshold` must not be NaN"),
        ({"threshold": [0.1]}, "`threshold` has 1 entries"),
        ({"kv_usage": 1.5}, "`kv_usage` must be a number between 0 and 1"),
        ({"kv_usage": "all"}, "`kv_usage` must be a number"),
        ({"kv_budget": 0}, "`kv_budget` must be a positive int"),
        ({"kv_budget": 0.5}, "`kv_budget` must be a positive int"),
        ({"kv_budget": 6}, "`kv_budget` must exceed the window and the sinks"),
        ({"threshold": 0.1, "kv_usage": 0.5}, "at most one of `threshold` and `kv_usage`"),
        ({"treshold": 0.1}, "got 'treshold'. Is `threshold` meant?"),
        ({"seed": 1}, "takes threshold, kv_usage, kv_budget, got 'seed'"),
    ],
)
def test_a_bad_argument_is_refused_with_the_words_of_the_model(served, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        validate(**arguments)


def test_a_usage_needs_a_calibrated_checkpoint(tmp_path):
    model = small_model()
    for layer in model.model.layers:
        layer.mixer.score_quantiles.zero_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`kv_usage` needs score quantiles"):
        Served(model.config, {}, str(tmp_path)).check({"kv_usage": 0.5})


def test_a_checkpoint_without_quantiles_is_not_calibrated(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("score_quantiles") for name in weights)
    kept = {name: x for name, x in weights.items() if not name.endswith("score_quantiles")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`kv_usage` needs score quantiles"):
        Served(model.config, {}, str(tmp_path)).check({"kv_usage": 0.5})
    Served(model.config, {}, str(tmp_path)).check({"threshold": 0.5})


def test_quantiles_are_those_of_the_model(served, folder):
    model = small_model(attention_window=4, attention_sinks=2)
    for layer, quantiles in zip(model.model.layers, served.quantiles, strict=True):
        assert layer.mixer.score_quantiles.equal(quantiles)


def test_arguments_of_other_logits_processors_pass_where_there_are_some(served):
    served.takes_others = True
    validate(seed=1, threshold=0.1)
    with pytest.raises(ValueError, match="`kv_budget`"):
        validate(seed=1, kv_budget=-1)


def test_a_request_hides_the_servers_defaults():
    defaults = {"threshold": 0.3, "kv_budget": 64}
    assert routing_of(None, defaults) == defaults
    assert routing_of({"kv_usage": 0.5, "other": 1}, defaults) == {"kv_usage": 0.5, "kv_budget": 64}
    assert routing_of({"kv_budget": 8}, defaults) == {"threshold": 0.3, "kv_budget": 8}


@pytest.mark.parametrize(
    ("routing", "usage"),
    [
        ({}, 0.3),
        ({"kv_usage": 0.7}, 0.7),
        ({"threshold": 0.0}, 1.0),
        ({"threshold": [0.0, -1.0]}, 1.0),
        ({"threshold": 1.5}, 0.0),
        ({"threshold": 0.4}, 0.3),
        ({"threshold": [0.0, 2.0]}, 0.3),
    ],
)
def test_a_request_is_expected_to_keep_what_it_asks_for(routing, usage):
    assert expected_usage(HAMConfig(**SMALL, target_kv_usage=0.3), routing) == usage


def test_a_list_of_no_thresholds_asks_for_nothing():
    config = HAMConfig(**SMALL | {"layer_types": ["linear_attention"] * SMALL["num_hidden_layers"]})
    assert expected_usage(config, {"threshold": []}) == expected_usage(config, {})


def test_thresholds_without_a_target_may_keep_everything():
    assert expected_usage(HAMConfig(**SMALL, target_kv_usage=None), {}) == 1.0
    assert expected_usage(HAMConfig(**SMALL, target_kv_usage=[0.2, 0.4]), {}) == pytest.approx(0.3)
    assert expected_usage(HAMConfig(**SMALL, threshold=2.0), {}) == 0.0
