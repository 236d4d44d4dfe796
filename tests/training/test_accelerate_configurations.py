# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The example configurations of accelerate: what each says is what accelerate understands."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

import ham_hf
from ham_hf import HAMForCausalLM

FOLDER = Path(ham_hf.__file__).parent / "training" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
SHARDED = [path for path in FILES if "fsdp2" in path.stem or "hsdp" in path.stem]


def name_of(path: Path) -> str:
    return path.stem


@pytest.fixture
def launched(monkeypatch):
    """A function that puts into the environment what `accelerate launch` would, and returns its arguments."""

    def launch(path: Path):
        parser = launch_command_parser()
        arguments = parser.parse_args(["--config_file", str(path), "train.py"])
        arguments.nondefault = {"config_file"}
        arguments, _, _ = _validate_launch_command(arguments)
        arguments.main_process_ip, arguments.main_process_port = "localhost", 29500
        for name, value in prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(name, value)
        return arguments

    return launch


def test_there_is_one_for_each_way():
    assert {path.stem for path in FILES} == {
        "one_node_ddp",
        "one_node_fsdp2",
        "many_nodes_fsdp2",
        "many_nodes_hsdp",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_accelerate_knows_every_key(path):
    """Its loader refuses unknown keys at the top only, and would drop one of a section in silence."""
    configuration = load_config_from_file(str(path))
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(configuration.fsdp_config) | set(configuration.parallelism_config) <= options


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_counts_of_processes_agree_and_the_precision_is_bfloat16(path, launched):
    arguments = launched(path)
    assert arguments.num_processes == arguments.num_machines * 8
    assert arguments.mixed_precision == "bf16"
    assert arguments.use_fsdp == (path in SHARDED)
    if arguments.use_parallelism_config:
        assert ParallelismConfig().total_size == arguments.num_processes
        assert ParallelismConfig().dp_replicate_size == arguments.num_machines


@pytest.mark.parametrize("path", SHARDED, ids=name_of)
def test_layers_are_what_is_sharded(path, launched, tiny_config):
    launched(path)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    with torch.device("meta"):
        model = HAMForCausalLM(tiny_config())
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords == {"transformer_layer_cls": {type(model.model.layers[0])}}
