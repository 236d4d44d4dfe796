# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Llama, Mistral, Qwen2 and Qwen3 become HAMs that compute the same, and come back bit for bit; else a refusal."""

import json
import os
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import ham_hf
from ham_hf import HAMForCausalLM
from ham_hf.conversion import run, shards
from ham_hf.conversion.command import main
from ham_hf.conversion.verification import agree, compare_logits, shapes_of, transformers_model

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SOURCES = {
    "llama": LlamaConfig(**SHAPE),
    "llama, a key/value head each": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "llama, one key/value head, tied": LlamaConfig(**SHAPE | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "llama, biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, wide heads, scaled RoPE": LlamaConfig(**SHAPE, head_dim=20, rope_parameters=LLAMA3),
    "llama, no padding": LlamaConfig(**SHAPE | {"pad_token_id": -1}),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "mistral, a window that is never left": MistralConfig(**SHAPE, sliding_window=512),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3, biased, tied, yarn": Qwen3Config(
        **SHAPE, head_dim=8, attention_bias=True, tie_word_embeddings=True, rope_parameters=YARN, hidden_act="gelu"
    ),
}


@pytest.fixture
def module(script):
    return script("convert_transformer_to_ham")


@pytest.fixture
def convert(module):
    """A function that runs the script and returns its exit status."""
    return lambda *arguments: main(module.CONVERSION, module.__doc__, [str(x) for x in arguments])


@pytest.fixture
def source(tmp_path, randomised):
    """A function that saves a random model of a configuration in several shards, with a tokenizer."""

    def save(config, dtype=torch.float32):
        model = randomised(AutoModelForCausalLM.from_config(config)).to(dtype)
        model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
        checkpoint = f"{ham_hf.__path__[0]}/checkpoints/ham-tiny"
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "source")
        assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
        return tmp_path / "source"

    return save


def logits(folder, tokens, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens, **arguments).logits


@pytest.mark.parametrize("name", SOURCES)
def test_computes_the_same_and_comes_back(name, source, convert, tensors_of, tmp_path):
    """Largest difference over all of these: 4e-6, of logits up to 4."""
    folder, ham, back = source(SOURCES[name]), tmp_path / "ham", tmp_path / "back"
    assert convert(folder, ham) == 0
    tokens = torch.randint(4096, (2, 131))
    expected = logits(folder, tokens)
    torch.testing.assert_close(logits(ham, tokens), expected, rtol=0, atol=1e-4)
    assert logits(ham, tokens, threshold=0.5).sub(expected).abs().max() > 1e-2, "the threshold decides nothing"

    record = json.loads((ham / "conversion.json").read_text())
    assert record["source"]["architecture"] == record["verification"]["source_code"]
    assert 0 <= record["verification"]["max_abs_logit_error"] < 1e-4

    assert convert(ham, back, "--back") == 0
    assert (back / "config.json").read_text() == (folder / "config.json").read_text()
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bfloat16_stays_and_comes_back(source, convert, tensors_of, tmp_path):
    folder = source(SOURCES["qwen3, biased, tied, yarn"], torch.bfloat16)
    assert convert(folder, tmp_path / "ham") == 0
    dtypes = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in tensors_of(tmp_path / "ham").items()}
    float32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert float32 == {"A_log", "dt_bias", "threshold", "score_quantiles"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert HAMForCausalLM.from_pretrained(tmp_path / "ham").dtype == torch.bfloat16
    assert convert(tmp_path / "ham", tmp_path / "back", "--back") == 0
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[key], after[key]) for key in before | after)


