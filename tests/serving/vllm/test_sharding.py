# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Heads divided over two workers: the parts of a model add up to it, and two processes answer as one."""

import re
from types import SimpleNamespace

import pytest
import torch

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.serving.vllm.connector import Reports
from ham_hf.serving.vllm.manager import Report
from ham_hf.serving.vllm.sharding import Shard
from tests.serving.vllm.engine import SMALL, generated, prompt, small_model

MODELS = {
    "random": {"router": "random", "attention_bias": True, "mlp_bias": True},
    "every kind of layer, learned": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "hybrid", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "router": "learned_error",
        "attention_window": 4,
    },
}


def parts_of(model, size):
    """The parts of a model for each worker, which add up their outputs when they run in step."""
    parts = []
    for rank in range(size):
        shard = Shard(rank, size)
        part = HAMForCausalLM(shard.config(model.config)).eval()
        state = {name: shard.part(name, x, model.config) for name, x in model.state_dict().items()}
        part.load_state_dict(state)
        for layer in part.model.layers:
            if layer.mixer.layer_type == "hybrid":
                layer.mixer.router.layer_idx = layer.mixer.layer_idx * size + rank
        parts.append(part)
    return parts


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_of_parts_add_up(name):
    model = small_model(**MODELS[name])
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    parts, hidden = parts_of(model, 2), torch.randn(2, 40, 32)
    positions = torch.arange(40).expand(2, -1)
    for n, layer in enumerate(model.model.layers):
        arguments = {
            "position_embeddings": model.model.rotary_emb(hidden, positions),
            "tokens": SimpleNamespace(positions=positions, real=None, seq_idx=None, past_real=None),
        }
        arguments["retention"] = model.model.retention(2, threshold=0.4)[n]
        mixed = sum(part.model.layers[n].mixer(hidden, **arguments)[0] for part in parts)
        # Sums of float32 in another order: measured up to 1e-5 for outputs of size 10.
        torch.testing.assert_close(mixed, layer.mixer(hidden, **arguments)[0], atol=1e-4, rtol=1e-4)
        mlp = sum(part.model.layers[n].mlp(hidden) for part in parts)
        torch.testing.assert_close(mlp, layer.mlp(hidden), atol=1e-4, rtol=1e-4)


def test_one_worker_has_the_model_as_it_is():
    config = HAMConfig(**SMALL)
    assert Shard(0, 1).config(config) is config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 1}, "must divide `num_key_value_heads`, 1 in this model; got 2"),
        ({"intermediate_size": 47}, "must divide `intermediate_size`, 47 in this model"),
        ({"qk_norm": "projection"}, "must be 1 with `qk_norm='projection'`"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Shard(0, 2).config(HAMConfig(**(SMALL | changes)))


def test_reports_of_two_workers_become_one():
    ours, theirs = Reports({1: Report(9, 4, 2, 30), 2: Report(1, 1, 1, 1)}), Reports({1: Report(9, 3, 3, 20)})
    assert ours.aggregate(theirs).kept == {1: Report(9, 4, 3, 50), 2: Report(1, 1, 1, 1)}


@pytest.mark.slow
def test_two_processes_answer_as_generate_does(engines):
    model = small_model(head_importance=[[1.0, 2.0], [4.0, 3.0]], attention_window=5)
    thresholds = [{"threshold": 0.0}, {"threshold": 0.42}, {"kv_usage": 0.4}, {}, {"kv_budget": 25}]
    asked = [(prompt(n, n), 20, thresholds[n % 5]) for n in (1, 16, 17, 33, 64, 90)]
    engine = engines(model, tensor_parallel_size=2)
    assert engine.manager.kv_cache_spec.hybrid_streams == 2, "one head of each layer in each process"
    assert engine.answers(asked) == [generated(model, tokens, n, **routing) for tokens, n, routing in asked]
    assert engine.lost_blocks == 0
