# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The page on cost: its counts against real small models, and its text against what is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.configuration_ham import ROUTERS
from ham_kernels import gated_delta_rule_with_prediction
from model_cards.benchmarks import cost

# Values are as wide as keys in none: attention is then made of products, which PyTorch counts.
SHAPES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 48, "value_head_dim": 20},
    "single": {"num_attention_heads": 2, "head_dim": 32, "value_head_dim": 24},
    "wide values": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "value_head_dim": 64},
}


def make_config(shape: str, **settings: Any) -> HAMConfig:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 104,
        "intermediate_size": 168,
        "num_hidden_layers": 2,
        "use_cache": False,
    }
    return HAMConfig(**(sizes | SHAPES[shape] | settings))


def saved_bytes(call: Callable[[], Any], parameters: list[torch.Tensor]) -> int:
    """Bytes of the storages that a call saves for its backward pass, without those of parameters."""
    held, sizes = [], {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held.append(x)  # so that no other tensor takes its place in memory
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    known = {p.untyped_storage().data_ptr() for p in parameters}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def saved_by_model(config: HAMConfig, length: int, dtype: torch.dtype, checkpointing: bool = False) -> float:
    """Bytes of a token that a model which keeps every token saves."""
    model = HAMForCausalLM(config).train().to(dtype)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.randint(1, 97, (1, length))
    return saved_bytes(lambda: model(ids, labels=ids, threshold=0.0), list(model.parameters())) / length


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(router, tied):
    config = make_config("grouped", router=router, tie_word_embeddings=tied, attention_bias=True)
    model = HAMForCausalLM(config)
    counted = cost.parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.matrices == sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))


def test_models_of_the_page_have_the_size_in_their_name():
    for model in cost.MODELS:
        assert cost.parameters(model.config).total == pytest.approx(float(model.name.rstrip("B")) * 1e9, rel=0.35)


@pytest.mark.parametrize("router", ["cosine", pytest.param("learned", marks=pytest.mark.slow), "learned_error"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("usage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_operations_are_those_that_pytorch_counts(router, shape, usage):
    """All but the triangular solve, which PyTorch does not count; of its backward pass it counts the product."""
    config, length = make_config(shape, router=router), 1024
    model = HAMForCausalLM(config).train()
    ids = torch.randint(1, 97, (1, length))
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        loss = model(ids, labels=ids, threshold=2.0 * (1 - usage)).loss
    with backward:
        loss.backward()
    expected = cost.operations(config, length, usage)
    assert forward.get_total_flops() / length == pytest.approx(expected.forward - expected.solve, rel=0.01)
    assert backward.get_total_flops() / length == pytest.approx(expected.backward - expected.solve, rel=0.01)


@pytest.mark.parametrize("router", ["cosine", "learned", "learned_error"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_layer_saves_what_is_said(router, shape, dtype, width):
    one, two = (make_config(shape, router=router, num_hidden_layers=x, kv_output_norm=True) for x in (1, 2))
    expected = cost.saved_by_layer(one, 1, kernels=False, width=width)
    found = saved_by_model(two, 1024, dtype) - saved_by_model(one, 1024, dtype)
    assert found == pytest.approx(expected, rel=0.05)


def test_checkpoints_hold_the_inputs_of_layers():
    two, four = (make_config("grouped", num_hidden_layers=layers) for layers in (2, 4))
    found = saved_by_model(four, 512, torch.float32, True) - saved_by_model(two, 512, torch.float32, True)
    assert found == pytest.approx(2 * 4 * two.hidden_size, rel=0.01)


def test_the_kernel_of_the_rnn_saves_its_inputs_and_an_inverse_a_chunk():
    length, heads, kv_heads, key, value = 128, 4, 2, 32, 16
    q, k = torch.randn(1, length, heads, key), torch.randn(1, length, kv_heads, key)
    v, g, beta = torch.randn(1, length, kv_heads, value), -torch.rand(1, length, kv_heads), torch.rand(1, length, 2)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    chunk = cost.KERNEL_CHUNK
    found = saved_bytes(lambda: gated_delta_rule_with_prediction(*inputs, chunk_size=chunk, score="cosine"), [])
    assert found / 4 / length == pytest.approx(heads * key + kv_heads * (key + value + chunk), rel=0.05)


def test_what_costs_more_in_the_tables():
    """More tokens kept, less sharing, more machines, and gradients that are summed twice."""
    model, hardware = cost.MODELS[1], cost.Hardware()
    assert cost.compute_seconds(model._replace(usage=1.0), hardware) > cost.compute_seconds(model, hardware)
    assert cost.memory_of_weights(model.config, 8) < cost.memory_of_weights(model.config, 1)
    seconds = [cost.message_seconds("HSDP", model.config, gpus, hardware) for gpus in (8, 16, 64)]
    assert seconds == sorted(seconds)
    assert seconds[2] > cost.message_seconds("FSDP2", model.config, 64, hardware)


def test_rings_leave_a_machine_by_all_of_its_cards_and_are_no_faster_than_inside():
    config, slow, fast = cost.MODELS[1].config, cost.Hardware(between=1e9), cost.Hardware(between=1e12)
    sent = cost.sharded_traffic(config).sent(64)
    assert cost.message_seconds("FSDP2", config, 64, slow) == pytest.approx(sent / (8 * 1e9 * slow.link))
    assert cost.message_seconds("FSDP2", config, 64, fast) == pytest.approx(sent / (fast.within * fast.link))


def test_the_page_is_what_the_script_writes():
    written = Path(cost.__file__).with_name("COST.md")
    assert written.read_text(encoding="utf-8") == cost.page(cost.Hardware())
