# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The study of healing goes from nothing to its table and plot, and takes up what is done."""

import json

import pytest
import torch
from transformers import LlamaConfig

from ham_hf import HAMForCausalLM
from ham_hf.files import read_rows
from ham_hf.training.documents import SPLIT_FILES, Document, write_documents
from model_cards.ham_tiny.tokenizer import train_tokenizer
from model_cards.healing import heal, report
from model_cards.healing.settings import ARMS, Settings

WORDS = "the sea was calm and the captain spoke of home while his men slept below in the dark".split()


def row(seed, arm, stage, loss, second_time=2.0, needle=0.5, **more):
    figures = {"loss": [loss - 0.5, loss + 0.5], "second_time": [second_time] * 2, "needle": [needle] * 2}
    return {"seed": seed, "arm": arm, "stage": stage, "held": 0.25, **figures, **more}


def test_the_table_compares_with_the_source_seed_by_seed():
    rows = [
        row(0, "source", "trained", 4.0, needle=0.9),
        row(1, "source", "trained", 5.0, needle=0.7),
        row(0, "cosine", "healed", 4.125, 2.25, 0.625, rnn_gate=0.3),
        row(1, "cosine", "healed", 5.375, 2.25, 0.375, rnn_gate=0.2),
        row(0, "random", "healed", 4.25),
        row(1, "random", "healed", 5.25),
    ]
    lines = report.to_markdown(rows, Settings()).splitlines()
    assert "| cosine | healed | 25.0% | +0.250 ± 0.125 | +0.250 ± 0.000 | 50.0% ± 12.5% | 0.25 |" in lines
    assert "| cosine - random | +0.000 ± 0.125 | +0.250 ± 0.000 | +0.0 points ± 12.5 |" in lines
    assert not any("l2" in line for line in lines), "what was not run is left out"
    alone = report.to_markdown(rows[:3], Settings())
    assert "nan" not in alone, "one seed has no error"


def test_a_row_is_told_in_one_line():
    told = report.in_words(row(0, "cosine", "healed", 4.125, 2.25, 0.625))
    assert told == "loss 4.1250, of passages read before 2.2500 (nats/token), needles 62.5%"


def test_every_arm_holds_as_many_tokens():
    settings = Settings()
    for arm in ARMS.values():
        fixed = arm.window + arm.sinks
        held = fixed + arm.usage(settings) * (settings.context - fixed)
        assert held == pytest.approx(settings.held * settings.context)
    assert ARMS["recency"].usage(settings) == 0


def test_models_of_other_settings_are_not_taken_for_these(tmp_path):
    study = heal.Study.__new__(heal.Study)  # without a corpus
    study.output, study.settings = tmp_path, Settings(lr=1e-4)
    study.check_settings()
    study.settings = Settings()
    with pytest.raises(ValueError, match="holds models of other settings"):
        study.check_settings()


@pytest.mark.slow
def test_the_study_goes_from_nothing_to_a_plot_and_takes_up_what_is_done(tmp_path, monkeypatch):
    for split in SPLIT_FILES:
        picks = torch.randint(len(WORDS), (3, 3000)).tolist()
        documents = [Document("made-up", str(i), " ".join(WORDS[j] for j in x)) for i, x in enumerate(picks)]
        write_documents(tmp_path / SPLIT_FILES[split], documents)
    train_tokenizer([" ".join(WORDS)] * 20, 300).save_pretrained(tmp_path / "tokenizer")
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    monkeypatch.setattr(heal, "LlamaConfig", lambda **fields: LlamaConfig(**(fields | small)))
    short = {"source_steps": 60, "steps": 20, "transfer_steps": 10, "context": 64, "windows_per_document": 2}
    monkeypatch.setitem(ARMS, "l2-window", ARMS["l2-window"].__class__("a window", "l2", 10, 2))
    results = tmp_path / "results.jsonl"

    def run(arms):
        paths = tmp_path, tmp_path / "tokenizer", tmp_path / "out", results
        heal.Study(*paths, Settings(**short), seed=3).run(arms)
        return {(x["arm"], x["stage"]): x for x in read_rows(results)}

    arms = ["cosine", "l2-window", "shut"]
    rows = run(arms)
    assert len(rows) == 2 + 1 + 3 + 3 + 2
    assert rows["everything", "converted"]["loss"] == pytest.approx(rows["source", "trained"]["loss"], abs=1e-4)
    assert rows["everything", "converted"]["held"] == 1
    for arm in arms:
        assert 0.1 < rows[arm, "healed"]["held"] < 0.4, "as many are held as were asked for"
    window = HAMForCausalLM.from_pretrained(tmp_path / "out" / "seed-3" / "healed-l2-window" / "model").config
    assert (window.router, window.attention_window, window.attention_sinks) == ("l2", 10, 2)
    assert 0.2 < rows["cosine", "transferred"]["rnn_gate"] < 0.4
    assert rows["shut", "healed"]["rnn_gate"] < 1e-6
    report.plot(list(rows.values()), tmp_path / "healing.png")
    assert (tmp_path / "healing.png").stat().st_size > 10_000

    lines = results.read_text().splitlines()
    results.write_text("".join(f"{line}\n" for line in lines[:-1]) + lines[-1][:20])
    monkeypatch.setattr(heal, "train", lambda recipe: pytest.fail("a model that is there is trained again"))
    monkeypatch.setattr(
        heal.Study, "healed", lambda study, name: tmp_path / "out" / "seed-3" / f"healed-{name}" / "model"
    )
    assert json.dumps(list(run(arms).values())) == json.dumps(list(rows.values()))
