# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Training at thresholds that do not learn: nobody waits for their gradient, and nothing moves them."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ham_hf import HAMForCausalLM
from ham_hf.training.control import UsageMeter, clipped_parameters, parameter_groups
from ham_hf.training.lora import add_adapters
from ham_hf.training.recipe import LoraRecipe

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def group(tmp_path):
    """A process group of one, in which DDP asks for every gradient as in one of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps(model, **arguments):
    for _ in range(3):
        ids = torch.randint(1, 97, (2, 12))
        model(ids, labels=ids, use_cache=False, **arguments).loss.backward()


def thresholds_of(model):
    return [layer.mixer.threshold for layer in model.model.layers]


def test_a_threshold_of_the_configuration_needs_no_gradient(group, tiny_config, tmp_path):
    HAMForCausalLM(tiny_config()).save_pretrained(tmp_path / "saved")
    loaded = HAMForCausalLM.from_pretrained(tmp_path / "saved", threshold=0.45)
    for model in (HAMForCausalLM(tiny_config(threshold=0.45)), loaded):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            steps(DistributedDataParallel(model.train()))
        assert not any(x.requires_grad for x in thresholds_of(model))
        assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


def test_a_threshold_of_a_call_leaves_the_learned_ones_without_a_gradient(group, tiny_config):
    """As the argument's description says."""
    model = HAMForCausalLM(tiny_config()).train()
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        steps(DistributedDataParallel(model), threshold=0.45)
    for arguments in ({"threshold": 0.45}, {}, {"threshold": [0.4, 0.5]}):
        steps(DistributedDataParallel(model, find_unused_parameters=True), **arguments)
    for threshold in thresholds_of(model):
        threshold.requires_grad_(False)
    steps(DistributedDataParallel(model), threshold=0.45)


def test_tools_of_training_know_that_it_takes_no_part(tiny_config):
    model = HAMForCausalLM(tiny_config(threshold=0.0)).train()
    groups = parameter_groups(model, 1e-3, 0.1)
    held = {id(x) for x in thresholds_of(model)}
    assert not held & {id(x) for part in groups for x in part["params"]}
    assert not held & {id(x) for x in clipped_parameters(model)}
    with UsageMeter(model) as meter:
        steps(model)
    figures = meter.read()
    assert torch.equal(figures["usage"], torch.ones(2, 2)), "of the threshold in force"
    assert torch.equal(figures["thresholds"], torch.full((2, 2), 0.5)), "the learned ones"


@pytest.mark.parametrize("fixed", [None, 0.45])
def test_adapters_leave_a_fixed_threshold_alone(fixed, tiny_config):
    pytest.importorskip("peft")
    model = HAMForCausalLM(tiny_config(threshold=fixed))
    add_adapters(model, LoraRecipe(), train_thresholds=True)
    assert all(x.requires_grad == (fixed is None) for x in thresholds_of(model))


def test_a_meter_of_training_calls_counts_those_with_gradients(tiny_config):
    """Generation and references within a step of TRL's trainers have none."""
    model = HAMForCausalLM(tiny_config()).train()
    ids = torch.randint(1, 97, (2, 12))
    with UsageMeter(model, with_gradients=True) as meter:
        with torch.no_grad():
            model(ids)
        model.generate(ids, max_new_tokens=3)
        steps(model)
    assert meter.read()["tokens"] == 3 * ids.numel()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with meter:
        steps(model)
    assert meter.read()["tokens"] == 3 * ids.numel()
