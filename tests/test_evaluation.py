# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Calibration makes `kv_usage` mean what it says, and the tables say what was measured."""

import statistics

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import bench, calibrate, usage
from ham_hf.evaluation.calibration import score_quantiles
from ham_hf.evaluation.tables import insert_table
from ham_hf.files import write_whole


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return HAMForCausalLM(tiny_config()).eval()


def batches(count, rows=2, length=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (rows, length), generator=generator) for _ in range(count)]


def test_quantiles_are_those_of_torch():
    scores = torch.rand(501, 3)
    expected = torch.quantile(scores, torch.linspace(0, 1, 65), dim=0).T
    assert torch.allclose(score_quantiles(scores, 65), expected, atol=1e-6)


@pytest.mark.parametrize("kv_usage", [0.1, 0.25, 0.5, 0.9])
def test_a_calibrated_model_keeps_the_fraction_it_is_asked_for(model, kv_usage):
    calibrate(model, batches(4))
    fresh = batches(1, rows=8, seed=2)[0]
    measured = model(fresh, kv_usage=kv_usage, use_cache=True).cache.kv_usage()
    assert abs(measured.mean() - kv_usage) < 0.05, "scores of fresh random tokens are distributed as calibrated"


def test_no_and_full_usage_are_exact(model):
    calibrate(model, batches(1))
    for kv_usage in (0.0, 1.0):
        cache = model(batches(1)[0], kv_usage=kv_usage, use_cache=True).cache
        assert (cache.kv_usage() == kv_usage).all()


def test_calibration_survives_saving_and_leaves_the_mode(model, tmp_path):
    model.train()
    calibrate(model, batches(1))
    assert model.training
    model.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    for ours, theirs in zip(model.model.layers, loaded.model.layers, strict=True):
        assert ours.mixer.score_quantiles.any()
        assert torch.equal(ours.mixer.score_quantiles, theirs.mixer.score_quantiles)


def test_padding_and_labels_do_not_count_in_calibration(model):
    tokens = batches(1)[0]
    calibrate(model, [tokens])
    plain = [layer.mixer.score_quantiles.clone() for layer in model.model.layers]
    padded = torch.cat([torch.zeros_like(tokens[:, :7]), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 7).expand(len(tokens), -1).long()
    calibrate(model, [{"input_ids": padded, "attention_mask": mask, "labels": padded}])
    for before, layer in zip(plain, model.model.layers, strict=True):
        torch.testing.assert_close(layer.mixer.score_quantiles, before, rtol=0, atol=1e-5)


def test_calibration_refuses_what_it_cannot_use(model, tiny_config):
    with pytest.raises(ValueError, match="batches"):
        calibrate(model, [])
    assert not model.model.layers[0].mixer.score_quantiles.any()
    without = HAMForCausalLM(tiny_config(layer_types=["linear_attention"] * 2))
    with pytest.raises(ValueError, match="hybrid"):
        calibrate(without, batches(1))


def test_usage_is_measured_on_the_cache_itself(model):
    calibrate(model, batches(2))
    windows = [x[:1] for x in batches(3, seed=3)]
    result = usage.measure_usage(model, windows, 0.5)
    outputs = [model(x, labels=x, kv_usage=0.5, use_cache=True) for x in windows]
    assert result["loss"] == pytest.approx(statistics.mean(x.loss.item() for x in outputs))
    assert result["usage"] == pytest.approx(statistics.mean(x.cache.kv_usage().mean().item() for x in outputs))
    cache = outputs[0].cache
    assert result["full_kv_bytes"] == cache.full_kv_bytes()
    assert result["state_bytes"] == cache.state_bytes()


def test_recall_is_the_loss_on_a_second_copy(model):
    tokens = batches(1, rows=1, length=80)[0]
    again = tokens.clone()
    again[:, 70:] = tokens[:, :10]
    labels = again.masked_fill(torch.arange(80) < 71, -100)
    expected = model(again, labels=labels, threshold=0.0).loss.item()
    calibrate(model, batches(1))
    assert usage.recall_loss(model, tokens, 1.0) == pytest.approx(expected, rel=1e-5)


def test_usage_table_pairs_windows_and_plot_is_written(model, tmp_path):
    calibrate(model, batches(2))
    windows = [x[:1] for x in batches(3, seed=3)]
    results = [usage.measure_usage(model, windows, x) for x in (0.0, 1.0, None)]
    table = usage.to_markdown(results, 96)
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3
    assert f"| {results[0]['loss']:.4f} |" in rows[0]
    assert f"| {results[0]['recall_loss']:.3f} |" in rows[0]
    assert "+0.0000 ± 0.0000" in rows[1], "everything kept is compared with itself"
    assert rows[2].startswith("| learned |")
    pytest.importorskip("matplotlib")
    usage.plot(results, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


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


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "table.md"
    write_whole(target, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, "new")
    assert target.read_text() == "old"
