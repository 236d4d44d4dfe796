# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Qwen3-Next, Qwen3.5 and OLMo-Hybrid become HAMs that compute the same, and come back; else a refusal."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    OlmoHybridConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.conversion.command import main
from ham_hf.conversion.verification import in_pytorch

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
        return main(module.CONVERSION, module.__doc__, [str(x) for x in (folder, *arguments)])

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
    with in_pytorch(model):
        return model(input_ids=tokens, **arguments).logits.float()


def tokens_of(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def assert_came_back(folder, back):
    """Every weight is the source's, bit for bit."""
    before, after = load(folder, "auto").state_dict(), load(back, "auto").state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", SOURCES)
def test_computes_the_same_and_comes_back(name, source, convert, tmp_path):
    """Largest difference over all of these: 7e-5, of logits up to 5; both are up to 4e-5 away from float64."""
    folder, ham, back = source(SOURCES[name]), tmp_path / "ham", tmp_path / "back"
    assert convert(folder, ham) == 0
    tokens = tokens_of(2, 131)
    expected = logits(folder, tokens)
    torch.testing.assert_close(logits(ham, tokens), expected, rtol=0, atol=1e-4)
    assert logits(ham, tokens, threshold=0.5).sub(expected).abs().max() > 1e-2, "the threshold decides nothing"

    record = json.loads((ham / "conversion.json").read_text())
    assert record["source"]["architecture"] == record["verification"]["source_code"]
    assert 0 <= record["verification"]["max_abs_logit_error"] < 1e-4

    assert convert(ham, back, "--back") == 0
    assert (back / "config.json").read_text() == (folder / "config.json").read_text()
    assert_came_back(folder, back)
    assert torch.equal(logits(back, tokens), expected)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5, mrope", "olmo, biased, tied, rope"])
def test_bfloat16_comes_back_bit_for_bit(name, source, convert, tmp_path):
    """And a HAM that runs in bfloat16 errs as the source does, whose norms add 1 to their weights in float32."""
    folder, ham = source(SOURCES[name], torch.bfloat16), tmp_path / "ham"
    assert convert(folder, ham) == 0
    tokens = tokens_of(2, 99)
    torch.testing.assert_close(logits(ham, tokens), logits(folder, tokens), rtol=0, atol=1e-4)
    assert HAMForCausalLM.from_pretrained(ham).dtype == torch.bfloat16
    exact = logits(folder, tokens)
    errors = [(logits(path, tokens, torch.bfloat16) - exact).square().mean().sqrt() for path in (ham, folder)]
    assert errors[0] < 1.2 * errors[1]
    assert convert(ham, tmp_path / "back", "--back") == 0
    assert_came_back(folder, tmp_path / "back")


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5, mrope", "olmo, no positions", "olmo, biased, tied, rope"])
def test_decodes_as_the_source(name, source, convert, tmp_path):
    """Token by token from the HAM's cache, and greedy text of left-padded rows."""
    folder = source(SOURCES[name])
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    ham, original = load(tmp_path / "ham"), load(folder)
    tokens = tokens_of(2, 75)
    cache = HAMCache(ham.config)
    with torch.no_grad():
        steps = [ham(input_ids=x, cache=cache, use_cache=True).logits for x in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), logits(folder, tokens), rtol=0, atol=1e-4)

    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    with in_pytorch(original):
        expected = original.generate(tokens, **arguments)
    got = ham.generate(tokens, **arguments, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    assert len(expected[:, 75:].unique()) > 10, "a text that repeats itself shows nothing"
    assert got.cache.kv_usage()[[1, 3]].min() == 1


def test_of_a_multimodal_checkpoint_the_language_model(source, convert, tensors_of, tmp_path, capsys):
    text = SOURCES["qwen3_5, mrope"].to_dict()
    special = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = Qwen3_5Config(text_config=text, vision_config=VISION, **special)
    folder, ham = source(config, build=Qwen3_5ForConditionalGeneration), tmp_path / "ham"
    names = tensors_of(folder)
    vision = [name for name in names if name.startswith("model.visual.")]
    assert len(vision) > 10
    assert "model.language_model.embed_tokens.weight" in names
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"mtp.norm.weight": torch.ones(48)}, folder / "mtp.safetensors")
    index["weight_map"]["mtp.norm.weight"] = "mtp.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert convert(folder, ham) == 0
    assert (
        f"{len(vision) + 1} tensors of the source were left out: a HAM has no vision tower" in capsys.readouterr().out
    )
    tokens = tokens_of(2, 90)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad(), in_pytorch(model):
        expected = model(input_ids=tokens + 5 * (tokens < 5)).logits
    torch.testing.assert_close(logits(ham, tokens + 5 * (tokens < 5)), expected, rtol=0, atol=1e-4)

    assert convert(ham, tmp_path / "back", "--back") == 0
    assert type(load(tmp_path / "back")).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(logits(tmp_path / "back", tokens), logits(folder, tokens))


