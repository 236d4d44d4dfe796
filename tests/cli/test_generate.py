# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf generate` and `ham-hf demo`: their numbers are the cache's own, and wrong arguments are refused."""

import io
import shutil
import sys

import pytest
import torch

import ham_hf.cli as cli
from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.cli import demo
from ham_hf.cli import models as cli_models
from ham_hf.inspection.kept_tokens import printable
from ham_hf.inspection.run_table import bars, runs_table
from ham_hf.inspection.runs import Setting, heads_that_kept, measure, prefill
from tests.cli.calls import PROMPT, generate, refusal, rows, save, tiny_model


def test_table_shows_the_numbers_of_the_cache(capsys, checkpoint, tokenizer):
    thresholds = (0, 0.5, 2)
    output = generate(
        capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 6, "--loss", "--threshold", *thresholds
    )
    model = HAMForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for threshold, row in zip(thresholds, rows(output), strict=True):
        cache = HAMCache(model.config)
        text = model.generate(ids, cache=cache, threshold=threshold, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            logits = model(ids, threshold=threshold).logits[0]
        half = ids.shape[1] // 2
        loss = torch.nn.functional.cross_entropy(logits[half - 1 : -1], ids[0, half:]).item()
        held = cache.memory_bytes() - cache.state_bytes()
        assert row[:3] == [
            f"{threshold:g}",
            f"{cache.get_seq_length()}",
            f"{cache.kept_tokens().float().mean():.1f}",
        ]
        assert row[3:5] == [f"{cache.kv_usage().mean():.1%}", bars(cache.kv_usage().mean((1, 2)).tolist())]
        assert row[5:7] == [f"{held / 1024:.1f}", f"{cache.full_kv_bytes() / 1024:.1f}"]
        assert row[7:9] == [f"{held / cache.full_kv_bytes():.0%}", f"{cache.state_bytes() / 1024:.1f}"]
        assert float(row[10]) == pytest.approx(loss, abs=1e-3)
        continuation = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
        section = output.split(f"threshold {threshold:g} ")[1]
        assert PROMPT + printable(continuation) in section


def test_higher_thresholds_keep_fewer_tokens(capsys, checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0, 0.45, 0.5, 0.55, 2)
    kept = [float(row[2]) for row in rows(generate(capsys, PROMPT, *arguments))]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[2] > kept[4] == 0


def test_learned_thresholds_by_default(capsys, checkpoint):
    output = generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 3)
    at_half = generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0.5)
    assert "learned thresholds" in output
    assert rows(output)[0][1:4] == rows(at_half)[0][1:4]  # a fresh model's thresholds are 0.5


def test_kv_usage(capsys, calibrated_checkpoint):
    arguments = ("--model", calibrated_checkpoint, "--max-new-tokens", 3)
    table = rows(generate(capsys, PROMPT, *arguments, "--kv-usage", 1, 0.5, 0))
    assert [row[0] for row in table] == ["1", "0.5", "0"]
    by_threshold = rows(generate(capsys, PROMPT, *arguments, "--threshold", 0, 0.5, 2))
    assert [row[2:5] for row in table] == [row[2:5] for row in by_threshold]


def test_kv_budget_bounds_what_a_head_keeps(capsys, checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0, "--kv-budget", 7)
    output = generate(capsys, PROMPT, *arguments)
    assert "threshold 0, kv-budget 7" in output
    assert rows(output)[0][2] == "7.0"


def test_sampling_follows_the_seed(capsys, checkpoint):
    def text(*arguments):
        return generate(capsys, PROMPT, "--model", checkpoint, "--max-new-tokens", 12, *arguments).split("what the")[0]

    assert text("--temperature", 2, "--seed", 3) == text("--temperature", 2, "--seed", 3)
    assert text("--temperature", 2, "--seed", 3) != text("--temperature", 2, "--seed", 4)
    assert text("--temperature", 0, "--seed", 3) == text("--seed", 4)


