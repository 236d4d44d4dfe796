# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Quantised weights on a CPU, by torchao and bitsandbytes: close logits, much the same kept sets, the same cache."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.inspection.demo_prompt import DEMO_PROMPT

# Few weights, which decide what the states forget and how the memories mix. bitsandbytes' 4-bit layout for CPUs
# refuses them: it takes multiples of 32 outputs.
SMALL = ["a_proj", "b_proj", "rnn_gate_proj", "kv_gate_proj"]
# torchao matches names of parameters, bitsandbytes those of modules.
KEPT = ["lm_head", f".*({'|'.join(SMALL)})"]


def torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=KEPT)


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)


def bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=KEPT,
    )


def quantized(checkpoint, make_config):
    return HAMForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=make_config(), device_map="cpu"
    ).eval()


def kept_sets(output):
    """`[layers, T, heads]`: which tokens score 0.4 or more."""
    return torch.stack([scores[0] >= 0.4 for scores in output.routing_scores])


# Twice what was measured: the divergence of the next token's distribution (nats), and the share of keep-decisions
# that changed. bfloat16 weights alone measure 0.00015 and 0.0006.
@pytest.mark.parametrize(
    ("make_config", "divergence", "changed"),
    [(torchao_int8, 5e-4, 0.003), (bitsandbytes_int8, 8e-4, 0.005), (bitsandbytes_4bit, 0.08, 0.04)],
)
def test_quantized_weights(make_config, divergence, changed, checkpoint, model, tokenizer):
    low = quantized(checkpoint, make_config)
    ids = tokenizer(DEMO_PROMPT, return_tensors="pt").input_ids
    for layer, original_layer in zip(low.model.layers, model.model.layers, strict=True):
        mixer, original = layer.mixer, original_layer.mixer
        assert type(mixer.q_proj.weight) is not torch.nn.Parameter
        for name in ("threshold", "A_log", "dt_bias", "score_quantiles"):
            assert getattr(mixer, name).dtype == torch.float32
            assert torch.equal(getattr(mixer, name), getattr(original, name))
        assert all(torch.equal(getattr(mixer, x).weight, getattr(original, x).weight) for x in SMALL)

    with torch.no_grad():
        expected = model(ids, threshold=0.4, output_routing_scores=True)
        found = low(ids, threshold=0.4, output_routing_scores=True, use_cache=True)
    p, q = expected.logits.log_softmax(-1), found.logits.log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < divergence
    assert (kept_sets(found) != kept_sets(expected)).float().mean() < changed
    assert isinstance(found.cache, HAMCache)
    assert torch.equal(found.cache.kept_tokens()[:, 0], kept_sets(found).sum(1))

    out = low.generate(ids[:, :50], max_new_tokens=6, do_sample=False, threshold=0.4)
    with torch.no_grad():
        assert torch.equal(low(out[:, :-1], threshold=0.4).logits[0, 49:].argmax(-1), out[0, 50:])


@pytest.mark.parametrize("make_config", [torchao_int8, bitsandbytes_int8])
def test_save_and_load(make_config, checkpoint, tokenizer, tmp_path):
    low = quantized(checkpoint, make_config)
    low.save_pretrained(tmp_path)
    ids = tokenizer("The captain looked at the sea, and", return_tensors="pt").input_ids
    with torch.no_grad():
        loaded = HAMForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
        assert torch.equal(loaded(ids).logits, low(ids).logits)


@pytest.mark.parametrize(
    ("make_config", "tolerance"), [(torchao_int8, 0.05), (bitsandbytes_int8, 0.05), (bitsandbytes_4bit, 0.4)]
)
def test_learned_router(make_config, tolerance, tiny_config, tmp_path):
    """A router's MLP may be quantised too: scores stay float32, within twice the error measured."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "router_hidden_size": 64}
    model = HAMForCausalLM(tiny_config(router="learned_error", **sizes)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mixer.router.up_proj.weight, std=0.3)
        torch.nn.init.normal_(layer.mixer.router.down_proj.weight, std=0.3)
    model.save_pretrained(tmp_path)
    low = quantized(tmp_path, make_config)
    assert type(low.model.layers[0].mixer.router.up_proj.weight) is not torch.nn.Parameter
    ids = torch.randint(1, 97, (1, 50))
    with torch.no_grad():
        expected, found = (x(ids, threshold=0.5, output_routing_scores=True).routing_scores for x in (model, low))
    assert expected[0].std() > 0.2
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)
