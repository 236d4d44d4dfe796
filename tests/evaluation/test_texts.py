# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Text is read from every kind of file, and cut into windows that do not overlap."""

import json
import sys

import pytest
import torch

from ham_hf.evaluation.texts import read_texts, text_windows, token_stream
from tests.cli.calls import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_every_kind_of_file_gives_its_documents_in_order(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("in a folder")
    (tmp_path / "a.txt").write_text("ä plain file", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "code.py").write_text("not text")
    lines = [{"text": "one\u2028line"}, {"text": "two", "title": "x"}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(json.dumps(x, ensure_ascii=False) for x in lines), encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": ["row 1", "row 2"], "n": [1, 2]}), tmp_path / "d.parquet")
    expected = ["ä plain file", "one\u2028line", "two", "row 1", "row 2", "in a folder"]
    assert read_texts([tmp_path]) == expected
    assert read_texts([tmp_path / "code.py", tmp_path / "c.jsonl"]) == ["not text", *expected[1:3]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe", r"x\.txt: it is not UTF-8 text"),
        ("x.txt", b" \n", "got only empty ones"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 1}', r"x\.jsonl, line 2, .*string `text`"),
        ("x.jsonl", b"[1]", "line 1"),
        ("x.jsonl", b"[" * 100_000, "line 1"),
        ("x.parquet", b"PAR1", r"cannot read .*x\.parquet"),
        ("x/y.py", b"a", r"holds no file that ends in \.txt"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content, message):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts([path.parent if name.startswith("x/") else path])


def test_a_missing_file_a_missing_column_and_a_missing_library(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"none\.txt: No such file"):
        read_texts([tmp_path / "none.txt"])
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"must have the column `text`, got \['body'\]"):
        read_texts([tmp_path / "x.parquet"])
    with pytest.raises(ValueError, match="must have strings in the column `body`"):
        read_texts([tmp_path / "x.parquet"], "body")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_texts([tmp_path / "x.parquet"])


def test_windows_cover_the_stream_and_do_not_overlap(tokenizer):
    texts = [f"Document {n}. " + f"It says {n} " * 30 for n in range(5)]
    stream = token_stream(tokenizer, texts)
    assert stream.count(tokenizer.eos_token_id) == 4, "between documents"
    assert tokenizer.decode(stream[: stream.index(tokenizer.eos_token_id)]) == texts[0]
    windows = text_windows(tokenizer, texts, 32, 100)
    assert windows.shape == (len(stream) // 32, 32)
    step = (len(stream) - 32) // (len(windows) - 1)
    assert step >= 32
    assert windows.tolist() == [stream[n * step : n * step + 32] for n in range(len(windows))]
    assert text_windows(tokenizer, texts, 32, 2).tolist() == [stream[:32], stream[-32:]]
    with pytest.raises(ValueError, match="must hold a window of 100000"):
        text_windows(tokenizer, texts, 100_000, 1)


def test_a_token_that_begins_every_text_begins_every_window():
    class WithBeginning:
        eos_token_id, bos_token_id = 1, 7

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [7] * add_special_tokens + [10 + ord(x) for x in text]}

    windows = text_windows(WithBeginning(), ["abcdefgh"], 4, 2)
    assert torch.equal(windows[:, 0], torch.tensor([7, 7]))
    assert windows[:, 1:].tolist() == [[10 + ord(x) for x in part] for part in ("abc", "fgh")]
