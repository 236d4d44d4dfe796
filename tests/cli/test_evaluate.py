# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf evaluate` and `ham-hf sweep`: any model on any text, and a card from what they write."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ham_hf.cli as cli
from ham_hf import HAMForCausalLM
from ham_hf.evaluation.texts import text_windows
from ham_hf.files import read_rows
from tests.cli.calls import refusal, save, tiny_model

SIZE = ("--length", "64", "--windows", "3")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "sea.txt").write_text("".join(f"On day {n} the sea was grey. " for n in range(20)))
    (folder / "more.jsonl").write_text(json.dumps({"text": "Nobody spoke; the wind rose, and rose. " * 4}) + "\n")
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    assert cli.main([str(x) for x in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def results_of(folder, name="usage.json"):
    return json.loads((folder / name).read_text())["results"]


def test_a_calibrated_model_is_measured_at_usages(capsys, calibrated_checkpoint, text, tmp_path, tokenizer):
    said = run(capsys, "evaluate", calibrated_checkpoint, "--text", text, "--output", tmp_path / "out", *SIZE)
    results = results_of(tmp_path / "out")
    assert [x["kv_usage"] for x in results] == [1.0, 0.75, 0.5, 0.25, 0.1, 0.0, None]
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"usage.json", "usage.md", "usage.png", "windows.jsonl"}
    assert (tmp_path / "out" / "usage.md").read_text() in said
    texts = [json.loads((text / "more.jsonl").read_text())["text"], (text / "sea.txt").read_text()]
    windows = text_windows(tokenizer, texts, 64, 3)
    model = HAMForCausalLM.from_pretrained(calibrated_checkpoint)
    for x in (results[0], results[3]):
        for loss, window in zip(x["losses"], windows.split(1), strict=True):
            expected = model(window, labels=window, kv_usage=x["kv_usage"]).loss.item()
            assert loss == pytest.approx(expected, rel=1e-5)


def test_the_card_takes_what_was_measured(capsys, calibrated_checkpoint, text, tmp_path):
    options = ("--kv-usage", "0.5", "--threshold", "0.5", "--kv-budget", "8")
    run(capsys, "evaluate", calibrated_checkpoint, "--text", text, "--output", tmp_path, *options, *SIZE)
    (tmp_path / "card.json").write_text(json.dumps({"evaluation": {"dataset": "Sea", "type": "sea"}}))
    run(capsys, "card", calibrated_checkpoint, "--results", tmp_path, "--output", tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert (tmp_path / "usage.md").read_text().split("\n\n")[0] in card
    for name in ("asked to keep 50%", "(nats/token), at threshold 0.5", "at threshold 0, budget 8"):
        assert name in card.replace("\n ", "")


def test_thresholds_of_an_uncalibrated_model_and_more_settings_later(capsys, checkpoint, text, tmp_path):
    call = ("evaluate", checkpoint, "--text", text / "sea.txt", "--output", tmp_path, *SIZE)
    run(capsys, *call, "--threshold", "0.5")
    assert [x["threshold"] for x in results_of(tmp_path)] == [0.0, 0.5]
    rows = read_rows(tmp_path / "windows.jsonl")
    run(capsys, *call)
    assert [x["threshold"] for x in results_of(tmp_path)] == [0.0, 0.25, 0.5, 0.75, 1.01, None]
    assert read_rows(tmp_path / "windows.jsonl")[: len(rows)] == rows
    assert len(read_rows(tmp_path / "windows.jsonl")) == 1 + 6 * 3


def test_another_model_is_measured_as_it_is(capsys, text, tmp_path, tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = save(tmp_path / "llama", tokenizer, LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)))
    said = run(capsys, "evaluate", folder, "--text", text, "--output", tmp_path / "out", "--batch", "2", *SIZE)
    assert "| the model |" in said
    (found,) = results_of(tmp_path / "out")
    assert found["kv_bytes"] == 2 * 2 * 64 * 32 * 4
    assert not (tmp_path / "out" / "usage.png").exists()
    message = refusal(
        capsys, "evaluate", folder, "--text", text, "--output", tmp_path / "x", "--threshold", "0", *SIZE
    )
    assert "a model of type 'llama' takes none" in message


def test_a_router_by_age_is_measured_at_budgets(capsys, text, tmp_path, tokenizer):
    folder = save(tmp_path / "recency", tokenizer, tiny_model(len(tokenizer), router="recency"))
    run(capsys, "evaluate", folder, "--text", text, "--output", tmp_path / "out", *SIZE)
    assert [(x["kv_budget"], x["usage"]) for x in results_of(tmp_path / "out")] == [
        (64, 1.0), (32, 0.5), (16, 0.25), (8, 0.125),
    ]  # fmt: skip
    message = refusal(capsys, "sweep", folder, "--text", text, "--output", tmp_path / "x", *SIZE)
    assert "got a router 'recency', takes a HAM with scores" in message


def test_a_sweep_names_the_smallest_memory(capsys, calibrated_checkpoint, text, tmp_path):
    call = ("sweep", calibrated_checkpoint, "--text", text, "--output", tmp_path, "--steps", "2", *SIZE)
    said = run(capsys, *call, "--allow", "0.1%")
    results = results_of(tmp_path, "sweep.json")
    lines = [line for line in said.splitlines() if line.startswith(("kv_usage=", "threshold="))]
    assert len(lines) == 2
    assert "(0.10% allowed)" in lines[0]
    base = results[0]["loss"]
    asked = float(lines[0].removeprefix("kv_usage=").partition(":")[0])
    within = {x["kv_usage"]: x["loss"] / base - 1 <= 0.001 for x in results if x["kv_usage"] is not None}
    assert within[asked]
    assert all(ok for usage, ok in within.items() if usage > asked)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = read_rows(tmp_path / "windows.jsonl")
    assert run(capsys, *call, "--allow", "0.1%") == said
    assert read_rows(tmp_path / "windows.jsonl") == rows, "nothing is measured twice"


def test_retrieval_at_thresholds(capsys, checkpoint, text, tmp_path):
    options = ("--tasks", "niah_single_1", "--length", "1000", "--samples", "1", "--threshold", "1.01")
    said = run(capsys, "ruler", checkpoint, "--text", text, "--output", tmp_path, *options)
    assert {x.name for x in tmp_path.iterdir()} == {"ruler.json", "ruler.md", "ruler.png", "samples.jsonl"}
    assert (tmp_path / "ruler.md").read_text() in said
    assert [(x["threshold"], x["held"]) for x in results_of(tmp_path, "ruler.json")] == [(0.0, 1.0), (1.01, 0.0)]
    assert len(read_rows(tmp_path / "samples.jsonl")) == 1 + 2
    message = refusal(capsys, "ruler", checkpoint, "--output", tmp_path / "x", "--length", "200", "--samples", "1")
    assert "`length` must be at least" in message
    assert "invalid choice" in refusal(capsys, "ruler", checkpoint, "--output", tmp_path, "--tasks", "qa")


def test_a_budget_that_the_window_fills_is_refused(capsys, text, tmp_path, tokenizer):
    folder = save(tmp_path / "windows", tokenizer, tiny_model(len(tokenizer), attention_window=6, attention_sinks=2))
    calls = (
        ("generate", "Hello there", "--model", folder),
        ("evaluate", folder, "--text", text, "--output", tmp_path / "x", *SIZE),
        ("ruler", folder, "--output", tmp_path / "x", "--tasks", "niah_single_1"),
    )
    for call in calls:
        capsys.readouterr()  # what saving and loading said
        message = refusal(capsys, *call, "--kv-budget", "8")
        assert "argument --kv-budget: got 8, takes more than the 8 tokens of window and sinks" in message


def test_refused_calls(capsys, checkpoint, text, tmp_path):
    def message(*arguments, command="evaluate"):
        return refusal(capsys, command, *arguments)

    output = ("--output", tmp_path / "out")
    assert "--text" in message(checkpoint, *output)
    assert "--output" in message(checkpoint, "--text", text)
    assert "there is no" in message(checkpoint, "--text", tmp_path / "none.txt", *output)
    assert "must hold a window of 1024" in message(checkpoint, "--text", text / "sea.txt", *output)
    assert "takes a whole number from 16" in message(checkpoint, "--text", text, *output, "--length", "15")
    assert "is not calibrated" in message(checkpoint, "--text", text, *output, "--kv-usage", "0.5", *SIZE)
    assert "is a file" in message(checkpoint, "--text", text, "--output", text / "sea.txt", *SIZE)
    assert "takes a percentage such as 1%" in message(
        checkpoint, "--text", text, *output, "--allow", "0.01", command="sweep"
    )
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "windows.jsonl").write_text('{"model": "x"}\n')
    refused = message(checkpoint, "--text", text, "--output", tmp_path / "wrong", *SIZE)
    assert "holds an evaluation of another model" in refused
