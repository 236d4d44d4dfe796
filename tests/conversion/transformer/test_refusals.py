# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A source, a HAM or an argument that cannot be converted is refused, and nothing is left behind."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ham_hf import HAMForCausalLM
from ham_hf.conversion.verification import agree, compare_logits
from tests.conversion.transformer.sources import SOURCES, edit_config, only_sentencepiece, tokenizer_with_code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.model.layers[1].mixer.threshold.data.fill_(0.3), "threshold is above 0"),
        (
            lambda model: model.model.layers[1].mixer.kv_gate_proj.weight.data.fill_(0.1),
            "kv_gate_proj.weight is no longer",
        ),
        (lambda model: setattr(model.config, "threshold", 0.4), "`threshold` must still be None, got 0.4"),
    ],
)
def test_what_has_no_way_back(change, message, source, convert, tmp_path, capsys):
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    change(model)
    model.save_pretrained(tmp_path / "changed")
    (tmp_path / "changed/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "changed", tmp_path / "back", "--back") == 2
    assert message in capsys.readouterr().err


def test_a_wrong_mapping_is_not_written(source, module, convert, tmp_path, monkeypatch, capsys):
    pairs = module.shared_names

    def confused(config):
        swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for name, other in pairs(config):
            role = other.split(".")[-2]
            yield name, other.replace(role, swap.get(role, role))

    monkeypatch.setattr(module, "shared_names", confused)
    assert convert(source(SOURCES["llama"]), tmp_path / "ham") == 2
    assert "must agree" in capsys.readouterr().err
    assert not (tmp_path / "ham").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: edit_config(
                f, rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
            ),
            "`partial_rotary_factor` must be 1.0, got 0.5",
        ),
        (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), "`quantization_config`"),
        (lambda f: edit_config(f, model_type="gemma"), "got 'gemma'"),
        (lambda f: edit_config(f, attention_bias=True), "lacks 8 tensors"),
        (lambda f: edit_config(f, intermediate_size=81), "must have the shape"),
        (lambda f: edit_config(f, num_hidden_layers=1), "that the new model has no place for"),
        (
            lambda f: [path.unlink() for path in f.glob("*.safetensors*")],
            "without model.safetensors.",
        ),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "must hold all of its safetensors weights"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "../source/model.safetensors"}}'
            ),
            "must hold all of its safetensors weights",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "must hold a `weight_map`"),
        (
            lambda f: next(f.glob("*-00002-*.safetensors")).write_bytes(b"12345678{"),
            "model-00002-of-00004.safetensors is not a whole safetensors file",
        ),
        (
            lambda f: cut(next(f.glob("*-00003-*.safetensors"))),
            "model-00003-of-00004.safetensors is not a whole safetensors file",
        ),
        (lambda f: only_sentencepiece(f), "pip install sentencepiece protobuf. To convert the model without it add"),
        (lambda f: tokenizer_with_code(f), "is code in its repository, which a conversion does not run"),
        (lambda f: edit_config(f, vocab_size="many"), "vocab_size"),
        (lambda f: edit_config(f, model_type="theirs", auto_map={"AutoConfig": "code.Config"}), "got 'theirs'"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: edit_config(f, tie_word_embeddings=True), "must hold an lm_head.weight equal to its embeddings"),
    ],
)
def test_refusals(spoil, message, source, convert, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    folder = source(SOURCES["llama"])
    spoil(folder)
    assert convert(folder, tmp_path / "ham") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "ham").exists()


