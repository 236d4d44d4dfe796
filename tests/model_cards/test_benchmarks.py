# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks compare in pairs and at the usage they name, and tables reach the documents."""

import pytest
import torch

from model_cards.benchmarks import bench, window
from model_cards.benchmarks.tables import insert_table


def test_speeds_are_paired_and_the_slower_one_is_named():
    summary = bench.summarise([(1.0, 2.0), (2.0, 3.0), (1.0, 0.5)])
    assert summary["speedup"] == 1.5
    assert (summary["speedup_min"], summary["speedup_max"]) == (0.5, 2.0)
    assert (summary["ham_seconds"], summary["other_seconds"]) == (1.0, 2.0)


def test_benchmark_alternates_after_one_warm_up():
    calls = []
    pairs = bench.alternate(lambda: calls.append("a"), lambda: calls.append("b"), runs=3)
    assert "".join(calls) == "ab" * 4
    assert len(pairs) == 3


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}


def test_several_rows_are_measured_at_once(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(bench.SHAPE, name, value)
    monkeypatch.setattr(bench, "build_qwen3_next", bench.build_llama)
    ham = bench.build_ham(2)
    prefill = bench.bench_prefill(ham, 64, 0.5, rows=3, runs=1)
    whole = bench.bench_prefill(ham, 64, 0.5, rows=3, runs=1, logits_to_keep=0)
    assert whole["what"] == "prefill of 64 tokens at 50% usage and logits of all, against Qwen3-Next"
    decode = bench.bench_decode(ham, 64, 0.5, rows=3, runs=1, steps=2)
    # The warm-up and one run of two steps each: keys and values of two layers with two heads of 8 in float32.
    assert decode["other_cache_bytes"] == 3 * (64 + 4) * 2 * 2 * 2 * 8 * 4
    table = bench.to_markdown([prefill, decode], {})
    assert table.count(" | 2 | 3 | ") == 2, table


def test_a_window_is_compared_with_as_many_tokens_held_without_one(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(window.SHAPE, name, value)
    monkeypatch.setattr(window, "LENGTH", 400)
    monkeypatch.setattr(window, "STEPS", 1)
    results = window.compare(2, 0.5, 1, torch.get_num_threads())
    assert [x["what"] for x in results] == ["prefill of 400 tokens", "decoding after 400 tokens"]
    for result in results:
        assert result["held"] == pytest.approx([0.5, 0.5], abs=0.07)
        assert result["speedup"] > 0
    lines = window.to_markdown([results[0] | {"speedup": 1.25, "held": [0.5, 0.25]}], {"torch": "1"}).splitlines()
    assert lines[2].startswith("| prefill of 400 tokens | 2 | 50.0% and 25.0% | 1.25 |")


def test_training_is_measured_at_the_wanted_usage(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(bench.SHAPE, name, value)
    # Where another test has loaded flash-linear-attention, Transformers sends Qwen3-Next there, which needs a GPU.
    monkeypatch.setattr(bench, "build_qwen3_next", bench.build_llama)
    torch.manual_seed(0)
    ham = bench.build_ham(2)
    with torch.no_grad():
        learned_at_first = ham(bench.random_tokens(512)).cache.kv_usage().mean().item()
    result = bench.bench_training(ham, 128, 0.25, runs=1)
    with torch.no_grad():
        usage = ham(bench.random_tokens(512)).cache.kv_usage().mean().item()
    assert abs(learned_at_first - 0.25) > 0.1 > abs(usage - 0.25)
    assert result["ham_seconds"] > 0
    assert not ham.training, "the next comparison is one of inference"
    assert ham.lm_head.weight.grad is None


def test_memory_has_a_table_of_its_own():
    results = [{"what": "step", "kv_heads": 2, "ham_peak_bytes": 3 << 20, "other_peak_bytes": 2 << 20}]
    assert "| step | 2 | 3 | 2 | 1.50 |" in bench.to_markdown(results, {})


def test_tables_replace_what_stands_between_their_markers():
    document = "head\n<!-- x:begin -->\nold\n<!-- x:end -->\ntail\n"
    assert insert_table(document, "x", "| new |\n") == "head\n<!-- x:begin -->\n| new |\n<!-- x:end -->\ntail\n"
    with pytest.raises(ValueError, match="y:begin"):
        insert_table(document, "y", "")
