# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Rows of tokens: nothing lost, nothing leaked, one order for a seed, and resumed at any row."""

import itertools
import json

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.training import data as data_module
from ham_hf.training.data import PackedRows
from ham_hf.training.recipe import EMBEDDED_TOKENIZER, DataRecipe

CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TOKENIZER)


@pytest.fixture(autouse=True)
def small_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module, "CHARACTERS_AT_A_TIME", 1500)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def texts(tmp_path):
    random = np.random.default_rng(0)
    words = "the captain looked at a grey sea and said nothing more of it".split()
    documents = [" ".join(random.choice(words, size=random.integers(1, 60))) for _ in range(30)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents[:17]))
    (tmp_path / "b.txt").write_text("\n\n".join(documents[17:]))
    return documents


def packed(tmp_path, tokenizer, seed=0, held_out=0, **recipe):
    recipe = DataRecipe(**{"files": str(tmp_path), "document": "paragraph", "shuffle_rows": 7} | recipe)
    return PackedRows(recipe, tokenizer, CONTEXT, seed, held_out)


def take(rows, count):
    return [row["input_ids"].tolist() for row in itertools.islice(iter(rows), count)]


def test_a_pass_has_every_token_once_and_then_begins_anew(tmp_path, tokenizer, texts):
    tokens = sum(len(tokenizer(x)["input_ids"]) + 1 for x in texts)
    rows = packed(tmp_path, tokenizer)
    count = tokens // CONTEXT
    first, second = take(rows, 2 * count)[:count], take(rows, 2 * count)[count:]
    in_order = [row["input_ids"].tolist() for row in rows.first_rows(1000)]
    assert len(in_order) == count
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != second
    assert first != in_order
    flat = list(itertools.chain(*in_order))
    text = tokenizer.decode(flat).split(tokenizer.eos_token)
    assert set(text[:-1]) <= set(texts)
    assert len(text) > 25


def test_positions_and_labels_restart_with_each_document(tmp_path, tokenizer, texts):
    for row in packed(tmp_path, tokenizer).first_rows(1000):
        ids, positions, labels = (row[x].tolist() for x in ("input_ids", "position_ids", "labels"))
        assert positions[0] == 0
        for i in range(1, CONTEXT):
            new = ids[i - 1] == tokenizer.eos_token_id
            assert positions[i] == (0 if new else positions[i - 1] + 1)
            assert labels[i] == (-100 if new else ids[i])


def test_a_packed_row_loses_what_its_documents_lose_apart(tmp_path, tokenizer, texts):
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = HAMForCausalLM(config).eval()
    checked = 0
    for row in packed(tmp_path, tokenizer).first_rows(1000):
        starts = [*torch.where(row["position_ids"] == 0)[0].tolist(), CONTEXT]
        parts = [row["input_ids"][None, a:b] for a, b in itertools.pairwise(starts)]
        with torch.no_grad():
            together = model(**{name: x[None] for name, x in row.items()}, threshold=0.5).loss * (CONTEXT - len(parts))
            apart = sum(
                model(input_ids=x, labels=x, threshold=0.5).loss * (x.shape[1] - 1) for x in parts if x.shape[1] > 1
            )
        # float32 sums of at most 24 losses of about 8; measured 3e-5
        torch.testing.assert_close(together, apart, atol=2e-4, rtol=0)
        checked += len(parts) > 1
    assert checked > 5


@pytest.mark.parametrize("row", [0, 1, 6, 7, 8, 20, *(pytest.param(x, marks=pytest.mark.slow) for x in (61, 100))])
def test_going_on_with_any_row(tmp_path, tokenizer, texts, row):
    expected = take(packed(tmp_path, tokenizer, held_out=3), 130)
    rows = packed(tmp_path, tokenizer, held_out=3)
    # As a loader that reads ahead.
    assert take(rows, row + 5) == expected[: row + 5]
    state = json.loads(json.dumps(rows.state_dict(row)))
    resumed = packed(tmp_path, tokenizer, held_out=3)
    resumed.load_state_dict(state)
    assert take(resumed, 130 - row) == expected[row:]
    # and once more, from a state that the resumed rows gave
    state = resumed.state_dict(row + 9)
    again = packed(tmp_path, tokenizer, held_out=3)
    again.load_state_dict(state)
    assert take(again, 130 - row - 9) == expected[row + 9 :]


def test_the_seed_decides_the_order(tmp_path, tokenizer, texts):
    assert take(packed(tmp_path, tokenizer), 20) == take(packed(tmp_path, tokenizer), 20)
    assert take(packed(tmp_path, tokenizer), 20) != take(packed(tmp_path, tokenizer, seed=1), 20)


def test_rows_held_out_are_never_trained_on(tmp_path, tokenizer, texts):
    held_out = [x["input_ids"].tolist() for x in packed(tmp_path, tokenizer).first_rows(4)]
    seen = take(packed(tmp_path, tokenizer, held_out=4), 100)
    assert not any(row in seen for row in held_out)
    assert len({tuple(x) for x in seen}) < 100  # several passes


def test_names_of_files_are_no_patterns(tmp_path, tokenizer, texts):
    expected = take(packed(tmp_path, tokenizer), 20)
    folder = tmp_path / "texts[1]"
    folder.mkdir()
    for old, new in (("a.txt", "a*.txt"), ("b.txt", "b?[2].txt")):
        (tmp_path / old).rename(folder / new)
    assert take(packed(tmp_path, tokenizer, files=str(folder)), 20) == expected


def test_formats_and_data_sets_give_the_same_rows(tmp_path, tokenizer, texts):
    lines = tmp_path / "lines" / "a.jsonl"
    lines.parent.mkdir()
    lines.write_text("".join(json.dumps({"body": x, "n": 1}) + "\n" for x in texts))
    expected = take(packed(lines.parent, tokenizer, column="body", document="file"), 30)
    table = datasets.Dataset.from_dict({"body": texts})
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "a.parquet")
    assert take(packed(tmp_path / "table", tokenizer, column="body", document="file"), 30) == expected
    for streaming in (True, False):
        recipe = DataRecipe(name=str(tmp_path / "table"), column="body", shuffle_rows=7, streaming=streaming)
        assert take(PackedRows(recipe, tokenizer, CONTEXT, 0), 30) == expected


def test_refusals(tmp_path, tokenizer, texts):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text('{"body": "x", "n": 1}\n')
    with pytest.raises(ValueError, match=r"`data: column`.*'text' and columns \['body', 'n'\]"):
        take(packed(tmp_path / "c", tokenizer, document="file"), 1)
    with pytest.raises(ValueError, match=r"`data: column`.*'n' and int there"):
        take(packed(tmp_path / "c", tokenizer, document="file", column="n"), 1)
    with pytest.raises(ValueError, match="too little text"):
        take(packed(tmp_path / "c", tokenizer, document="file", column="body"), 1)
    with pytest.raises(ValueError, match=r"too little text.*1000 for evaluation"):
        take(packed(tmp_path, tokenizer, held_out=1000, files=f"{tmp_path}/*.txt"), 1)
