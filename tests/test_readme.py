# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The examples of README and model card run as they stand, in order, and their tables are the measured ones."""

import json
import re
from pathlib import Path

import pytest

from model_cards.healing.report import to_markdown
from model_cards.healing.results import read_results as read_healing
from model_cards.healing.settings import Settings
from model_cards.rows import read_rows
from model_cards.study.report import write_report
from model_cards.study.results import check_results, read_results
from model_cards.study.study import jobs_of, read_study

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["README.md", "model_cards/ham_tiny/README.md"])
def test_python_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        # What a reader loads from the Hub is loaded from the folder here.
        exec(block.replace("OWNER/ham-tiny", str(ROOT / "ham_hf/checkpoints/ham-tiny")), namespace)


@pytest.mark.parametrize("name", ["README.md", "model_cards/ham_tiny/README.md"])
def test_usage_table_is_the_measured_one(name):
    """Every loss in the table is one that the script wrote."""
    table = (ROOT / name).read_text().split("<!-- usage:begin -->")[1].split("<!-- usage:end -->")[0]
    results = json.loads((ROOT / "model_cards/ham_tiny/usage.json").read_text())["results"]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[3].strip() for row in rows] == [f"{x['loss']:.4f}" for x in results]


def test_healing_table_is_the_measured_one():
    table = (ROOT / "README.md").read_text().split("<!-- healing:begin -->")[1].split("<!-- healing:end -->")[0]
    assert table.strip() == (ROOT / "model_cards/healing/results.md").read_text().strip()
    results = read_healing(ROOT / "model_cards/healing/results.jsonl")
    assert table.strip() == to_markdown(results, Settings(**results["settings"])).strip()


def test_the_study_is_what_its_results_say(tmp_path):
    stored, study = ROOT / "model_cards/study", read_study("cpu")
    jobs = list(jobs_of(study))
    check_results(jobs, stored)
    results = read_results(jobs, stored)
    assert len(results) == len(jobs) == sum(len(read_rows(x)) for x in stored.glob("*.jsonl")), (
        "a result is missing, or is no longer asked for"
    )
    write_report(results, list(study["arms"]), tmp_path)
    for name in ("study.md", "differences.md"):
        assert (stored / name).read_text() == (tmp_path / name).read_text()
    table = (ROOT / "README.md").read_text().split("<!-- study:begin -->")[1].split("<!-- study:end -->")[0]
    assert table.strip() == (stored / "differences.md").read_text().strip()


def test_loss_improves_as_more_is_kept():
    """Held-out loss falls all the way; so does that on a passage seen before, up to three quarters kept."""
    results = json.loads((ROOT / "model_cards/ham_tiny/usage.json").read_text())["results"]
    asked = sorted((x for x in results if x["kv_usage"] is not None), key=lambda x: x["kv_usage"])
    losses, recall = [x["loss"] for x in asked], [x["recall_loss"] for x in asked]
    assert losses == sorted(losses, reverse=True), losses
    assert losses[0] - losses[-1] > 0.1
    assert recall[:-1] == sorted(recall[:-1], reverse=True), recall
    assert recall[0] - recall[-1] > 1
