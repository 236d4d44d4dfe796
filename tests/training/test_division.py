# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Healing with one quota for the model starts where heads share the target by their importance."""

import pytest
import torch

from ham_hf.training.control import UsageMeter, UsageSchedule
from ham_hf.training.recipe import read_recipe
from ham_hf.training.setup import build_model, load_tokenizer, start_from_division
from tests.cli.calls import byte_tokenizer, save, tiny_model

IMPORTANCE = [[0.0, 3.0], [1.0, 0.0], [0.5, 0.0]]
RECIPE = """\
output: {folder}/out
model: {{from: {folder}/ham}}
data: {{files: {folder}/text.txt}}
steps: 3
context: 32
usage: {{{usage}}}
"""


def converted(**changes):
    """A model that keeps everything and is calibrated, as `ham-hf calibrate` leaves a converted one."""
    settings = {"threshold_scope": "model", "head_importance": IMPORTANCE, "router": "random", "target_kv_usage": 1.0}
    model = tiny_model(259, **(settings | changes))
    for layer in model.model.layers:
        layer.mixer.threshold.data.zero_()
        layer.mixer.score_quantiles.copy_(torch.linspace(0, 1, 65))
    return model


def thresholds_of(model):
    return torch.stack([layer.mixer.threshold.detach() for layer in model.model.layers])


@pytest.mark.parametrize("usage", ["target: 0.5", "schedule: [[0, 0.5], [3, 0.1]], freeze_steps: 2"])
def test_a_recipe_starts_from_the_division(tmp_path, usage):
    save(tmp_path / "ham", byte_tokenizer(), converted())
    (tmp_path / "text.txt").write_text("Not read.")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, usage=usage))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    model = build_model(recipe, load_tokenizer(recipe))
    # Two of six heads keep everything, and the others a quarter.
    expected = torch.tensor([[0.75, 0], [0, 0.75], [0.75, 0.75]])
    torch.testing.assert_close(thresholds_of(model), expected)
    with UsageMeter(model.train()) as meter:
        model(torch.randint(1, 259, (1, 2000)))
    assert meter.read()["usage"].mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "changes",
    [{"threshold_scope": "head"}, {"threshold_scope": "layer"}, {"head_importance": None}, {"usage_division": "even"}],
    ids=str,
)
def test_other_scopes_and_an_even_division_change_nothing(changes):
    model = converted(**changes)
    start_from_division(model, UsageSchedule(((0, 0.5),)))
    assert not thresholds_of(model).any()


def test_held_trained_and_uncalibrated_thresholds_stay():
    model = converted()
    start_from_division(model, None)
    assert not thresholds_of(model).any()
    model.model.layers[1].mixer.threshold.data[0] = 0.3
    before = thresholds_of(model)
    start_from_division(model, UsageSchedule(((0, 0.5),)))
    assert torch.equal(thresholds_of(model), before), "trained before"
    model = converted()
    model.model.layers[2].mixer.score_quantiles.zero_()
    start_from_division(model, UsageSchedule(((0, 0.5),)))
    assert not thresholds_of(model).any()


def test_training_keeps_the_division():
    """The gradient of one quota moves all heads alike, so the order of what they keep stays."""
    model = converted(target_kv_usage=0.25).train()
    start_from_division(model, UsageSchedule(((0, 0.5),)))
    optimizer = torch.optim.SGD([layer.mixer.threshold for layer in model.model.layers], lr=0.2)
    for _ in range(50):
        ids = torch.randint(1, 259, (2, 200))
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        model.zero_grad()
    thresholds = thresholds_of(model)
    important = thresholds[[0, 1], [1, 0]]
    others = thresholds[[0, 1, 2, 2], [0, 1, 0, 1]]
    assert important.max() < others.min() - 0.3
    assert (1 - thresholds.clamp(0, 1)).mean().item() == pytest.approx(0.25, abs=0.05), "of uniform scores"
