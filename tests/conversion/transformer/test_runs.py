# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A run holds one shard in memory, goes on after it was stopped, and copies what lies beside the weights."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ham_hf import HAMForCausalLM
from ham_hf.conversion import run, shards
from ham_hf.conversion.command import main
from tests.conversion.transformer.sources import SHAPE, SOURCES, only_sentencepiece, tokenizer_with_code


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


@pytest.mark.parametrize("spoil", [only_sentencepiece, tokenizer_with_code])
def test_goes_on_without_a_tokenizer_that_cannot_be_read(spoil, source, convert, tmp_path, capsys):
    folder = source(SOURCES["llama"])
    spoil(folder)
    assert convert(folder, tmp_path / "ham", "--no-verify", "--no-tokenizer") == 0
    assert "Left the tokenizer out, as asked" in (said := capsys.readouterr().out)
    assert not list((tmp_path / "ham").glob("tokenizer*"))
    assert "ham-hf train" in said
    assert "model_cards/smollm2" in said
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


def test_the_card_does_not_tell_where_folders_lie(source, convert, tmp_path):
    folder = source(SOURCES["llama"]).rename(tmp_path / "a `source` | x")
    assert convert(folder, f"{tmp_path}/ham/", "--no-verify") == 0
    card = (tmp_path / "ham/README.md").read_text()
    assert str(tmp_path) not in card + (tmp_path / "ham/conversion.json").read_text()
    assert "Converted from `a 'source' | x`" in card
    command = card.split("```bash\n")[1].split("\n```")[0]
    assert command.startswith("python conversion_scripts/convert_transformer_to_ham.py ")
    assert command.endswith(" ham --no-verify")


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


def test_help(module, capsys):
    with pytest.raises(SystemExit) as stop:
        main(module.CONVERSION, module.__doc__, ["--help"])
    assert stop.value.code == 0
    assert "--back" in capsys.readouterr().out