def test_generates_the_source_s_text(source, convert, tmp_path):
    """Greedy text of left-padded rows, through the cache that the HAM fills; tokenizer and settings came along."""
    folder = source(SOURCES["qwen3"])
    assert convert(folder, tmp_path / "ham") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ham")
    batch = tokenizer(
        ["The captain looked at the sea, and", "It is"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    texts = []
    for path in (folder, tmp_path / "ham"):
        model = AutoModelForCausalLM.from_pretrained(path)
        out = model.generate(
            **batch, max_new_tokens=40, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        texts.append(out.sequences)
    assert type(out.cache).__name__ == "HAMCache"
    assert out.cache.kv_usage().min() == 1
    assert torch.equal(*texts)
    assert (tmp_path / "ham/generation_config.json").is_file()


def test_the_card_says_where_it_comes_from(source, convert, tmp_path):
    folder = source(SOURCES["llama"])
    licence = {"license": "other", "license_name": "so-and-so", "license_link": "https://example.org/licence"}
    stated = "\n".join(f"{name}: {value}" for name, value in licence.items())
    (folder / "README.md").write_text(f"---\n{stated}\n---\n# A model\n")
    assert convert(folder, tmp_path / "ham", "--name", "somebody/a-model") == 0
    card = ModelCard.load(tmp_path / "ham/README.md")
    assert licence.items() <= card.data.to_dict().items()
    assert "other, so-and-so, https://example.org/licence" in card.text
    assert card.data.base_model == "somebody/a-model"
    verification = json.loads((tmp_path / "ham/conversion.json").read_text())["verification"]
    assert f"| largest difference of a logit | {verification['max_abs_logit_error']:.1e} |" in card.text
    assert "--name somebody/a-model" in card.text


def test_an_rnn_that_opens_is_heard_and_not_taken_back(source, convert, tmp_path, capsys):
    """The RNN starts from the source's q, k and v: with its gate open the logits move; there is no way back then."""
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    assert "Not verified" in capsys.readouterr().out
    assert json.loads((tmp_path / "ham/conversion.json").read_text())["verification"] is None
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    tokens = torch.randint(4096, (1, 40))
    before = model(input_ids=tokens).logits
    for layer in model.model.layers:
        layer.mixer.rnn_gate_proj.bias.data.fill_(0.0)
    assert (model(input_ids=tokens).logits - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "opened")
    (tmp_path / "opened/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "opened", tmp_path / "back", "--back") == 2
    assert "rnn_gate_proj.bias is above" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_training_finds_the_rnn_once_its_gate_is_opened(source, convert, tmp_path):
    """What the README advises: opening costs next to nothing, and then the gate has a gradient and the RNN learns."""
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham").train()
    model.config.target_kv_usage = 0.25
    tokens = torch.randint(64, (4, 48), generator=torch.Generator().manual_seed(0))
    gates = [layer.mixer.rnn_gate_proj for layer in model.model.layers]
    losses, gradients = [], []
    for bias in (-20.0, -4.0):
        for gate in gates:
            gate.bias.data.fill_(bias)
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        gradients.append(torch.autograd.grad(losses[-1], gates[0].weight)[0].norm())
    assert (losses[1] - losses[0]).abs() < 0.01 * losses[0]
    assert gradients[0] < 1e-6 * gradients[1]

    thresholds = [x for name, x in model.named_parameters() if name.endswith(".threshold")]
    others = [x for name, x in model.named_parameters() if not name.endswith(".threshold")]
    groups = [{"params": others, "lr": 1e-3}, {"params": thresholds, "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    moved = {name: (x.detach() - before[name]).abs().max().item() for name, x in model.named_parameters()}
    assert loss < losses[1] - 1
    assert all(moved[name] > 0.1 for name in moved if name.endswith(".threshold"))
    of_the_rnn = [x for name, x in moved.items() if name.endswith(("rnn_gate_proj.weight", "A_log", "b_proj.weight"))]
    assert len(of_the_rnn) == 6
    # Thirty steps of 1e-3 at most.
    assert min(of_the_rnn) > 5e-3


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


def test_holds_no_more_than_a_shard(source, convert, tmp_path, monkeypatch):
    """At most the tensors of one shard and one more are in memory, of a model of many shards."""
    alive, peak = {}, []
    get = shards.Weights.get

    def counted(self, name):
        tensor = get(self, name)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        peak.append(sum(alive.values()))
        return tensor

    monkeypatch.setattr(shards.Weights, "get", counted)
    folder = source(LlamaConfig(**SHAPE | {"num_hidden_layers": 8}))
    assert convert(folder, tmp_path / "ham", "--max-shard-size", "100KB", "--no-verify") == 0
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    embedding = 4096 * 48 * 4
    assert max(peak) <= max(100_000, embedding) + embedding
    assert total > 2 * max(peak)


def test_interrupted_and_gone_on_with(source, convert, tensors_of, tmp_path, monkeypatch, capsys):
    folder = source(SOURCES["llama"])
    assert convert(folder, tmp_path / "whole", "--max-shard-size", "100KB") == 0
    written = []

    def stop_at_third(tensors, path, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name.split(".")[0])
        save_file(tensors, path, **options)

    monkeypatch.setattr(shards, "save_file", stop_at_third)
    assert convert(folder, tmp_path / "ham", "--max-shard-size", "100KB") == 130
    assert not (tmp_path / "ham").exists()
    monkeypatch.setattr(
        shards, "save_file", lambda *a, **k: (written.append(a[1].name.split(".")[0]), save_file(*a, **k))
    )
    assert convert(folder, tmp_path / "ham", "--max-shard-size", "100KB") == 0
    assert "Goes on with" in capsys.readouterr().out
    assert len(written) == len(set(written)) == len(list((tmp_path / "ham").glob("*.safetensors")))
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "ham")
    assert all(torch.equal(first[key], second[key]) for key in first | second)

    # With other options it does not go on.
    written.clear()
    monkeypatch.setattr(shards, "save_file", stop_at_third)
    assert convert(folder, tmp_path / "again", "--max-shard-size", "200KB") == 130
    monkeypatch.setattr(shards, "save_file", save_file)
    assert convert(folder, tmp_path / "again", "--max-shard-size", "100KB") == 0
    assert "Goes on with" not in capsys.readouterr().out


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


def only_sentencepiece(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")


def tokenizer_with_code(folder):
    only_sentencepiece(folder)
    config = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_config(f, model_type="mistral", sliding_window=64), "`sliding_window` must be None"),
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


@pytest.mark.parametrize("spoil", [only_sentencepiece, tokenizer_with_code])
def test_goes_on_without_a_tokenizer_that_cannot_be_read(spoil, source, convert, tmp_path, capsys):
    folder = source(SOURCES["llama"])
    spoil(folder)
    assert convert(folder, tmp_path / "ham", "--no-verify", "--no-tokenizer") == 0
    assert "Left the tokenizer out, as asked" in (said := capsys.readouterr().out)
    assert not list((tmp_path / "ham").glob("tokenizer*"))
    assert "ham-hf train" in said
    assert f"distillation: {{teacher: {folder}}}" in said


def test_both_copies_of_a_tied_head(source, convert, tensors_of, tmp_path):
    folder = source(SOURCES["qwen2"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"]}, folder / "head.safetensors")
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(folder, tmp_path / "ham") == 0
    assert "lm_head.weight" not in tensors_of(tmp_path / "ham")


def test_reads_the_weights_that_transformers_reads(convert, tensors_of, tmp_path):
    """The single file, where a shard and its index lie beside it from before."""
    folder = tmp_path / "source"
    AutoModelForCausalLM.from_config(SOURCES["llama"]).save_pretrained(folder)
    before = tensors_of(folder)
    save_file({name: tensor * 0 for name, tensor in before.items()}, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(before, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors_of(tmp_path / "ham")[name], before[name])


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


def test_a_card_without_readable_metadata_costs_the_licence_only(source, convert, tmp_path, capsys):
    folder = source(SOURCES["llama"])
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n")
    (folder / "LICENSES").mkdir()
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    assert "Takes no licence from the source's card" in capsys.readouterr().out
    assert ModelCard.load(tmp_path / "ham/README.md").data.license is None


def test_what_cannot_be_copied_is_known_before_weights_are_written(source, convert, tmp_path):
    folder = source(SOURCES["llama"])
    (folder / "tokenizer.json").write_text("{")
    assert convert(folder, tmp_path / "ham") == 2
    assert not list((tmp_path / "ham.partial").glob("*.safetensors"))


def test_killed_at_any_stage(source, convert, tensors_of, tmp_path, monkeypatch):
    """Whatever stops a run, even amid the bookkeeping, the same command goes on; nothing of it stays behind."""
    folder = source(SOURCES["llama"])
    arguments = (folder, tmp_path / "ham", "--max-shard-size", "100KB", "--no-verify")

    class Killed(BaseException):
        """Not caught, as a signal that cannot be caught is not."""

    def killed(*arguments, **named):
        raise Killed

    def kill_at(place, name, stand_in=killed):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stand_in)
            with pytest.raises(Killed):
                convert(*arguments)

    def mkdir(self, *arguments, _mkdir=Path.mkdir, **named):
        _mkdir(self, *arguments, **named)
        if self.name == "ham.partial":
            raise Killed

    kill_at(Path, "mkdir", mkdir)
    kill_at(run, "write_shards")
    kill_at(shards, "save_file")
    kill_at(run, "build_card")
    (folder / "config.json").touch()  # another source, so that what is there is removed
    kill_at(shutil, "rmtree")
    kill_at(os, "replace")
    kill_at(run, "write_whole")
    assert not (tmp_path / "ham").exists()
    assert convert(*arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "ham"}
    assert not [path.name for path in (tmp_path / "ham").iterdir() if "writing" in path.name or "partial" in path.name]
    assert tensors_of(tmp_path / "ham").keys() == set(HAMForCausalLM.from_pretrained(tmp_path / "ham").state_dict())


def test_comes_back_after_training_has_set_its_fields(source, convert, tensors_of, tmp_path, capsys):
    """As `Trainer` does: no cache, the tokenizer's special tokens; and saved anew in other shards."""
    folder = source(SOURCES["llama"])
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    model.config.use_cache, model.config.pad_token_id, model.config.eos_token_id = False, 3, [0, 2]
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    assert convert(tmp_path / "tuned", tmp_path / "back", "--back") == 2
    assert "copy that file from the folder that it was loaded from" in capsys.readouterr().err
    (tmp_path / "tuned/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "tuned", tmp_path / "back", "--back") == 0
    before, after = tensors_of(folder), tensors_of(tmp_path / "back")
    assert {name for name in before | after if not torch.equal(before[name], after[name])} == {
        "model.layers.0.mlp.up_proj.weight"
    }


def test_a_resized_vocabulary_has_no_way_back(source, convert, tmp_path, capsys):
    assert convert(source(SOURCES["llama"]), tmp_path / "ham", "--no-verify") == 0
    model = HAMForCausalLM.from_pretrained(tmp_path / "ham")
    model.resize_token_embeddings(4100)
    model.save_pretrained(tmp_path / "changed")
    (tmp_path / "changed/conversion.json").write_bytes((tmp_path / "ham/conversion.json").read_bytes())
    assert convert(tmp_path / "changed", tmp_path / "back", "--back") == 2
    assert "`vocab_size` must still be 4096, got 4100" in capsys.readouterr().err


def test_the_card_does_not_tell_where_folders_lie(source, convert, tmp_path):
    folder = source(SOURCES["llama"]).rename(tmp_path / "a `source` | x")
    assert convert(folder, f"{tmp_path}/ham/", "--no-verify") == 0
    card = (tmp_path / "ham/README.md").read_text()
    assert str(tmp_path) not in card + (tmp_path / "ham/conversion.json").read_text()
    assert "Converted from `a 'source' | x`" in card
    command = card.split("```bash\n")[1].split("\n```")[0]
    assert command.startswith("python conversion_scripts/convert_transformer_to_ham.py ")
    assert command.endswith(" ham --no-verify")


def test_qwen2_with_windows_is_refused(convert, tmp_path, capsys):
    config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "ham") == 2
    assert "`sliding_window`" in capsys.readouterr().err


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


def test_generation_settings_come_along(source, convert, tmp_path):
    """Also those that Transformers would not save; a HAM's own do not go back to its source."""
    folder = source(SOURCES["llama"])
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 7, "do_sample": False}))
    assert convert(folder, tmp_path / "ham", "--no-verify") == 0
    path = tmp_path / "ham/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": 0.0}))
    settings = HAMForCausalLM.from_pretrained(tmp_path / "ham").generation_config
    assert (settings.top_k, settings.threshold) == (7, 0.0)
    assert convert(tmp_path / "ham", tmp_path / "back", "--back") == 0
    settings = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert settings["top_k"] == 7
    assert "threshold" not in settings
    assert not (tmp_path / "back/card.json").exists()


def test_a_folder_of_somebody_else_s_is_left_alone(source, convert, tmp_path, capsys):
    (tmp_path / "ham.partial").mkdir()
    (tmp_path / "ham.partial/thesis.tex").write_text("years of work")
    assert convert(source(SOURCES["llama"]), tmp_path / "ham") == 2
    assert "which exists" in capsys.readouterr().err
    assert (tmp_path / "ham.partial/thesis.tex").is_file()


def test_back_needs_a_conversion(source, convert, tmp_path, capsys):
    assert convert(source(SOURCES["llama"]), tmp_path / "back", "--back") == 2
    assert "without conversion.json" in capsys.readouterr().err


# What the configurations of released models say, in the form of their day.
RELEASED = {
    "Llama 2 7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "vocab_size": 32000,
    },
    "Llama 3.2 1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009],
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "Qwen2.5 7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
    },
}


@pytest.mark.parametrize(("name", "billions"), [("Llama 2 7B", 6.74), ("Llama 3.2 1B", 1.24), ("Qwen2.5 7B", 7.62)])
def test_shapes_of_released_models(name, billions, module):
    """Every tensor of both sides has its rule, without any weight; the source has as many as its name says."""
    source = AutoConfig.for_model(**RELEASED[name])
    config = module.ham_config(source)
    ham, back = module.to_ham(source, config), module.from_ham(source, config)
    shapes = shapes_of(transformers_model, source)
    assert {rule.name for rule in ham} == shapes_of(HAMForCausalLM, config).keys()
    assert {rule.name for rule in back} == shapes.keys()
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e9, 2) == billions


def test_help(module, capsys):
    with pytest.raises(SystemExit) as stop:
        main(module.CONVERSION, module.__doc__, ["--help"])
    assert stop.value.code == 0
    assert "--back" in capsys.readouterr().out