def test_olmo_under_the_released_names(source, convert, tensors_of, tmp_path):
    """Transformers saves other names, and cuts the convolutions elsewhere; vLLM and others read the released ones."""
    folder = source(SOURCES["olmo, no positions"])
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    assert convert(tmp_path / "ham", tmp_path / "released", "--back", "--no-verify") == 0
    saved, released = tensors_of(folder), tensors_of(tmp_path / "released")
    layer = "model.layers.0"
    assert f"{layer}.attention_layer_norm.weight" in saved.keys() - released.keys()
    assert torch.equal(released[f"{layer}.input_layernorm.weight"], saved[f"{layer}.attention_layer_norm.weight"])
    shapes = {name: [*x.shape] for name, x in released.items() if name.startswith(f"{layer}.linear_attn.")}
    assert [shapes[f"{layer}.linear_attn.{x}_conv1d.weight"] for x in "qkv"] == [[20, 1, 4], [20, 1, 4], [24, 1, 4]]
    assert [*saved[f"{layer}.linear_attn.q_conv1d.weight"].shape] == [22, 1, 4]
    assert {name for name in released if name.startswith("model.layers.1.") and "norm" in name} == {
        f"model.layers.1.{name}.weight"
        for name in ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm")
    }
    assert convert(tmp_path / "released", tmp_path / "again") == 0
    first, second = tensors_of(tmp_path / "ham"), tensors_of(tmp_path / "again")
    assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_a_tensor_under_two_names_is_refused(source, convert, tmp_path, capsys):
    folder = source(SOURCES["olmo, no positions"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"model.layers.0.input_layernorm.weight": torch.ones(48)}, folder / "more.safetensors")
    index["weight_map"]["model.layers.0.input_layernorm.weight"] = "more.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(folder, tmp_path / "ham") == 2
    assert "every tensor once, got 1 twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_next", lambda m: m.model.layers[1].mixer.rnn_gate_proj.bias.data.fill_(0.0), "rnn_gate_proj.bias is"),
        (
            "qwen3_5, mrope",
            lambda m: setattr(m.config, "output_gate", "silu"),
            "`output_gate` must still be 'sigmoid'",
        ),
        (
            "olmo, biased, tied, rope",
            lambda m: m.model.layers[0].mixer.v_proj.bias.data.fill_(0.1),
            "layers.0.mixer.v_proj.bias is not zero, and the source has none",
        ),
    ],
)
def test_what_has_no_way_back(name, change, message, source, convert, tmp_path, capsys):
    assert convert(source(SOURCES[name]), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    change(model)
    model.save_pretrained(tmp_path / "changed")
    (tmp_path / "changed/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "changed", tmp_path / "back", "--back") == 2
    assert message in capsys.readouterr().err


WINDOWS = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3NextConfig(**QWEN, num_experts=8, decoder_sparse_step=3), "a mixture of experts (8 in 1 of 4 layers)"),
        (Qwen3NextConfig(**QWEN, num_experts=8, mlp_only_layers=[0, 3]), "a mixture of experts (8 in 2 of 4 layers)"),
        (Qwen3_5MoeTextConfig(**QWEN), "a mixture of experts (256 in 4 of 4 layers)"),
        (Qwen3_5MoeConfig(text_config=QWEN, vision_config=VISION), "a mixture of experts (256 in 4 of 4 layers)"),
        (Qwen3_5TextConfig(**QWEN | {"layer_types": WINDOWS}), "`layer_types` must hold only"),
        (Qwen3_5TextConfig(**QWEN, attention_bias=True), "`attention_bias` must be False"),
        (Qwen3_5TextConfig(**QWEN, hidden_act="gelu"), "`hidden_act` must be 'silu', got 'gelu'"),
        (Qwen3_5TextConfig(**QWEN | {"linear_num_key_heads": 3}), "`linear_num_value_heads` (4) must be a multiple"),
        (Qwen3_5TextConfig(**QWEN, rope_parameters=rope(0.2)), "must be an even number"),
        (OlmoHybridConfig(**SHAPE | {"layer_types": WINDOWS}), "`layer_types` must hold only"),
        (OlmoHybridConfig(**SHAPE, hidden_act="relu"), "`hidden_act` must be 'silu', got 'relu'"),
        (OlmoHybridConfig(**SHAPE, rope_parameters=rope(0.5)), "`partial_rotary_factor` must be 1.0, got 0.5"),
    ],
)
def test_refusals_name_the_feature(config, message, convert, tmp_path, capsys):
    """By the configuration, before any weight is read."""
    config.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "ham") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "ham").exists()


@pytest.mark.parametrize("name", ["convert_qwen3_hybrid_to_ham", "convert_olmo_hybrid_to_ham"])
def test_help(name, script, capsys):
    module = script(name)
    with pytest.raises(SystemExit) as stop:
        main(module.CONVERSION, module.__doc__, ["--help"])
    assert stop.value.code == 0
    assert "--back" in capsys.readouterr().out
