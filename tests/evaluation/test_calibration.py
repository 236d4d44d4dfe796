# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Calibration makes `kv_usage` mean what it says, and the tables say what was measured."""

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.evaluation.calibration import score_quantiles
from ham_hf.evaluation.markdown import row, table
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


def test_a_table_has_its_columns_a_rule_and_its_rows():
    assert table(["a", "b"], [["x", 1], ("", 2.5)]) == "| a | b |\n|---|---|\n| x | 1 |\n|  | 2.5 |"
    assert row(["x", 1]) == "| x | 1 |"


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "table.md"
    write_whole(target, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, "new")
    assert target.read_text() == "old"
