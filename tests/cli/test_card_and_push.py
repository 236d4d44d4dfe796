# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf card` and `ham-hf push`: what they write and send, and what they leave alone."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

import ham_hf.cli as cli
from ham_hf.hub.push import Pushed
from tests.cli.calls import refusal

USAGE = Path(__file__).parents[2] / "model_cards/ham_tiny/usage.json"


def card(capsys, *arguments):
    """Runs `ham-hf card`, which must succeed without a word on stderr; returns what it printed."""
    assert cli.main(["card", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_card_is_written_and_written_anew(capsys, calibrated_checkpoint, tmp_path):
    folder = shutil.copytree(calibrated_checkpoint, tmp_path / "my-ham")
    output = card(capsys, folder)
    written = (folder / "README.md").read_text()
    assert f"Wrote {folder / 'README.md'}" in output
    assert "# my-ham" in written
    assert all(name in output for name in ("data.md", "usage.json", "license", "name on the Hub"))
    (folder / "data.md").write_text("All of it.")
    output = card(capsys, folder, "--repo-id", "someone/my-ham")
    assert "data.md" not in output
    assert "name on the Hub" not in output
    rewritten = (folder / "README.md").read_text()
    assert "All of it." in rewritten
    assert "someone/my-ham" in rewritten
    assert not list(folder.glob("*.partial"))


def test_card_takes_results_and_their_plot_from_elsewhere(capsys, checkpoint, tmp_path):
    results, output = tmp_path / "results", tmp_path / "out" / "card.md"
    results.mkdir()
    output.parent.mkdir()
    (results / "usage.png").write_bytes(b"picture")
    shutil.copy(USAGE, results)
    (results / "card.json").write_text('{"name": "Trial"}')
    assert "usage.png" in card(capsys, checkpoint, "--results", results, "--output", output)
    assert (output.parent / "usage.png").read_bytes() == b"picture"
    text = output.read_text()
    assert "# Trial" in text
    assert "](usage.png)" in text
    quarter = next(x for x in json.loads(USAGE.read_text())["results"] if x["kv_usage"] == 0.25)
    assert f"| 25% | {quarter['usage']:.1%} | {quarter['loss']:.4f} |" in text


def test_card_leaves_what_it_did_not_write(capsys, checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "README.md"
    output.write_text("# Mine\n")
    assert "--force" in refusal(capsys, "card", checkpoint, "--output", output)
    assert output.read_text() == "# Mine\n"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        assert cli.main(["card", str(checkpoint), "--output", str(output), "--force"]) == 130
    assert output.read_text() == "# Mine\n"
    capsys.readouterr()
    card(capsys, checkpoint, "--output", output, "--force")
    assert "# Mine" not in output.read_text()


def test_refused_cards(capsys, checkpoint, tmp_path):
    def message(*arguments):
        return refusal(capsys, "card", *arguments)

    output = tmp_path / "card.md"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "usage.json").write_text("{")
    assert "CHECKPOINT" in message()
    assert "missing" in message(tmp_path / "missing")
    assert "config.json" in message(tmp_path / "nothing")
    assert "usage.json" in message(checkpoint, "--output", output, "--results", tmp_path / "broken")
    assert "missing" in message(checkpoint, "--output", output, "--results", tmp_path / "missing")
    assert "--repo-id" in message(checkpoint, "--output", output, "--repo-id", "./my-ham")
    assert "--output" in message(checkpoint, "--output", tmp_path)
    assert "There is no folder for this file" in message(checkpoint, "--output", tmp_path / "missing" / "card.md")
    assert not output.exists()


def test_push_says_what_it_did(capsys, checkpoint, monkeypatch):
    calls = []

    def push_folder(folder, repo_id, **arguments):
        calls.append((str(folder), repo_id, arguments))
        commit = SimpleNamespace(commit_url="http://127.0.0.1/me/my-ham/commit/0123", oid="0123")
        return Pushed("me/my-ham", commit, ["a", "b"], 2_500_000, "the folder's", ["a_ham.py"], ["x.pt"])

    monkeypatch.setattr("ham_hf.hub.push.push_folder", push_folder)
    assert cli.main(["push", checkpoint, "my-ham", "--private", "--revision", "trial", "--message", "First"]) == 0
    output = capsys.readouterr().out
    assert calls == [(str(checkpoint), "my-ham", {"private": True, "revision": "trial", "commit_message": "First"})]
    for part in ("2 files (2.5 MB)", "me/my-ham/commit/0123", "revision='0123'", "the folder's", "a_ham.py", "x.pt"):
        assert part in output
    cli.main(["push", checkpoint, "my-ham"])
    assert calls[1][2] == {"private": None, "revision": None, "commit_message": None}


def test_refused_pushes(capsys, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise ConnectionError("no route")

    assert "OWNER/NAME" in refusal(capsys, "push", checkpoint)
    for name in ("./my-ham", "../my-ham", "/srv/my-ham", str(tmp_path)):
        message = refusal(capsys, "push", checkpoint, name)
        assert "push uploads to the Hub" in message
        assert f"cp -r {checkpoint} {name}" in message
    assert "missing" in refusal(capsys, "push", tmp_path / "missing", "me/my-ham")
    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert "no route" in refusal(capsys, "push", checkpoint, "me/my-ham")
    response = SimpleNamespace(status_code=401, headers={}, request=None)
    monkeypatch.setattr(HfApi, "create_repo", Mock(side_effect=HfHubHTTPError("Unauthorized", response=response)))
    assert "HF_TOKEN" in refusal(capsys, "push", checkpoint, "me/my-ham")
