# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Retrieval is measured by what `generate` writes, sample by sample, and goes on where it was interrupted."""

import math
import statistics

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ham_hf.cli.models import EMBEDDED_CHECKPOINT
from ham_hf.cli.ruler import TASKS as OFFERED
from ham_hf.evaluation.report import mean_and_error
from ham_hf.evaluation.retrieval import Retrieval, left_padded, plot, to_markdown
from ham_hf.evaluation.ruler import TASKS, make_samples, score
from ham_hf.files import read_rows
from tests.cli.calls import tiny_model

LENGTH, COUNT = 300, 3
NAMES = ["niah_single_1", "niah_single_2"]
MEMORIES = [{"threshold": 0.0}, {"threshold": 0.5, "kv_budget": 64}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)


@pytest.fixture(scope="module")
def short_answers():
    """Answers of 4 tokens, so that generation is quick; prompts are as long as before."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setitem(TASKS, name, TASKS[name]._replace(max_new_tokens=4))
        yield


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(len(tokenizer))


def measured(model, tokenizer, path, count=COUNT, batch_size=1, names=NAMES):
    return Retrieval(model, tokenizer, names, LENGTH, count, path, batch_size=batch_size).results(MEMORIES)


def test_scores_are_those_of_what_generate_writes(model, tokenizer, short_answers, tmp_path):
    results = measured(model, tokenizer, tmp_path / "x")
    rows = [row for row in read_rows(tmp_path / "x") if "key" in row]
    assert len(rows) == len(MEMORIES) * len(NAMES) * COUNT
    for row in rows:
        memory, task, index = row["key"].values()
        sample = make_samples(task, tokenizer, LENGTH, COUNT)[index]
        ids = tokenizer(sample.prompt, return_tensors="pt")
        written = model.generate(
            **ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **memory
        )
        text = tokenizer.decode(written.sequences[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        found = row["figures"]
        assert found["text"] == text
        assert found["score"] == score(task, text, sample.answers)
        cache = written.past_key_values
        assert found["held"] == pytest.approx(cache.kv_usage().mean().item())
    assert results[0]["usage"] == results[0]["held"] == 1
    assert 0 < results[1]["held"] < 0.3


def test_an_answer_that_is_written_scores(tokenizer, short_answers, tmp_path, monkeypatch, model):
    samples = make_samples("niah_single_1", tokenizer, LENGTH, 2)
    retrieval = Retrieval(model, tokenizer, ["niah_single_1"], LENGTH, 2, tmp_path / "x", batch_size=2)

    class Outputs(dict):
        sequences = None

    def generate(input_ids, attention_mask, **_):
        told = left_padded([tokenizer(samples[0].answers[0])["input_ids"], tokenizer("unknown")["input_ids"]], 0)
        outputs = Outputs()
        outputs.sequences = torch.cat([input_ids, told["input_ids"]], 1)
        return outputs

    monkeypatch.setattr(model, "generate", generate)
    (found,) = retrieval.results([{}])
    assert found["score"] == 0.5
    assert found["tasks"]["niah_single_1"] == {"score": 0.5, "error": 0.5}
    assert found["usage"] is None, "a model that returns no cache"


def test_batches_and_interruptions_change_nothing(model, tokenizer, short_answers, tmp_path, monkeypatch):
    whole = measured(model, tokenizer, tmp_path / "a")
    first = measured(model, tokenizer, tmp_path / "b", count=1, names=NAMES[:1])
    assert first[0]["tasks"].keys() == {"niah_single_1"}
    rows = read_rows(tmp_path / "b")
    batched = measured(model, tokenizer, tmp_path / "b", batch_size=2)
    assert read_rows(tmp_path / "b")[: len(rows)] == rows
    assert len(read_rows(tmp_path / "b")) == len(read_rows(tmp_path / "a"))
    for x, y in zip(whole, batched, strict=True):
        assert x["tasks"] == y["tasks"]
        assert x["held"] == pytest.approx(y["held"], abs=1e-3)
    texts = [
        {str(row["key"]): row["figures"]["text"] for row in read_rows(tmp_path / name)[1:]} for name in ("a", "b")
    ]
    assert texts[0] == texts[1]
    monkeypatch.setattr(model, "generate", None)
    assert measured(model, tokenizer, tmp_path / "b") == batched, "nothing is measured twice"
    with pytest.raises(ValueError, match="another length"):
        Retrieval(model, tokenizer, NAMES, LENGTH + 50, 1, tmp_path / "b")
    with pytest.raises(ValueError, match="another text"):
        Retrieval(model, tokenizer, NAMES, LENGTH, 1, tmp_path / "b", haystack="Another text.")


def test_padding_is_on_the_left():
    found = left_padded([[5, 6, 7], [8]], 9)
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_other_models_are_measured_as_they_are(tokenizer, short_answers, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval()
    results = Retrieval(model, tokenizer, NAMES, LENGTH, 2, tmp_path / "x").results([{}])
    assert results[0]["usage"] is None
    assert "| asked for | mean | niah_single_1 | niah_single_2 |" in to_markdown(results, LENGTH, 2)
    assert "| the model | 0.0 | 0 ± 0 | 0 ± 0 |" in to_markdown(results, LENGTH, 2)


def test_a_table_and_a_picture(model, tokenizer, short_answers, tmp_path):
    results = measured(model, tokenizer, tmp_path / "x", count=1)
    results[1] |= {"score": 0.625, "held": 0.25, "usage": 0.2}
    results[1]["tasks"] = {
        "niah_single_1": {"score": 0.5, "error": 0.05},
        "niah_single_2": {"score": 0.75, "error": 0.0},
    }
    text = to_markdown(results, LENGTH, 1)
    assert "| asked for | kept | held | mean | niah_single_1 | niah_single_2 |" in text
    assert "| threshold 0.5, budget 64 | 20.0% | 25.0% | 62.5 | 50 ± 5 | 75 ± 0 |" in text
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "ruler.png")
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")


def test_errors_by_hand():
    values = [0.0, 1.0, 1.0, 0.5]
    assert mean_and_error(values) == (0.625, pytest.approx(statistics.stdev(values) / 2))
    assert math.isnan(mean_and_error([0.3])[1])


def test_the_command_offers_every_task():
    assert tuple(TASKS) == OFFERED
