# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""vLLM's engine answers as `generate` does: every kind of layer, router and memory, in batches of unlike requests."""

from pathlib import Path

import pytest
import torch

import ham_hf
from ham_hf import HAMForCausalLM
from tests.serving.vllm.engine import generated, prompt, small_model

CHECKPOINT = Path(ham_hf.__file__).parent / "checkpoints" / "ham-tiny"
# Lengths of prompts around the borders of pages (16 tokens) and of chunks (64 tokens of all requests of a step).
LENGTHS = (1, 3, 15, 16, 17, 30, 64, 77, 100)
THRESHOLDS = (0.0, 0.4, 2.0, 0.45, 0.5, None)

MODELS = {
    "paper": {},
    "window and sinks": {"attention_window": 9, "attention_sinks": 2},
    "window without sinks, learned router": {"attention_window": 5, "router": "learned"},
    "no positions, l2": {"rope_parameters": None, "router": "l2"},
    "every kind of layer": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "hybrid", "full_attention"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
    },
    "no short convolution before attention": {
        "layer_types": ["full_attention", "hybrid"],
        "attention_conv": False,
        "value_head_dim": 12,
        "tie_word_embeddings": True,
        "router": "residual",
    },
    "only recurrent layers": {"layer_types": ["linear_attention"] * 2},
    "random, norms behind": {"router": "random", "attention_post_norm": True, "qk_norm": "projection"},
    "learned with error, a window in one layer": {"router": "learned_error", "attention_window": [0, 20]},
}


def requests(thresholds=THRESHOLDS, length=20, **routing):
    """Requests of all lengths, each with the next of the thresholds."""
    asked = [{} if x is None else {"threshold": x} for x in thresholds]
    return [(prompt(n), length, asked[i % len(asked)] | routing) for i, n in enumerate(LENGTHS)]


def expected(model, asked):
    return [generated(model, tokens, length, **routing) for tokens, length, routing in asked]


# An engine takes seconds to start.
QUICK = ("paper", "window and sinks", "every kind of layer", "no short convolution before attention")


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in MODELS])
def test_each_model_answers_as_generate_does(engines, name):
    model = small_model(**MODELS[name])
    engine, asked = engines(model), requests()
    assert engine.answers(asked) == expected(model, asked)
    assert engine.lost_blocks == 0
    assert not engine.manager.lives


@pytest.mark.parametrize("window", [7, pytest.param(0, marks=pytest.mark.slow)])
def test_a_budget_a_usage_and_a_threshold_run_side_by_side(engines, window):
    model = small_model(attention_window=window, attention_sinks=2)
    asked = requests(kv_budget=20)
    asked += requests(length=10)
    asked += [(prompt(n, seed=1), 30, {"kv_usage": 0.3}) for n in (5, 40, 90)]
    asked += [(prompt(n, seed=2), 30, {"kv_usage": 0.5, "kv_budget": 33}) for n in (5, 40, 90)]
    engine = engines(model, max_num_batched_tokens=48)
    assert engine.answers(asked) == expected(model, asked)
    assert engine.lost_blocks == 0


@pytest.mark.parametrize("chunk", [23, pytest.param(16, marks=pytest.mark.slow)])
def test_prompts_may_be_cut_anywhere(engines, chunk):
    model = small_model(attention_window=6, attention_sinks=1, layer_types=["hybrid", "full_attention"])
    engine, asked = engines(model, max_num_batched_tokens=chunk), requests()
    assert engine.answers(asked) == expected(model, asked)


def test_a_preempted_request_starts_again_and_answers_the_same(engines, monkeypatch):
    model = small_model()
    asked = [(prompt(40, seed), 100, {"threshold": x}) for seed, x in enumerate([0.0, 0.1, 0.0, 0.45, 0.0, 2.0])]
    engine = engines(model, num_gpu_blocks_override=14)
    preempted = []
    preempt = engine.scheduler._preempt_request

    def noted(request, *args, **kwargs):
        preempted.append(request)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", noted)
    assert engine.answers(asked) == expected(model, asked)
    assert preempted
    assert engine.lost_blocks == 0


@pytest.mark.slow
def test_more_requests_fit_where_less_is_kept(engines):
    model = small_model(num_hidden_layers=4, num_key_value_heads=4)
    engine = engines(model, num_gpu_blocks_override=40)
    most = {}
    for threshold in (0.0, 2.0):
        for n in range(8):
            engine.add(f"{threshold} {n}", prompt(100, n), 60, threshold=threshold)
        running = []
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            running.append(len(engine.manager.lives))
        most[threshold] = max(running[-40:])
    assert most[2.0] >= 2 * most[0.0], most
    assert engine.lost_blocks == 0


def test_a_cancelled_request_gives_its_blocks_back_and_disturbs_no_other(engines):
    model = small_model()
    engine = engines(model)
    asked = {f"request {n}": (prompt(30 + n, n), 40, {"threshold": 0.3}) for n in range(6)}
    for name, (tokens, length, routing) in asked.items():
        engine.add(name, tokens, length, **routing)
    answers = {}
    for step in range(200):
        if step == 5:
            engine.llm.llm_engine.abort_request(["request 1", "request 4"])
        for output in engine.llm.llm_engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        if not engine.llm.llm_engine.has_unfinished_requests():
            break
    for name in ("request 0", "request 2", "request 3", "request 5"):
        tokens, length, routing = asked[name]
        assert answers[name] == generated(model, tokens, length, **routing)
    assert engine.lost_blocks == 0
    assert not engine.manager.lives
    assert not engine.manager.expectations


def test_defaults_come_from_the_server_then_from_the_checkpoint(engines):
    model = small_model()
    model.generation_config.threshold = 0.45
    model.generation_config.kv_budget = 25
    tokens = prompt(90)
    asked = [(tokens, 20, {}), (tokens, 20, {"threshold": 0.0}), (tokens, 20, {"kv_usage": 0.4, "kv_budget": 60})]
    engine = engines(model)
    assert engine.answers(asked) == expected(model, asked)
    engine = engines(model, additional_config={"ham": {"kv_budget": 40, "threshold": 0.35}})
    assert engine.answers(asked[:1]) == [generated(model, tokens, 20, threshold=0.35, kv_budget=40)]


@pytest.mark.slow
def test_the_threshold_of_a_configuration_hides_that_of_generation(engines):
    model = small_model(threshold=0.35)
    model.generation_config.threshold = 2.0
    asked = [(prompt(90), 20, {}), (prompt(50), 20, {"threshold": 2.0})]
    assert engines(model).answers(asked) == expected(model, asked)


def test_low_precision_answers_as_generate_at_low_precision(engines, tmp_path):
    small_model().save_pretrained(tmp_path)
    model = HAMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    # One request at a time: sums of bfloat16 in another order differ by enough to choose another token.
    engine = engines(model, dtype="bfloat16")
    for tokens, length, routing in requests(length=12):
        assert engine.answers([(tokens, length, routing)]) == [generated(model, tokens, length, **routing)]


def test_the_embedded_checkpoint_answers_in_words(engines):
    model = HAMForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    engine = engines(CHECKPOINT, max_model_len=512)
    tokenizer = engine.llm.get_tokenizer()
    texts = ["The little dog", "Once upon a time there was a girl who had a red ball. She"]
    asked = [(tokenizer(text)["input_ids"], 24, {"kv_usage": usage}) for text in texts for usage in (0.25, 1.0)]
    assert engine.answers(asked) == expected(model, asked)
