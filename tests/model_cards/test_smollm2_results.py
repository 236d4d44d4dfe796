# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The page of SmolLM2 shows what its rows say, and its tables count right."""

from pathlib import Path

import pytest

from ham_hf.files import read_rows
from model_cards.smollm2 import chat, needles, presses, report, texts, transfer

ROOM = Path(report.__file__).parent
PAGE = (ROOM / "README.md").read_text()
TABLES = {
    "loss": (report.to_markdown, "results"),
    "chat": (chat.to_markdown, "chat"),
    "needles": (needles.to_markdown, "needles"),
    "presses": (presses.to_markdown, "presses"),
    "transfer": (transfer.to_markdown, "transfer"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_what_the_rows_say(name):
    to_markdown, file = TABLES[name]
    table = PAGE.partition(f"<!-- {name}:begin -->\n")[2].partition(f"<!-- {name}:end -->")[0].strip()
    assert table == (ROOM / f"{file}.md").read_text().strip()
    assert table == to_markdown(read_rows(ROOM / f"{file}.jsonl")).strip()


def test_the_front_page_tells_the_same_needles():
    front = " ".join((ROOM.parents[1] / "README.md").read_text().split())
    first = needles.table_of(needles.of_length(read_rows(ROOM / "needles.jsonl"), 1024), 1024)
    rows = {line.split(" | ")[0].strip("| "): line for line in first.splitlines()}
    assert "with 38% of the tokens in memory" in front
    assert "finds 99 of 100 numbers" in front
    assert "0 of 100 if all heads keep alike" in front
    assert "| 38.0% (39.4%) | 99 of 100 (" in rows["by importance"]
    assert "| 0 of 100 (" in rows["all heads alike"]


def test_an_interval_is_wilson_s():
    low, high = needles.interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert needles.interval(0, 20)[0] == pytest.approx(0, abs=1e-9)
    assert needles.interval(20, 20)[1] == pytest.approx(1, abs=1e-9)


def needle(index, arm, found, held=0.3, loss=1.0):
    return {"kind": "needle", "index": index, "arm": arm, "found": found, "held": held, "loss": loss}


def text(index, arm, loss, held=0.3):
    return {"kind": "text", "index": index, "arm": arm, "loss": loss, "held": held}


def test_needles_count_where_the_source_finds_them():
    rows = [needle(i, "everything", i > 0, held=1.0) for i in range(5)]
    rows += [needle(i, "by importance", i > 2, held=0.3 + i / 100, loss=float(i)) for i in range(5)]
    rows += [text(i, "everything", 2.0, held=1.0) for i in range(2)]
    rows += [text(i, "by importance", 2.1 + 0.2 * i) for i in range(2)]
    lines = [line for line in needles.to_markdown(rows).splitlines() if line.startswith("| by importance")]
    (line,) = lines
    assert "| 2 of 4 (15% to 85%) |" in line, "the first prompt is one that the source does not answer"
    assert "| 32.5% (34.0%) |" in line
    assert "| 2.500 | 2.2000 | +10.0% ± 5.0% |" in line
    assert "in which the source finds the number, as it does in 4 of 5" in needles.to_markdown(rows)


def test_needles_of_each_length_have_their_table():
    rows = [needle(0, "everything", True, held=1.0), text(0, "everything", 2.0, held=1.0)]
    longer = [row | {"length": 2048, "index": 0, "found": False} for row in rows]
    short, long = needles.to_markdown([*longer, *rows, longer[0] | {"index": 1, "found": True}]).split("\n\n|")
    assert "1 of 1" in short
    assert "Prompts of 1024 tokens" in short
    assert "Prompts of 2048 tokens in which the source finds the number, as it does in 1 of 2" in long


def test_a_transfer_is_told_before_and_after():
    rows = [
        {"arm": "l2", "steps": steps, **figures}
        for steps in (7, 0)
        for figures in (
            {"kind": "text", "index": 0, "loss": 2.0 + (not steps) / 4, "second_time": 1.0 + steps / 7, "held": 0.25},
            {
                "kind": "text",
                "index": 1,
                "loss": 3.0 + (not steps) * 0.75,
                "second_time": 2.0 + steps / 7,
                "held": 0.27,
            },
            {"kind": "needle", "index": 0, "found": steps > 0, "loss": 0.5, "held": 0.3},
        )
    ]
    after = [row for row in rows if row["steps"]]
    rows += [row | {"distillation": 3, "loss": row["loss"] - 0.25} for row in after]
    rows += [row | {"steps": 9, "rows": 32, "loss": row["loss"] - 0.5} for row in after]
    table = transfer.to_markdown(rows)
    assert "| l2 | 147 | 0 | 26.0% | 2.0000 | 2.500 | 1 of 1 | 0.000 |" in table, "9 steps of 32 rows of 512 tokens"
    assert "| l2 | 0 | 0 | 26.0% | 3.0000 | 1.500 | 0 of 1 | 0.500 |" in table
    assert "| l2 | 4 | 0 | 26.0% | 2.5000 | 2.500 | 1 of 1 | 0.500 |" in table
    assert "| l2 | 4 | 2 | 26.0% | 2.2500 | 2.500 | 1 of 1 | 0.250 |" in table
    assert "random" not in table
    assert "| l2, 4 + 0 - l2, 0 + 0 | -0.500 ± 0.250 (2 of 2) | +1.000 ± 0.000 (0 of 2) |" in table
    assert "| l2, 4 + 2 - l2, 4 + 0 | -0.250 ± 0.000 (2 of 2) | +0.000 ± 0.000 (0 of 2) |" in table


@pytest.mark.parametrize("on_gpu", [False, True])
def test_healing_is_a_recipe_for_each_stage(tmp_path, monkeypatch, on_gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    read = []
    monkeypatch.setattr(transfer, "train", lambda recipe: read.append(recipe))
    before, text = tmp_path / "before", tmp_path / "mine.txt"
    text.write_text("Some text.")
    healing = transfer.Healing(steps=5, distillation=7, rows=3, text=str(text))
    after = transfer.transferred("l2", before, healing)
    healed = transfer.distilled("l2", after, tmp_path / "source", healing)
    assert after.parent.name.startswith("steps-5-rows-3-")
    assert after.parent.name != healing._replace(text="other").folder(before.parent).name
    assert healed.parent.name == f"{after.parent.name}-distilled-7"
    assert healing.labels() == {"rows": 3, "trained_on": str(text)}
    assert transfer.Healing(5).labels() == {}
    first, second = read
    assert (first.transfer.steps, first.transfer.usage, first.steps) == (5, 0.25, 0)
    assert (second.steps, second.distillation.teacher) == (7, str(tmp_path / "source"))
    for recipe in read:
        assert recipe.data.files == str(text)
        assert recipe.trainer["per_device_train_batch_size"] == 3
        assert (recipe.trainer["bf16"], recipe.trainer["use_cpu"]) == (on_gpu, not on_gpu)
    assert transfer.Healing(5).folder(tmp_path).name == "steps-5"
    assert transfer.Healing(5).recipe(tmp_path)["data"]["files"] == str(tmp_path / "text.txt")
    assert (tmp_path / "text.txt").read_text() == texts.halves()[0]


def test_nothing_that_is_judged_was_calibrated_on():
    calibration, judged = texts.halves()
    told = {texts.words(x) for x in judged.split("\n\n")}
    assert not told & {texts.words(x) for x in calibration.split("\n\n")}
