# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf inspect`: pictures, a page and a table of any text, and refusals of one line."""

import io
import sys

import pytest
import torch

import ham_hf.cli as cli
from ham_hf import HAMForCausalLM
from ham_hf.cli import text as cli_text
from tests.cli.calls import PROMPT, refusal, save, tiny_model

FIGURES = ["kept", "usage", "scores", "decay"]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr("ham_hf.inspection.figures.DPI", 20)


def inspect(capsys, *arguments):
    """A call that must succeed without a word on stderr; returns what it printed."""
    capsys.readouterr()
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def names(*figures, prefix=""):
    return {f"{prefix}{x}.{suffix}" for x in figures for suffix in ("png", "svg")}


def test_pictures_and_page_at_two_thresholds(capsys, checkpoint, tokenizer, tmp_path):
    file, out = tmp_path / "letter.txt", tmp_path / "a" / "b"
    file.write_text(PROMPT, encoding="utf-8")
    options = ("--threshold", 0.5, 2, "--layers", 1, "--query", 20)
    said = inspect(capsys, file, "--model", checkpoint, *options, "--output", out)
    figures = [*FIGURES, "attention-layer-1"]
    expected = names(*figures, prefix="threshold-0.5-") | names(*figures, prefix="threshold-2-") | {"page.html"}
    assert {x.name for x in out.iterdir()} == expected
    with torch.no_grad():
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        usage = HAMForCausalLM.from_pretrained(checkpoint)(ids, use_cache=True, threshold=0.5).cache.kv_usage()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in said.splitlines()[2:4]]
    assert rows == [["threshold 0.5", *[f"{usage.mean():.1%}"] * 2], ["threshold 2", "0.0%", "0.0%"]]
    assert f"Wrote page.html and the pictures in {out}" in said
    page = (out / "page.html").read_text(encoding="utf-8")
    assert page.count("<section") == 2
    assert "position 20 reads in layer 1" in page
    assert "“" in page


def test_a_router_by_age_with_a_budget(capsys, tokenizer, tmp_path):
    kinds = ["hybrid", "linear_attention", "hybrid"]
    model = tiny_model(len(tokenizer), router="recency", layer_types=kinds, attention_window=3, attention_sinks=1)
    folder = save(tmp_path / "model", tokenizer, model)
    text = PROMPT.replace("\n", " ")
    options = ("--threshold", 0, "--kv-budget", 8, "--length", 40, "--span", 10, 40)
    said = inspect(capsys, text, "--model", folder, *options, "--output", tmp_path / "out")
    assert {x.name for x in (tmp_path / "out").iterdir()} == names(*FIGURES) | {"page.html"}
    # 7 of the 30 tokens drawn: the last 7, without the sink.
    assert said.splitlines()[2].startswith("| threshold 0, kv-budget 8 | 23.3% | 23.3% |")
    total = len(tokenizer(text).input_ids)
    assert f"The text has {total} tokens; the first 40 were read (--length reads more)." in said
    assert "Not drawn, because they do not route: layers 1 (linear_attention)." in said
    assert "No attention is drawn with --kv-budget." in said
    message = refusal(capsys, "inspect", text, "--model", folder, "--layers", 1, "--output", tmp_path / "x")
    assert "got 1 of type 'linear_attention', takes numbers of hybrid layers: 0, 2" in message
    message = refusal(capsys, "inspect", text, "--model", folder, "--kv-budget", 4, "--output", tmp_path / "x")
    assert "takes more than the 4 tokens of window and sinks" in message


def test_settings_written_alike_are_one(capsys, calibrated_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a “few” words".encode())))
    options = ("--kv-usage", 0.5, 0.5000000001, "--layers", 0, "--heads", 1)
    inspect(capsys, "-", "--model", calibrated_checkpoint, *options, "--output", tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == names(*FIGURES, "attention-layer-0") | {"page.html"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--threshold", "nan"], ["--threshold", "'nan'"]),
        (["--threshold", "0.5", "--kv-usage", "0.5"], ["--kv-usage", "--threshold"]),
        (["--kv-usage", "0.5"], ["--kv-usage", "not calibrated"]),
        (["--kv-usage", "2"], ["--kv-usage", "'2'", "0 to 1"]),
        (["--kv-budget", "4", "--query", "1"], ["--query", "--kv-budget"]),
        (["--layers", "3"], ["--layers", "got 3, takes numbers of hybrid layers: 0, 1, 2"]),
        (["--layers", "-1"], ["--layers", "'-1'"]),
        (["--heads", "2"], ["--heads", "got 2", "0 to 1"]),
        (["--query", "500"], ["--query", "got 500", "from 0 to"]),
        (["--query", "3", "--span", "5", "9"], ["--query", "got 3", "from 5"]),
        (["--span", "9", "9"], ["--span", "got 9 9", "FIRST < END"]),
        (["--span", "0", "5000"], ["--span", "got 0 5000"]),
        (["--length", "0"], ["--length", "'0'"]),
        (["--model", "nowhere"], ["--model", "'nowhere' is not a folder"]),
        (["--device", "abacus"], ["--device", "'abacus'"]),
        (["--lay", "1"], ["--lay"]),
    ],
)
def test_refused_arguments(capsys, checkpoint, tmp_path, arguments, expected):
    call = ("inspect", PROMPT, "--model", checkpoint, "--output", tmp_path / "out", *arguments)
    message = refusal(capsys, *call)
    assert all(part in message for part in expected), message
    assert not (tmp_path / "out").exists()


def test_refused_texts(capsys, checkpoint, tmp_path, monkeypatch):
    def message(text):
        return refusal(capsys, "inspect", text, "--model", checkpoint, "--output", tmp_path / "out")

    for name, content in {
        "latin": b"caf\xe9", "binary": b"a\0b" * 40, "empty": b" \n", "huge": b"word " * 300,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(cli_text, "MOST_BYTES", 2**10)
    assert "not UTF-8" in message(tmp_path / "latin")
    assert "NUL characters" in message(tmp_path / "binary")
    assert "empty" in message(tmp_path / "empty")
    assert "takes less" in message(tmp_path / "huge")
    assert "takes less" in message("word " * 300)
    assert "empty" in message("  ")
    assert "not UTF-8" in message("caf\udce9 or not")
    assert "is not a file" in message(tmp_path)
    for name in ("missing.txt", tmp_path / "missing"):
        assert "does not exist" in message(name)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "empty" in message("-")
    assert not (tmp_path / "out").exists()


def test_refused_folders_and_a_missing_library(capsys, checkpoint, tmp_path, monkeypatch):
    call = ("inspect", PROMPT, "--model", checkpoint)
    assert "--output" in refusal(capsys, *call)
    (tmp_path / "file").write_text("")
    assert "is a file, takes a folder" in refusal(capsys, *call, "--output", tmp_path / "file")
    assert "argument --output" in refusal(capsys, *call, "--output", tmp_path / "file" / "inside")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refusal(capsys, *call, "--output", tmp_path / "out")
    assert "need matplotlib (pip install 'ham-hf[eval]')" in message
