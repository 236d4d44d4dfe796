# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer with two processes, which steers usage: the curve, the weights and the checkpoint of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ham_hf import HAMForCausalLM

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("trainer_run.py")
WAYS = ["DDP", "FSDP2", "FSDP2 of Transformers", "TP"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, launch, tiny_config) -> dict[str, tuple[dict[str, Any], Path]]:
    """Of every way: what it logged, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("runs")
    model = HAMForCausalLM(tiny_config(router="learned_error"))
    for layer in model.model.layers:
        layer.mixer.router.down_proj.bias.data.sub_(0.5)  # so that some tokens are kept, and some are not
    model.save_pretrained(folder / "source")
    found = {}
    for way in ["one", *WAYS]:
        printed = launch(PROGRAM, way, folder / "source", folder / way, processes=1 if way == "one" else 2)
        found[way] = json.loads(printed.splitlines()[-1]), folder / way
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_that_of_one_process(runs, way):
    """DDP and FSDP2 were interrupted half-way, and resumed."""
    expected, got = runs["one"][0], runs[way][0]
    assert len(got["loss"]) == 6
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_one_process_in_an_ordinary_checkpoint(runs, way):
    expected, got = (load_file(runs[name][1] / "final" / "model.safetensors") for name in ("one", way))
    start = load_file(runs["one"][1].parent / "source" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, weights in expected.items():
        moved = (weights - start[name]).abs().max()
        assert moved > 0 or name.endswith("score_quantiles"), name
        assert (weights - got[name]).abs().max() <= 0.02 * moved + 1e-6, name
    HAMForCausalLM.from_pretrained(runs[way][1] / "final")


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_a_threshold_of_the_configuration_takes_no_part(runs, way, launch, tmp_path):
    """Nobody waits for its gradient, and a resumed optimizer has no state of it."""
    start = HAMForCausalLM.from_pretrained(runs["one"][1].parent / "source", threshold=0.45)
    start.save_pretrained(tmp_path / "source")
    printed = launch(PROGRAM, way, tmp_path / "source", tmp_path / "out")
    assert len(json.loads(printed.splitlines()[-1])["loss"]) == 6
    trained = HAMForCausalLM.from_pretrained(tmp_path / "out" / "final")
    for before, after in zip(start.model.layers, trained.model.layers, strict=True):
        assert not torch.equal(before.mixer.q_proj.weight, after.mixer.q_proj.weight)
        assert torch.equal(before.mixer.threshold, after.mixer.threshold)


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_a_checkpoint_on_the_way_is_an_ordinary_one_too(runs, way):
    HAMForCausalLM.from_pretrained(runs[way][1] / "checkpoint-3")
