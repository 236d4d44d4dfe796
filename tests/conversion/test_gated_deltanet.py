# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Gated DeltaNets of flash-linear-attention become HAMs that compute the same, and come back; else a refusal."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ham_hf import HAMForCausalLM
from ham_hf.conversion.command import main

pytest.importorskip("fla.models.gated_deltanet")

from fla.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

# Small enough for kernels under Triton's interpreter, which take a few milliseconds a token and head.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "expand_v": 1.0,
    "max_position_embeddings": 512,
    # Of the outputs of a random state, many are so small that a norm with 1e-6 makes their rounding errors large.
    "norm_eps": 1e-5,
    "pad_token_id": 0,
}
SOURCES = {
    "plain": {},
    "wide values, tied": {"expand_v": 2.0, "tie_word_embeddings": True},
    "three value heads a key, sigmoid gate": {"num_v_heads": 6, "output_gate_activation": "sigmoid", "head_dim": 4},
    "as many value heads, no gate, other norms": {"num_v_heads": 2, "use_gate": False, "fuse_norm": False},
    "negative eigenvalues, MLP by ratio": {
        "allow_neg_eigval": True,
        "intermediate_size": None,
        "hidden_ratio": 3,
        "fuse_swiglu": False,
    },
    "short convolution, coarse norms, wide and grouped": {
        "conv_size": 2,
        "norm_eps": 1e-2,
        "expand_v": 1.5,
        "num_v_heads": 4,
        "output_gate_activation": "silu",
    },
}
SLOW_SOURCES = ("wide values, tied", "three value heads a key, sigmoid gate")


@pytest.fixture
def module(script):
    return script("convert_gated_deltanet_to_ham")


@pytest.fixture
def source(tmp_path, randomised):
    """A function that saves a random model, of which a state matters for some twenty tokens."""

    def save(dtype=torch.float32, **overrides):
        model = randomised(GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SHAPE | overrides)))
        for layer in model.model.layers:
            layer.attn.A_log.data.sub_(3.0)
        model.to(dtype).save_pretrained(tmp_path / "source", max_shard_size="20KB")
        assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
        return tmp_path / "source"

    return save


def ham_logits(folder, tokens, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, **arguments).logits


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_SOURCES else x for x in SOURCES],
)
def test_computes_the_same_and_comes_back(name, source, module, convert, tensors_of, tmp_path):
    """Largest difference over all of these: 1.6e-5, of logits up to 4; either is as far from float64."""
    folder, ham, back = source(**SOURCES[name]), tmp_path / "ham", tmp_path / "back"
    assert convert(folder, ham, "--no-verify") == 0
    tokens = torch.randint(97, (2, 9))
    expected = module.fla_logits(folder, tokens)
    torch.testing.assert_close(ham_logits(ham, tokens), expected, rtol=0, atol=1e-4)

    assert convert(ham, back, "--back", "--no-verify") == 0
    assert (back / "config.json").read_text() == (folder / "config.json").read_text()
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_long_rows_and_a_cache(source, module, convert, tmp_path):
    """More than a chunk of 64 tokens: at once, token by token, and in pieces; largest difference 2.4e-5."""
    folder, ham = (
        source(num_v_heads=4, head_dim=4, allow_neg_eigval=True, output_gate_activation="sigmoid"),
        tmp_path / "ham",
    )
    assert convert(folder, ham, "--no-verify") == 0
    tokens = torch.randint(97, (1, 77))
    expected = module.fla_logits(folder, tokens)
    torch.testing.assert_close(ham_logits(ham, tokens), expected, rtol=0, atol=1e-4)

    model = HAMForCausalLM.from_pretrained(ham).eval()
    for pieces in ([1] * 77, [65, 1, 11]):
        cache, got = None, []
        for piece in tokens.split(pieces, dim=1):
            with torch.no_grad():
                out = model(input_ids=piece, cache=cache, use_cache=True)
            cache = out.cache
            got.append(out.logits)
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)
        assert cache.kept_tokens().max() == 0


