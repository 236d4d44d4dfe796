# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The study of healing goes from nothing to its table and plot, and takes up what is done."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import LlamaConfig

from ham_hf.files import read_rows
from ham_hf.training.documents import SPLIT_FILES, Document, write_documents
from model_cards.ham_tiny.tokenizer import train_tokenizer
from model_cards.healing import heal, report
from model_cards.healing.results import read_results, write_results
from model_cards.healing.settings import Settings

WORDS = "the sea was calm and the captain spoke of home while his men slept below in the dark".split()


def test_the_table_compares_with_the_source_window_by_window():
    def figures(*losses, kept=1.0):
        return {"loss": sum(losses) / len(losses), "losses": list(losses), "kept": kept}

    settings = Settings(steps=10, measure_every=2)
    curve = [{"step": step, **figures(2.02 + step / 100, 4.04 + step / 100, kept=0.5)} for step in (2, 4, 10)]
    results = {
        "windows": 2,
        "unhealed": {x: figures(3.0, 5.0) for x in ("100%", "50%", "25%", "0%", "opened")}
        | {"source": figures(2.0, 4.0)},
        "trained_on": figures(1.94, 3.88),
        "healed": {"curve": curve, "asked": {"50%": figures(2.0, 4.0, kept=0.5)}},
    }
    table = report.to_markdown(results, settings).splitlines()
    assert "| source, trained on for as many tokens | 100.0% | 2.9100 | -3.00% ± 1.00% |" in table
    assert "| converted, not healed, 25% | 100.0% | 4.0000 | +33.33% ± 0.00% |" in table
    assert "| healed: distilled, gates opened; on the way, at 50% | 50.0% | 3.0700 | +2.33% ± 0.33% |" in table
    assert "| healed: distilled, gates opened; in the end, at 25% | 50.0% | 3.1300 | +4.33% ± 0.33% |" in table
    assert not any("random" in line for line in table), "what was not run is left out"


def test_stages_of_other_settings_are_not_taken_for_these(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(asdict(Settings(seed=0))))
    study = heal.Study.__new__(heal.Study)  # without a corpus
    study.output, study.settings = tmp_path, Settings(seed=1)
    with pytest.raises(ValueError, match="holds stages of other settings"):
        study.results()
    assert [x.name for x in tmp_path.iterdir()] == ["settings.json"]


def test_results_come_back_from_their_file(tmp_path):
    results = {
        "settings": asdict(Settings()),
        "windows": 2,
        "unhealed": {"source": {"losses": [0.1 + 0.2]}},
        "healed": {},
    }
    write_results(results, tmp_path / "results.jsonl")
    assert read_results(tmp_path / "results.jsonl") == results
    rows = read_rows(tmp_path / "results.jsonl")
    assert [x["run"] for x in rows] == ["unhealed", "healed"]
    assert all(x["settings"]["seed"] == 0 for x in rows), "a row tells by itself what it was made with"


@pytest.mark.slow
def test_the_study_goes_from_nothing_to_a_plot_and_takes_up_what_is_done(tmp_path, monkeypatch):
    for split in SPLIT_FILES:
        picks = torch.randint(len(WORDS), (3, 3000)).tolist()
        documents = [Document("made-up", str(i), " ".join(WORDS[j] for j in x)) for i, x in enumerate(picks)]
        write_documents(tmp_path / SPLIT_FILES[split], documents)
    train_tokenizer([" ".join(WORDS)] * 20, 300).save_pretrained(tmp_path / "tokenizer")
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    monkeypatch.setattr(heal, "LlamaConfig", lambda **fields: LlamaConfig(**(fields | small)))
    settings = Settings(source_steps=60, steps=20, measure_every=4, context=64, windows_per_document=2)

    def run():
        return heal.Study(tmp_path, tmp_path / "tokenizer", tmp_path / "out", settings).results(["healed"])

    results = run()
    unhealed, curve = results["unhealed"], results["healed"]["curve"]
    assert unhealed["100%"]["losses"] == pytest.approx(unhealed["source"]["losses"], abs=1e-4)
    assert [x["step"] for x in curve] == [4, 8, 12, 16, 20]
    kept = [x["kept"] for x in curve]
    assert kept[-1] < 0.4 < kept[0], "the schedule was followed"
    assert results["trained_on"]["loss"] < unhealed["source"]["loss"]
    report.plot(results, tmp_path / "healing.png")
    assert (tmp_path / "healing.png").stat().st_size > 10_000

    (tmp_path / "out" / "trained_on.json").unlink()
    stages = []
    monkeypatch.setattr(heal.Study, "trained_on", lambda study: stages.append("trained_on") or results["trained_on"])
    monkeypatch.setattr(heal.Study, "heal", lambda study, name: stages.append(name))
    assert json.dumps(run()) == json.dumps(results)
    assert stages == ["trained_on"]
