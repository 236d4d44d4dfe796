# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What vLLM's configuration says for a HAM model, what is refused, and the plugin's own registration."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from ham_hf.serving import vllm as plugin
from ham_hf.serving.vllm.requests import HAMArguments
from tests.serving.vllm.engine import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return folder


def configured(folder, **arguments):
    plugin.register()
    settings = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    return EngineArgs(model=str(folder), **(settings | arguments)).create_engine_config()


def test_a_server_needs_no_flags(folder):
    config = configured(folder, enable_prefix_caching=True)
    assert config.kv_transfer_config.kv_connector == "HAMConnector"
    assert not config.cache_config.enable_prefix_caching
    assert config.model_config.logits_processors == ["ham_hf.serving.vllm.requests:HAMArguments"]
    assert config.additional_config == {"ham": {"conversations": False}}
    assert HAMArguments.served.model == str(folder)


def test_defaults_of_the_server_are_kept_and_checked(folder):
    assert configured(folder, additional_config={"ham": {"kv_budget": 9}, "x": 1}).additional_config == {
        "ham": {"kv_budget": 9, "conversations": False},
        "x": 1,
    }
    with pytest.raises(ValueError, match="`kv_budget` must be a positive int"):
        configured(folder, additional_config={"ham": {"kv_budget": -9}})
    with pytest.raises(ValueError, match="takes threshold, kv_usage, kv_budget, conversations, got 'budget'"):
        configured(folder, additional_config={"ham": {"budget": 9}})
    with pytest.raises(ValueError, match="must be true or false, got 1"):
        configured(folder, additional_config={"ham": {"conversations": 1}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_parallel_size": 3}, "`tensor_parallel_size` must divide `num_attention_heads`, 4 in this model"),
        ({"pipeline_parallel_size": 2}, "`pipeline_parallel_size` must be 1"),
        ({"enable_lora": True}, "`lora_config` must be left out"),
        ({"kv_offloading_size": 1.0}, "`kv_offloading_size` must be left out for a HAM model, got 1.0"),
        (
            {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
            "RoPE of the type 'dynamic' cannot be served",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "`kv_transfer_config` must be left out",
        ),
    ],
)
def test_what_the_plugin_does_not_serve_is_refused(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        configured(folder, **arguments)


def test_the_second_model_runner_is_refused(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        configured(folder)


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "1.32.0"])
def test_another_version_of_vllm_is_refused(monkeypatch, found):
    monkeypatch.setattr(plugin, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"vLLM 0\.32, found vllm {found}"):
        plugin.register()


def test_the_version_is_that_of_vllm_built_for_a_cpu(monkeypatch):
    def version(name):
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.4"

    monkeypatch.setattr(plugin, "version", version)
    plugin.register()
    monkeypatch.setattr(plugin, "DISTRIBUTIONS", ("vllm",))
    with pytest.raises(ImportError, match="found no distribution vllm of"):
        plugin.register()


def test_vllm_finds_the_plugin_by_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    assert points == {"ham": f"{plugin.register.__module__}:{plugin.register.__name__}"}
