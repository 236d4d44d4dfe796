# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf calibrate`: a new checkpoint that differs in the calibration alone, or none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import ham_hf.cli as cli
from ham_hf import HAMForCausalLM
from ham_hf.evaluation.calibration import calibrate, spread_windows
from ham_hf.evaluation.importance import head_importance, needle_examples
from ham_hf.hub.checkpoint import read_checkpoint
from tests.cli.calls import refusal, save, tiny_model

LENGTH = ("--length", "600", "--windows", "2", "--needles", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.txt"
    path.write_text("".join(f"On day {n} the sea was grey, and {n * n} birds flew over it.\n" for n in range(40)))
    return path


@pytest.fixture
def folder(tmp_path, tokenizer):
    folder = tmp_path / "ham"
    save(folder, tokenizer, tiny_model(len(tokenizer), attention_window=8, attention_sinks=2))
    (folder / "notes").mkdir()
    (folder / "notes" / "told.txt").write_text("kept")
    (folder / "LICENSE").write_text("mine")
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def calibrated(capsys, *arguments):
    capsys.readouterr()  # what saving and loading said
    assert cli.main(["calibrate", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_new_folder_has_the_calibration_and_all_else_unchanged(capsys, folder, text, tmp_path):
    before, output = contents(folder), tmp_path / "deep" / "out"
    said = calibrated(capsys, folder, "--text", text, "--output", output, *LENGTH)
    assert contents(folder) == before
    after = contents(output)
    changed = {str(name) for name, data in after.items() if before.get(name) != data}
    assert changed == {"config.json", "model.safetensors", "heads.png"}
    assert before.keys() <= after.keys()
    assert after[Path("heads.png")].startswith(b"\x89PNG")
    assert "heads.png" in said
    old, new = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"model.layers.{n}.mixer.score_quantiles" for n in range(3)
    }
    old, new = (json.loads((x / "config.json").read_text()) for x in (folder, output))
    assert {name for name in new if old[name] != new[name]} == {"head_importance"}
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ") and "%" in line]
    kept = {row[0].strip(): float(row[1].strip(" %")) for row in rows}
    assert kept["100%"] == 100
    assert abs(kept["50%"] - 50) < 10
    assert kept["0%"] < 2, "the sinks"
    assert not list(output.parent.glob(".*"))


def test_it_is_what_the_library_measures(capsys, folder, text, tmp_path, tokenizer):
    calibrated(capsys, folder, "--text", text, "--output", tmp_path / "out", "--seed", "3", "--router", "l2", *LENGTH)
    model = HAMForCausalLM.from_pretrained(folder, router="l2")
    tokens = tokenizer(text.read_text())["input_ids"]
    used = tokens[: -max(600, len(tokens) // 5)]
    importance = head_importance(model, needle_examples(tokenizer, used, 2, 600, 3))
    calibrate(model, spread_windows(used, 600, 2))
    found = HAMForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.router == "l2"
    assert torch.tensor(found.config.head_importance).allclose(importance, rtol=1e-3)
    for ours, theirs in zip(found.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.mixer.score_quantiles, theirs.mixer.score_quantiles)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_prompts_of_ones_own_and_none_at_all(capsys, folder, text, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": text.read_text()[:120] + "The sea is", "answer": " grey"}) + "\n")
    calibrated(capsys, folder, "--text", text, "--prompts", prompts, "--in-place", *LENGTH)
    first = json.loads((folder / "config.json").read_text())["head_importance"]
    assert [len(layer) for layer in first] == [2, 2, 2]
    assert any(x > 0 for layer in first for x in layer)
    (folder / "heads.png").unlink()
    said = calibrated(capsys, folder, "--text", text, "--no-importance", "--in-place", *LENGTH)
    assert json.loads((folder / "config.json").read_text())["head_importance"] == first, "left as it was"
    assert "Wrote" in said
    assert (folder / "notes" / "told.txt").read_text() == "kept"


def test_shards_keep_their_places(capsys, folder, text, tokenizer):
    model = HAMForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    before = contents(folder)
    assert sum(name.suffix == ".safetensors" for name in before) > 3
    calibrated(capsys, folder, "--text", text, "--in-place", "--no-importance", *LENGTH)
    assert contents(folder).keys() == before.keys()
    assert read_checkpoint(folder).calibrated


def test_a_card_that_the_command_wrote_is_written_anew_and_any_other_stays(capsys, folder, text, tmp_path):
    assert cli.main(["card", str(folder)]) == 0
    capsys.readouterr()
    assert "not calibrated" in (folder / "README.md").read_text()
    said = calibrated(capsys, folder, "--text", text, "--output", tmp_path / "one", *LENGTH)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "README.md" in said
    assert "not calibrated" not in card
    assert "by the importance of the heads" in card
    assert "](heads.png)" in card
    (folder / "README.md").write_text("# Mine\n")
    said = calibrated(capsys, folder, "--text", text, "--output", tmp_path / "two", *LENGTH)
    assert (tmp_path / "two" / "README.md").read_text() == "# Mine\n"
    assert f"ham-hf card {tmp_path / 'two'}" in said
    assert cli.main(["card", str(tmp_path / "two"), "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "heads.png").read_bytes() == (tmp_path / "two" / "heads.png").read_bytes()


@pytest.mark.parametrize("in_place", [False, True])
def test_an_interrupted_call_leaves_all_as_it_was(capsys, folder, text, tmp_path, monkeypatch, in_place):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ham_hf.hub.calibrated.plot_heads", interrupted)
    before = contents(tmp_path)
    target = ["--in-place"] if in_place else ["--output", str(tmp_path / "out")]
    assert cli.main(["calibrate", str(folder), "--text", str(text), *target, *LENGTH]) == 130
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"ham"}


def test_refused_calls(capsys, folder, text, tmp_path, tokenizer):
    def message(*arguments):
        capsys.readouterr()
        return refusal(capsys, "calibrate", *arguments)

    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}\n")
    output = ("--output", tmp_path / "out")
    assert "--text" in message(folder, *output)
    assert "--output" in message(folder, "--text", text)
    assert "not allowed with" in message(folder, "--text", text, "--in-place", *output)
    assert "exists, takes a new folder" in message(folder, "--text", text, "--output", tmp_path)
    assert "argument MODEL" in message(tmp_path / "missing", "--text", text, *output)
    assert "there is no" in message(folder, "--text", tmp_path / "missing.txt", *output)
    assert "takes at least 8192" in message(folder, "--text", text, *output, "--length", "4096")
    assert "line 1, must be" in message(folder, "--text", text, *output, "--prompts", wrong, *LENGTH)
    assert "must leave room" in message(folder, "--text", text, *output, "--length", "40")
    assert "invalid choice" in message(folder, "--text", text, *output, "--router", "learned")
    learned = tmp_path / "learned"
    save(learned, tokenizer, tiny_model(len(tokenizer), router="learned"))
    assert "has learned to route" in message(learned, "--text", text, *output, "--router", "l2")
    shutil.rmtree(learned)
    weights = load_file(folder / "model.safetensors")
    save_file({x: y for x, y in weights.items() if "norm" not in x}, folder / "model.safetensors")
    assert "argument MODEL" in message(folder, "--text", text, *output)
    assert not (tmp_path / "out").exists()