def test_dtype_and_device(capsys, checkpoint):
    arguments = ("--model", checkpoint, "--max-new-tokens", 2, "--threshold", 0, "--device", "cpu")
    full = rows(generate(capsys, PROMPT, *arguments, "--dtype", "float32"))[0]
    half = rows(generate(capsys, PROMPT, *arguments, "--dtype", "bfloat16"))[0]
    assert float(half[6]) == pytest.approx(float(full[6]) / 2, abs=0.1)


def test_prompt_from_file_and_stdin(capsys, checkpoint, tmp_path, monkeypatch):
    def body(*arguments):
        output = generate(capsys, *arguments, "--model", checkpoint, "--max-new-tokens", 3, "--threshold", 0)
        return output.split("what the cache kept")[0]

    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert body(PROMPT) == body("--prompt-file", file) == body("--prompt-file", "-")


def test_one_token_prompt(capsys, checkpoint):
    assert rows(generate(capsys, "a", "--model", checkpoint, "--max-new-tokens", 1))[0][1] == "1"


def test_demo_runs_from_all_tokens_to_none(capsys, monkeypatch, checkpoint, calibrated_checkpoint):
    for path, settings in ((checkpoint, demo.THRESHOLDS), (calibrated_checkpoint, demo.USAGES)):
        monkeypatch.setattr(cli_models, "EMBEDDED_CHECKPOINT", path)
        assert cli.main(["demo", "--max-new-tokens", "1"]) == 0
        table = rows(capsys.readouterr().out)
        assert [row[0] for row in table] == [f"{x:g}" for x in settings]
        assert (table[0][3], table[-1][3]) == ("100.0%", "0.0%")
        assert all(len(row) == 11 for row in table)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--threshold", "nan"], ["--threshold", "'nan'"]),
        (["--threshold", "half"], ["--threshold", "'half'"]),
        (["--threshold"], ["--threshold"]),
        (["--kv-usage", "1.5"], ["--kv-usage", "'1.5'", "0 to 1"]),
        (["--kv-usage", "nan"], ["--kv-usage", "'nan'"]),
        (["--kv-usage", "0.5"], ["--kv-usage", "calibrate", "--threshold"]),
        (["--kv-usage", "0.5", "--threshold", "0.5"], ["--kv-usage", "--threshold"]),
        (["--kv-budget", "0"], ["--kv-budget", "'0'", "whole number"]),
        (["--kv-budget", "2.5"], ["--kv-budget", "'2.5'"]),
        (["--max-new-tokens", "-3"], ["--max-new-tokens", "'-3'", "whole number"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "'0'"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens", "'many'"]),
        (["--temperature", "-1"], ["--temperature", "'-1'"]),
        (["--temperature", "inf"], ["--temperature", "'inf'"]),
        (["--seed", "-1"], ["--seed", "'-1'"]),
        (["--device", "abacus"], ["--device", "'abacus'", "cpu"]),
        (["--device", "meta"], ["--device", "'meta'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--prompt-file", "-"], ["--prompt-file", "PROMPT"]),
        (["--thresh", "0.5"], ["--thresh"]),
    ],
)
def test_refused_arguments(capsys, checkpoint, arguments, expected):
    message = refusal(capsys, "generate", PROMPT, "--model", checkpoint, *arguments)
    assert all(part in message for part in expected), message


def test_refused_prompts(capsys, checkpoint, tmp_path, monkeypatch):
    def message(*arguments):
        return refusal(capsys, "generate", "--model", checkpoint, *arguments)

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"\n")
    assert "PROMPT" in message()
    assert "empty" in message(" ")
    assert "empty" in message("--prompt-file", "-")
    assert "empty" in message("--prompt-file", tmp_path / "empty")
    assert "UTF-8" in message("--prompt-file", tmp_path / "latin")
    assert "No such file" in message("--prompt-file", tmp_path / "missing")
    assert "cannot read" in message("--prompt-file", tmp_path)
    assert "UTF-8" in message("caf\udce9")
    assert "--loss" in message("a", "--loss")
    assert "'a'" in message("--threshold", "0.5", "a")  # PROMPT behind --threshold: the message says where it goes


