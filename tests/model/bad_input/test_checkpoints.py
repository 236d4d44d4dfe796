# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A broken or foreign checkpoint is refused with an error that names what is wrong."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ham_hf import HAMForCausalLM
from tests.model.bad_input.refusals import NAN


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    model.save_pretrained(folder)
    return folder


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def widen_threshold(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mixer.threshold"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        OSError,
        r"no file named model\.safetensors",
    ),
    "cut weights": (cut_weights, ValueError, "is not a whole safetensors file"),
    "foreign weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"foreign"),
        ValueError,
        "is not a whole safetensors file",
    ),
    "a wrong shape": (widen_threshold, RuntimeError, "mismatched_sizes"),
    "another width": (edit_config(hidden_size=64), RuntimeError, "mismatched_sizes"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), OSError, r"config\.json' is not a valid JSON file"),
    "a wrong type": (edit_config(conv_kernel_size="4"), StrictDataclassError, "conv_kernel_size"),
    "a wrong value": (edit_config(router="mlp"), StrictDataclassError, "`router` must be one of"),
    "a wrong length": (edit_config(num_hidden_layers=3), StrictDataclassError, "num_hidden_layers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(checkpoint, tmp_path, caplog, case):
    damage, error, message = BROKEN[case]
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    HAMForCausalLM.from_pretrained(folder)
    damage(folder)
    for auto in (HAMForCausalLM, AutoModelForCausalLM):
        with pytest.raises(error, match=message):
            auto.from_pretrained(folder)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "nothing"))):
        HAMForCausalLM.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": "0.5"}, StrictDataclassError, "threshold"),
        ({"threshold": [0.5]}, ValueError, r"`threshold` must have one entry per hybrid layer \(2\), got 1"),
        ({"threshold": NAN}, ValueError, "`threshold` must not be NaN"),
        ({"target_kv_usage": 2.0}, ValueError, "`target_kv_usage` must be between 0 and 1"),
        ({"treshold": 0.5}, TypeError, "treshold"),
    ],
)
def test_wrong_overrides_of_a_checkpoint(checkpoint, arguments, error, message):
    with pytest.raises(error, match=message):
        HAMForCausalLM.from_pretrained(checkpoint, **arguments)


def test_parameters_that_a_checkpoint_lacks_are_reported(checkpoint, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mixer.threshold"]
    weights["model.layers.0.mixer.novel"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, info = HAMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.0.mixer.threshold"}
    assert set(info["unexpected_keys"]) == {"model.layers.0.mixer.novel"}
