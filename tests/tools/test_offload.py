# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""accelerate's device maps: a model some of whose layers wait on the disk gives what the whole model gives."""

import pytest
import torch

from ham_hf import HAMForCausalLM, decode_step_ham

pytest.importorskip("accelerate")


def device_map(config, on_disk):
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head"], "cpu")
    if config.rope_parameters is not None:
        places["model.rotary_emb"] = "cpu"
    return places | {f"model.layers.{i}": "disk" if i in on_disk else "cpu" for i in range(config.num_hidden_layers)}


def parameters_on_disk(model):
    return {name for name, x in model.named_parameters() if x.device.type == "meta"}


def assert_same(placed, model, knob):
    """Same logits for a padded batch, same generation, same kept sets."""
    ids = torch.randint(3, model.config.vocab_size, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        assert torch.equal(placed(**inputs, **knob).logits, model(**inputs, **knob).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    found, expected = (x.generate(**inputs, **options, **knob) for x in (placed, model))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.cache.kept_tokens(), expected.cache.kept_tokens())


def test_layers_on_disk(checkpoint, model, tmp_path):
    places = device_map(model.config, on_disk=(1, 4))
    placed = HAMForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    ).eval()
    layers = ("model.layers.1.", "model.layers.4.")
    assert parameters_on_disk(placed) == {name for name, _ in model.named_parameters() if name.startswith(layers)}
    # A mixer's own parameters wait there as well, and a call fetches them.
    assert {"model.layers.1.mixer.threshold", "model.layers.4.mixer.A_log"} < parameters_on_disk(placed)
    assert_same(placed, model, {})
    assert_same(placed, model, {"threshold": 0.4})
    assert_same(placed, model, {"kv_usage": 0.25})


def test_too_little_memory(checkpoint, model, tmp_path):
    placed = HAMForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map="auto", max_memory={"cpu": "12MB"}, offload_folder=tmp_path
    ).eval()
    assert 0 < len(parameters_on_disk(placed)) < len(list(model.parameters()))
    assert_same(placed, model, {"threshold": 0.4})


@pytest.mark.parametrize("router", ["l2", "learned_error", "random"])
def test_other_layers_and_routers(router, tiny_config, tmp_path):
    kinds = ["hybrid", "linear_attention", "full_attention", "hybrid"]
    config = tiny_config(num_hidden_layers=4, layer_types=kinds, router=router, attention_bias=True, mlp_bias=True)
    model = HAMForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    places = device_map(config, on_disk=(0, 1, 2))
    placed = HAMForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights")
    assert parameters_on_disk(placed)
    assert_same(placed.eval(), model, {"threshold": 0.5})


def test_decoding_kernels_are_not_given_weights_that_wait(checkpoint, model, tmp_path, monkeypatch):
    """On a GPU a kernel reads the weights of a mixer's modules, which accelerate fetches for those modules only."""
    places = device_map(model.config, on_disk=range(6))
    placed = HAMForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    ).eval()
    asked = []
    monkeypatch.setattr(decode_step_ham, "decode_kernel", lambda name, tensor: asked.append(name))
    ids = torch.tensor([[5, 6, 7]])
    placed.generate(ids, max_new_tokens=2)
    assert not asked
    model.generate(ids, max_new_tokens=2)
    assert asked