def test_a_tuned_rnn_comes_back(source, convert, tensors_of, tmp_path):
    """The way back keeps the training of the RNN, while the attention stayed shut."""
    assert convert(source(num_hidden_layers=1, num_v_heads=4), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    mixer = model.model.layers[0].mixer
    for parameter in (mixer.o_proj.weight, mixer.v_proj.weight, mixer.A_log, mixer.q_norm.weight, mixer.threshold):
        parameter.data.mul_(1.5)
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "tuned", tmp_path / "back", "--back", "--verify-tokens", 5) == 0
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "back")
    moved = {name.split("attn.")[-1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"o_proj.weight", "v_proj.weight", "A_log"}


@pytest.mark.slow
def test_the_command_of_the_readme(source, tmp_path):
    """In a process of its own, where nobody has chosen Triton's interpreter yet."""
    script = Path(__file__).parents[2] / "conversion_scripts/convert_gated_deltanet_to_ham.py"
    command = [sys.executable, script, source(num_hidden_layers=1), tmp_path / "ham", "--verify-tokens", "5"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "same likeliest token 100.0%" in result.stdout


def test_the_record_says_what_was_compared(source, convert, tmp_path, capsys):
    assert convert(source(num_hidden_layers=1), tmp_path / "ham", "--verify-tokens", 5) == 0
    record = json.loads((tmp_path / "ham/conversion.json").read_text())
    figures = record["verification"]
    assert record["source"]["architecture"] == "GatedDeltaNetForCausalLM"
    version = importlib.metadata.version("flash-linear-attention")
    assert figures["source_code"].startswith(f"GatedDeltaNetForCausalLM of flash-linear-attention {version}")
    assert figures["tokens"] == 10
    assert 0 <= figures["max_abs_logit_error"] < 1e-4
    assert "keeps no token" in capsys.readouterr().out
    assert convert(tmp_path / "ham", tmp_path / "back", "--back", "--verify-tokens", 5) == 0
    assert "largest difference" in capsys.readouterr().out


def test_bfloat16_stays_and_comes_back(source, convert, tensors_of, tmp_path):
    folder = source(torch.bfloat16)
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    assert HAMForCausalLM.from_pretrained(tmp_path / "ham").dtype == torch.bfloat16
    assert convert(tmp_path / "ham", tmp_path / "back", "--back", "--no-verify") == 0
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_attention_that_opens_is_heard(source, convert, tmp_path):
    """With its gate open, what is kept moves the logits."""
    assert convert(source(), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham").eval()
    tokens = torch.randint(97, (1, 40))
    before = model(input_ids=tokens, threshold=0.0).logits
    for layer in model.model.layers:
        layer.mixer.kv_gate_proj.bias.data.fill_(0.0)
    nothing, everything = model(input_ids=tokens).logits, model(input_ids=tokens, threshold=0.0).logits
    assert (nothing - before).abs().max() > 1e-2
    assert (nothing - everything).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mixer: mixer.kv_gate_proj.bias.data.fill_(0.0), "kv_gate_proj.bias is above"),
        (lambda mixer: mixer.rnn_gate_proj.bias.data.fill_(0.1), "rnn_gate_proj.bias is no longer 0"),
        (lambda mixer: mixer.q_proj.weight.data[0].mul_(2), "q_proj.weight no longer has equal rows"),
        (lambda mixer: mixer.k_proj.weight.data[-1].mul_(2), "k_proj.weight no longer has equal rows"),
        (lambda mixer: mixer.conv.weight.data[0].mul_(2), "conv.weight no longer has equal rows"),
    ],
)
def test_what_has_no_way_back(change, message, source, convert, tmp_path, capsys):
    assert convert(source(num_v_heads=4), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    change(model.model.layers[1].mixer)
    model.save_pretrained(tmp_path / "changed")
    (tmp_path / "changed/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "changed", tmp_path / "back", "--back") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "swap", [("q_proj", "k_proj"), ("a_proj", "b_proj"), ("A_log", "dt_bias"), ("attn_norm", "mlp_norm")]
)
def test_a_wrong_mapping_is_not_written(swap, source, module, convert, tmp_path, capsys):
    right = module.to_ham

    def confused(*arguments):
        for rule in right(*arguments):
            sources = [
                name.replace(swap[0], "?").replace(swap[1], swap[0]).replace("?", swap[1]) for name in rule.sources
            ]
            yield module.TensorRule(rule.name, tuple(sources), rule.make, rule.dtype)

    wrong = dataclasses.replace(module.CONVERSION, to_ham=confused)
    arguments = [source(num_hidden_layers=1), tmp_path / "ham", "--verify-tokens", 6]
    assert main(wrong, "", [str(x) for x in arguments]) == 2
    assert "must agree" in capsys.readouterr().err
    assert not (tmp_path / "ham").exists()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_short_conv": False}, "`use_short_conv` must be True"),
        ({"conv_bias": True}, "`conv_bias` must be False"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "`attn` must be None"),
        ({"attnres_block_size": 2}, "`attnres_block_size` must be None"),
        ({"hidden_act": "powlu"}, "`hidden_act` must be 'swish'"),
        ({"output_gate_activation": "tanh"}, "output_gate_activation must be"),
        ({"num_v_heads": 3}, "`num_v_heads` must be a multiple of `num_heads` (2), got 3"),
        ({"num_v_heads": 1}, "`num_v_heads` must be a multiple of `num_heads` (2), got 1"),
        ({"num_heads": 3}, "configuration and weights disagree"),
        ({"use_gate": False}, "that the new model has no place for: ['model.layers.0.attn.g_proj.weight'"),
        ({"model_type": "delta_net"}, "must be of a model type in ('gated_deltanet',)"),
    ],
)
def test_refusals(changes, message, source, convert, tmp_path, capsys):
    folder = source()
    edit_config(folder, **changes)
    assert convert(folder, tmp_path / "ham") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "ham").exists()


def test_without_fla(source, module, convert, tmp_path, monkeypatch, capsys):
    folder = source()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.delitem(sys.modules, "fla.models.gated_deltanet")
    assert convert(folder, tmp_path / "ham") == 2
    assert "pip install 'flash-linear-attention" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        convert("--help")
    assert stop.value.code == 0
