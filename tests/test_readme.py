# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The examples of the pages run as they stand, in order, their links lead somewhere, and their tables are measured."""

import json
import re
from pathlib import Path

import pytest

from ham_hf.files import read_rows
from model_cards.healing.report import to_markdown
from model_cards.healing.results import read_results as read_healing
from model_cards.healing.settings import Settings
from model_cards.study.report import write_report
from model_cards.study.results import check_results, read_results
from model_cards.study.study import jobs_of, read_study

ROOT = Path(__file__).parents[1]


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "ham_hf", "kernels", "conversion_scripts", "model_cards")
    for path in (ROOT.glob("*.md") if not folder else (ROOT / folder).rglob("*.md"))
    if path.name != "card_template.md"
)
# Each table of the front page, and the file whose rows it shows.
TABLES = {
    "usage": "model_cards/ham_tiny/usage.md",
    "study": "model_cards/study/differences.md",
    "bench": "model_cards/benchmarks/bench.md",
    "gpu": "kernels/benchmarks/results/attention.md",
}


def between(page, name):
    """The text between the markers `name` of a page."""
    return (ROOT / page).read_text().split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_front_page_show_measured_rows(name):
    rows, measured = between("README.md", name).splitlines(), (ROOT / TABLES[name]).read_text().splitlines()
    assert len(rows) >= 5
    assert all(row in measured for row in rows), name


# To export takes ten seconds, and is among the quick tests of tests/tools/test_export.py.
@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("README.md", None),
        ("ham_hf/README.md", "torch.export.export("),
        pytest.param("ham_hf/README.md", None, marks=pytest.mark.slow),
        ("ham_hf/training/README.md", None),
        ("model_cards/ham_tiny/README.md", None),
    ],
)
def test_python_examples_run(name, left_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    if left_out is not None:
        blocks = [block for block in blocks if left_out not in block]
    namespace: dict = {}
    for block in blocks:
        # What a reader loads from the Hub is loaded from the folder here.
        exec(block.replace("OWNER/ham-tiny", str(ROOT / "ham_hf/checkpoints/ham-tiny")), namespace)


def test_usage_table_is_the_measured_one():
    """Every loss in the table of the card is one that the script wrote."""
    table = between("model_cards/ham_tiny/README.md", "usage")
    results = json.loads((ROOT / "model_cards/ham_tiny/usage.json").read_text())["results"]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[3].strip() for row in rows] == [f"{x['loss']:.4f}" for x in results]


def test_healing_table_is_the_measured_one():
    table = between("model_cards/healing/README.md", "healing")
    assert table == (ROOT / "model_cards/healing/results.md").read_text().strip()
    results = read_healing(ROOT / "model_cards/healing/results.jsonl")
    assert table == to_markdown(results, Settings(**results["settings"])).strip()


def test_the_study_is_what_its_results_say(tmp_path):
    stored, study = ROOT / "model_cards/study", read_study("cpu")
    jobs = list(jobs_of(study))
    check_results(jobs, stored)
    results = read_results(jobs, stored)
    assert len(results) == len(jobs) == sum(len(read_rows(x)) for x in stored.glob("*.jsonl")), (
        "a result is missing, or is no longer asked for"
    )
    write_report(results, list(study["arms"]), tmp_path)
    for name in ("study.md", "differences.md", "repairs.md", "selection.md"):
        assert (stored / name).read_text() == (tmp_path / name).read_text()
    for name, file in (("study", "differences.md"), ("repairs", "repairs.md"), ("selection", "selection.md")):
        assert between("model_cards/study/README.md", name) == (stored / file).read_text().strip()


def test_loss_improves_as_more_is_kept():
    """Held-out loss falls up to three quarters kept, as does that on a passage seen before; the rest adds nothing."""
    results = json.loads((ROOT / "model_cards/ham_tiny/usage.json").read_text())["results"]
    asked = sorted((x for x in results if x["kv_usage"] is not None), key=lambda x: x["kv_usage"])
    losses, recall = [x["loss"] for x in asked], [x["recall_loss"] for x in asked]
    assert losses[:-1] == sorted(losses[:-1], reverse=True), losses
    assert abs(losses[-1] - losses[-2]) < 0.002
    assert losses[0] - losses[-1] > 0.1
    assert recall[:-1] == sorted(recall[:-1], reverse=True), recall
    assert recall[0] - recall[-1] > 1