def test_refused_checkpoints(capsys, checkpoint, tokenizer, tmp_path, monkeypatch):
    def message(folder):
        return refusal(capsys, "generate", PROMPT, "--model", folder)

    def copy(name):
        return shutil.copytree(checkpoint, tmp_path / name)

    (tmp_path / "nothing").mkdir()
    assert "config.json" in message(tmp_path / "nothing")
    assert "not a folder" in message(tmp_path / "missing")
    monkeypatch.setattr(cli_models, "EMBEDDED_CHECKPOINT", tmp_path / "missing")
    assert "lacks its checkpoint" in refusal(capsys, "demo")

    other = copy("other")
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "'bert'" in message(other)
    (other / "config.json").write_text("{")
    assert "cannot load a model" in message(other)

    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    assert "cannot load a model" in message(cut)

    wordless = copy("wordless")
    for file in wordless.glob("tokenizer*"):
        file.unlink()
    assert "cannot load a tokenizer" in message(wordless)

    reshaped = copy("reshaped")
    config = (reshaped / "config.json").read_text()
    (reshaped / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    assert "another shape" in message(reshaped)

    model = tiny_model(len(tokenizer))
    model.model.norm.weight.data[0] = torch.nan
    assert "not finite" in message(save(tmp_path / "nan", tokenizer, model))
    assert "tokenizer" in message(save(tmp_path / "small", tokenizer, tiny_model(100)))
    linear = tiny_model(len(tokenizer), layer_types=["linear_attention"] * 3)
    assert "hybrid" in message(save(tmp_path / "linear", tokenizer, linear))


def test_mixed_layers_are_measured_where_they_have_attention(tokenizer):
    model = tiny_model(len(tokenizer), layer_types=["linear_attention", "hybrid", "full_attention"])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    cache = HAMCache(model.config)
    prefill(model, ids, cache, Setting("threshold", 2.0))
    run = measure(cache, Setting("threshold", 2.0), ids.shape[1], speed=1.0, loss=None)
    assert run.usage_by_layer == [0.0, 1.0]
    assert run.usage == 0.5
    assert run.held_per_head == (ids.shape[1] - 1) / 2
    assert run.kept == 0.5
    assert set(run.prompt_heads) == {0}


def test_a_window_is_told_apart_from_what_the_router_kept(tokenizer):
    window = tiny_model(len(tokenizer), attention_window=4, attention_sinks=1)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    runs = []
    for model in (window, tiny_model(len(tokenizer))):
        cache = HAMCache(model.config)
        prefill(model, ids, cache, Setting("threshold", 2.0))
        runs.append(measure(cache, Setting("threshold", 2.0), ids.shape[1], speed=1.0, loss=None))
    seen = runs[0].tokens_seen
    assert (runs[0].held_per_head, runs[0].usage, runs[0].kept) == (
        4,
        pytest.approx(4 / seen),
        pytest.approx(1 / seen),
    )
    assert [str(column.header) for column in runs_table(runs[:1], 120).columns][2:5] == [
        "held/\nhead",
        "router\nkept",
        "total\nusage",
    ]
    assert "router\nkept" not in [column.header for column in runs_table(runs[1:], 120).columns]


def test_prompts_are_read_in_pieces(tokenizer, monkeypatch):
    model = tiny_model(len(tokenizer))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    setting = Setting("threshold", 0.5)
    whole, pieces = HAMCache(model.config), HAMCache(model.config)
    loss = prefill(model, ids, whole, setting, score=True)
    monkeypatch.setattr("ham_hf.inspection.runs.PREFILL_TOKENS", 7)
    assert prefill(model, ids, pieces, setting, score=True) == pytest.approx(loss, rel=1e-5)
    assert heads_that_kept(pieces, ids.shape[1]) == heads_that_kept(whole, ids.shape[1])


def test_the_option_for_the_loss_has_an_old_name(capsys, checkpoint):
    arguments = ["generate", PROMPT, "--model", str(checkpoint), "--max-new-tokens", "1"]
    assert cli.main([*arguments, "--score"]) == 0
    old = capsys.readouterr()
    assert old.err == "ham-hf: warning: --score is now called --loss\n"
    assert cli.main([*arguments, "--loss"]) == 0
    assert "loss" in capsys.readouterr().out
    assert "loss" in old.out
    assert cli.main(arguments) == 0
    assert "loss" not in capsys.readouterr().out
