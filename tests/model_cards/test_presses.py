# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2 as a HAM is compared with presses on the same prompts, at the same bytes."""

import importlib
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ham_hf.evaluation import calibrate
from ham_hf.evaluation.losses import with_repeated_end
from ham_hf.files import read_rows
from model_cards.smollm2 import presses, texts
from tests.cli.calls import byte_tokenizer, tiny_model


@pytest.fixture
def work(monkeypatch):
    """Few and short prompts and windows."""
    for module in (presses, texts):
        monkeypatch.setattr(module, "CONTEXT", 400)
    monkeypatch.setattr(presses, "PROMPTS", 2)
    monkeypatch.setattr(presses, "WINDOWS", 1)
    monkeypatch.setattr(presses, "REST", 100)
    return list(presses.tasks(byte_tokenizer()))


def test_a_press_reads_neither_the_question_nor_the_end(work):
    tokenizer = byte_tokenizer()
    needle = next(x for x in work if x["kind"] == "needle")
    told, asked = (tokenizer.decode(needle[part]) for part in ("context", "rest"))
    assert asked.startswith("\n\nQuestion: What is")
    number = tokenizer.decode(needle["rest"][-needle["answer"] :]).strip()
    assert number.isdigit()
    assert f"is {number}." in told
    text, again = ([*x["context"], *x["rest"]] for x in work if x["kind"] in ("text", "again"))
    window = texts.judged_windows(tokenizer, 1)[0]
    assert text == window[0].tolist()
    assert again == with_repeated_end(window)[0].tolist()
    assert [(len(x["rest"]), x["answer"]) for x in work[2:]] == [(100, 99), (50, 49)]


def test_a_ham_s_bytes_and_loss_are_those_of_its_cache_and_of_transformers(work):
    model, x = tiny_model(300, attention_window=8).eval(), work[2]
    calibrate(model, [torch.randint(300, (2, 100))])
    figures = presses.ham_figures(model, x, 1.0)
    ids = torch.tensor([x["context"] + x["rest"]])
    with torch.no_grad():
        logits = model(ids, threshold=0.0).logits[0]
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits[-100:-1], ids[0, -99:]).item(), abs=1e-5)
    assert presses.ham_figures(model, x, 0.1)["bytes"] < figures["bytes"]


@pytest.fixture
def press_arms(monkeypatch):
    """The script with presses that drop nothing, and write down what they were asked for."""

    class Press:
        asked = []

        def __init__(self, dropped=0.0, head_compression_ratio=None):
            self.dropped, self.head_compression_ratio = dropped, head_compression_ratio

        @contextmanager
        def __call__(self, model):
            Press.asked.append(self.dropped)
            yield

    names = ["ExpectedAttention", "KeyDiff", "Knorm", "LagKV", "SnapKV", "StreamingLLM", "TOVA", "DuoAttention"]
    fake = SimpleNamespace(Press=Press, **{f"{name}Press": Press for name in names})
    monkeypatch.setitem(sys.modules, "kvpress", fake)
    monkeypatch.delitem(sys.modules, "model_cards.smollm2.press_arms", raising=False)
    yield importlib.import_module("model_cards.smollm2.press_arms")
    monkeypatch.delitem(sys.modules, "model_cards.smollm2.press_arms", raising=False)


def test_presses_hold_the_bytes_of_the_ham_and_go_on_where_they_stopped(work, press_arms, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_hidden_layers=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "llama")
    jobs = [x | {"level": 0.25, "bytes": 0.3} for x in (work[0], work[2])]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs, "importance": [[0.1], [0.2]]}))
    results = tmp_path / "rows.jsonl"
    results.touch()
    arguments = ["press_arms.py", str(tmp_path / "llama"), str(tmp_path / "jobs.json"), str(results), "commit"]
    monkeypatch.setattr(sys, "argv", arguments)
    press_arms.main()
    rows = read_rows(results)
    assert len(rows) == 9 + 8, "the text has no question that a press could see"
    assert {round(x, 6) for x in sys.modules["kvpress"].Press.asked if x} == {0.7}
    for job in jobs:
        ids = torch.tensor([job["context"] + job["rest"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -job["answer"] - 1 : -1]
        expected = F.cross_entropy(logits, ids[0, -job["answer"] :]).item()
        losses = [row["loss"] for row in rows if row["kind"] == job["kind"]]
        assert losses == pytest.approx([expected] * len(losses), abs=1e-5), "what drops nothing is the model itself"

    results.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    press_arms.main()
    assert [row["arm"] for row in read_rows(results)] == [row["arm"] for row in rows]


def test_a_duo_keeps_the_heads_of_most_importance(press_arms):
    press = press_arms.ImportancePress(0.45, 680, [[0.1, 0.4], [0.3, 0.2]])
    press.post_init_from_model(None)
    assert press.head_compression_ratio == pytest.approx(0.5), "of half the heads 90% of the tokens"
    assert press.streaming_mask.tolist() == [[True, False], [False, True]]


def row(arm, kind, index, loss, found=False, level=0.25, share=0.3):
    return {"arm": arm, "level": level, "kind": kind, "index": index, "loss": loss, "found": found, "bytes": share}


def test_the_table_counts_needles_of_the_source_and_pairs_windows():
    rows = []
    for arm, level, more in (("everything", 1.0, 0.0), (presses.HAM, 0.25, 0.25), ("Knorm", 0.25, 0.5)):
        rows += [row(arm, "needle", i, 1.0, i > (more > 0), level) for i in range(4)]
        rows += [
            row(arm, kind, i, 2.0 + i + more * (1 + i), level=level) for kind in ("text", "again") for i in (0, 1)
        ]
    lines = presses.to_markdown(rows).splitlines()
    assert lines[0] == "30% of the bytes, as the HAM holds when asked for 25%:"
    assert f"| {presses.HAM} | 2 of 3 (21% to 94%) | +0.375 ± 0.125 | +0.375 ± 0.125 |" in lines
    assert "| Knorm | 2 of 3 (21% to 94%) | +0.750 ± 0.250 | +0.750 ± 0.250 |" in lines
