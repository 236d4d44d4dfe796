# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Qwen3-Next, Qwen3.5 and OLMo-Hybrid become HAMs that compute the same, and come back; else a refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    OlmoHybridConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from ham_hf import HAMForCausalLM
from ham_hf.hub import conversion

VOCABULARY = 1024
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
QWEN = SHAPE | {"head_dim": 16}


def rope(rotated=0.25, **others):
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated} | others


MROPE = {"mrope_section": [1, 1, 2], "mrope_interleaved": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NOPE = {"rope_type": "default", "rope_theta": None}
SOURCES = {
    "qwen3_next": Qwen3NextConfig(**QWEN, num_experts=0, rope_parameters=rope()),
    "qwen3_next, tied, whole heads rotate, sparse layers named dense": Qwen3NextConfig(
        **QWEN, rope_parameters=rope(1.0), mlp_only_layers=[1, 3], decoder_sparse_step=2, tie_word_embeddings=True
    ),
    "qwen3_next, a value head each, longer values, yarn": Qwen3NextConfig(
        **QWEN | {"linear_num_key_heads": 4, "linear_value_head_dim": 20, "linear_conv_kernel_dim": 3},
        num_experts=0,
        rms_norm_eps=1e-5,
        rope_parameters=rope(0.5, **YARN),
    ),
    "qwen3_5, mrope": Qwen3_5TextConfig(**QWEN, rope_parameters=rope(0.5, **MROPE)),
    "qwen3_5, tied, one key head": Qwen3_5TextConfig(
        **QWEN | {"linear_num_key_heads": 1}, rope_parameters=rope(), tie_word_embeddings=True
    ),
    "olmo, no positions": OlmoHybridConfig(**SHAPE, rope_parameters=NOPE),
    "olmo, biased, tied, rope": OlmoHybridConfig(
        **SHAPE, rope_parameters=rope(1.0), attention_bias=True, tie_word_embeddings=True
    ),
    "olmo, a value head each, positive eigenvalues": OlmoHybridConfig(
        **SHAPE | {"linear_num_key_heads": 4, "num_key_value_heads": 4},
        linear_allow_neg_eigval=False,
        rms_norm_eps=1e-4,
        rope_parameters=NOPE,
    ),
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


@pytest.fixture
def convert(script):
    """A function that runs the script of a checkpoint, or of the HAM made from it, and returns its exit status."""

    def run(folder, *arguments):
        text = (folder / "config.json").read_text() + "".join(p.read_text() for p in folder.glob("conversion.json"))
        module = script(f"convert_{'olmo' if 'olmo_hybrid' in text else 'qwen3'}_hybrid_to_ham")
        return conversion.main(module.CONVERSION, module.__doc__, [str(x) for x in (folder, *arguments)])

    return run


@pytest.fixture
def source(tmp_path, randomised):
    """A function that saves a model with random weights in several shards."""

    def save(config, dtype=torch.float32, build=AutoModelForCausalLM.from_config):
        model = randomised(build(config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Longer memories, so that the state of the first chunk of 64 is heard in the third.
                parameter.sub_(3.0 if name.endswith("A_log") else 0.0)
        model.to(dtype).save_pretrained(tmp_path / "source", max_shard_size="100KB")
        assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
        return tmp_path / "source"

    return save


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(folder, tokens, dtype=torch.float32, **arguments):
    model = load(folder, dtype)
    with conversion.in_pytorch(model):
        return model(input_ids=tokens, **arguments).logits.float()


def tokens_of(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def come_back(name, tensors_of, folder, back):
    """Checks that a way back gave the source: Qwen's norms as far as 1 + w in float32 tells, the rest bit for bit."""
    before, after = load(folder).state_dict(), load(back).state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        zero_centred = "qwen" in name and "norm" in key and ".linear_attn." not in key
        error = (tensor - after[key]).abs().max()
        assert error <= (2**-24 if zero_centred else 0), key


@pytest.mark.parametrize("name", SOURCES)
def test_computes_the_same_and_comes_back(name, source, convert, tensors_of, tmp_path):
    folder, ham, back = source(SOURCES[name]), tmp_path / "ham", tmp_path / "back"
    assert convert(folder, ham) == 0
    tokens = tokens_of(2, 131)
    expected = logits(folder, tokens)
    got = logits(ham, tokens)
    print("ERROR", name, (got - expected).abs().max(), expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert logits(ham, tokens, threshold=0.5).sub(expected).abs().max() > 1e-2, "the threshold decides nothing"

    record = json.loads((ham / "conversion.json").read_text())
    assert record["source"]["architecture"] == record["verification"]["source_code"]
    assert 0 <= record["verification"]["max_abs_logit_error"] < 1e-4

    assert convert(ham, back, "--back") == 0
    assert (back / "config.json").read_text() == (folder / "config.json").read_text()
    come_back(name, tensors_of, folder, back)
    assert torch.equal(logits(back, tokens), expected)