def test_infinite_logits_verify_nothing():
    expected = torch.tensor([[[1.0, torch.inf]]])
    figures = compare_logits(expected, torch.zeros(1, 1, 2))
    assert not agree(figures)
    assert not agree(compare_logits(expected * torch.nan, expected))
    assert agree(compare_logits(torch.ones(1, 1, 2), torch.ones(1, 1, 2)))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--verify-tokens", "0"),
        ("--verify-tokens", "3"),
        ("--verify-tokens=-5",),
        ("--max-shard-size", "abc"),
        ("--max-shard-size=-1GB",),
        ("--name", "a`name"),
        ("--name", ""),
    ],
)
def test_wrong_arguments(arguments, source, convert, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        convert(source(SOURCES["llama"]), tmp_path / "ham", *arguments)
    assert stop.value.code == 2
    assert "takes" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("name", ["no/such/folder", "./qwen", "a b"])
def test_a_source_that_cannot_be_on_the_hub(name, convert, tmp_path, capsys):
    assert convert(name, tmp_path / "ham") == 2
    assert f"must be a folder, or OWNER/NAME on the Hub, got {name!r}, which is neither" in capsys.readouterr().err


def test_a_resized_vocabulary_has_no_way_back(source, convert, tmp_path, capsys):
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    model.resize_token_embeddings(4100)
    model.save_pretrained(tmp_path / "changed")
    (tmp_path / "changed/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "changed", tmp_path / "back", "--back") == 2
    assert "`vocab_size` must still be 4096, got 4100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_window": 64}, "layer 1 must have its source's window of 9 and no sinks, got 64 and 0"),
        ({"attention_sinks": 4}, "layer 1 must have its source's window of 9 and no sinks, got 9 and 4"),
    ],
    ids=str,
)
def test_a_sliding_window_that_was_changed_has_no_way_back(changes, message, source, convert, tmp_path, capsys):
    assert convert(source(SOURCES["qwen2, sliding in one layer"]), tmp_path / "ham", "--no-verify") == 0
    edit_config(tmp_path / "ham", **changes)
    assert convert(tmp_path / "ham", tmp_path / "back", "--back") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--window", "--sinks"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5", str(2**24 + 1)])
def test_a_window_is_a_number_of_tokens(option, value, source, convert, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(source(SOURCES["llama"]), tmp_path / "ham", f"{option}={value}")
    assert f"argument {option}: got '{value}', takes a whole number from 0 to 16777216" in capsys.readouterr().err


def test_fp8_weights_are_refused(convert, tmp_path, capsys):
    AutoModelForCausalLM.from_config(SOURCES["llama"]).save_pretrained(tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path)
    assert convert(tmp_path / "source", tmp_path / "ham") == 2
    assert "F8_E4M3 for model.layers.0.mlp.up_proj.weight" in capsys.readouterr().err


def test_an_output_that_exists_is_left_alone(source, convert, tmp_path, capsys):
    (tmp_path / "ham").mkdir()
    assert convert(source(SOURCES["llama"]), tmp_path / "ham") == 2
    assert "`output` must not exist yet" in capsys.readouterr().err
    assert not list((tmp_path / "ham").iterdir())


def test_back_names_a_tensor_that_is_missing(source, convert, tensors_of, tmp_path, capsys):
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    tensors = tensors_of(tmp_path / "ham")
    del tensors["model.layers.1.mixer.threshold"]
    save_file(tensors, tmp_path / "ham/model.safetensors", {"format": "pt"})
    assert convert(tmp_path / "ham", tmp_path / "back", "--back") == 2
    assert "lacks the tensor model.layers.1.mixer.threshold" in capsys.readouterr().err


def test_a_folder_of_somebody_else_s_is_left_alone(source, convert, tmp_path, capsys):
    (tmp_path / "ham.partial").mkdir()
    (tmp_path / "ham.partial/thesis.tex").write_text("years of work")
    assert convert(source(SOURCES["llama"]), tmp_path / "ham") == 2
    assert "which exists" in capsys.readouterr().err
    assert (tmp_path / "ham.partial/thesis.tex").is_file()


def test_back_needs_a_conversion(source, convert, tmp_path, capsys):
    assert convert(source(SOURCES["llama"]), tmp_path / "back", "--back") == 2
    assert "without conversion.json" in capsys.readouterr().err
