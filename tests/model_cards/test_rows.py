# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A row of a result file is there whole or not at all."""

import re
import subprocess

import pytest

from ham_hf.files import append_row, read_rows
from model_cards import rows


def test_rows_come_back_in_order_and_to_the_last_digit(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_rows(path) == []
    written = [{"a": 0.1 + 0.2, "b": None}, {"a": "two\nlines\u2028 and \x85 more", "b": [1e-300, 3]}]
    for row in written:
        append_row(path, row)
    assert read_rows(path) == written
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("kept", [1, 5, 9])
def test_an_unfinished_row_is_left_out_and_overwritten(tmp_path, kept):
    path = tmp_path / "x.jsonl"
    append_row(path, {"a": 1})
    whole = path.read_bytes()
    append_row(path, {"a": 22})
    path.write_bytes(path.read_bytes()[: len(whole) + kept])
    assert read_rows(path) == [{"a": 1}]
    append_row(path, {"a": 3})
    assert read_rows(path) == [{"a": 1}, {"a": 3}]


def test_a_file_that_holds_nothing_but_an_unfinished_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a":')
    assert read_rows(path) == []
    append_row(path, {"a": 1})
    assert read_rows(path) == [{"a": 1}]


def test_the_commit_says_whether_code_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "model_cards" / "rows.py"))
    assert rows.current_commit() is None

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1")
    (tmp_path / "result.jsonl").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    commit = rows.current_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "result.jsonl").write_text("2")
    assert rows.current_commit() == commit
    (tmp_path / "code.py").write_text("2")
    assert rows.current_commit() == f"{commit}-dirty"
