# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A recipe is read from YAML, or refused with a message that names the key and says what it takes."""

from pathlib import Path

import pytest

from ham_hf.training.recipe import read_recipe

BASE = """\
output: {folder}/out
model: {{new: {{hidden_size: 16}}}}
data: {{files: {folder}/a.txt}}
steps: 10
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some text.")

    def read_with(text="", base=BASE):
        (tmp_path / "r.yaml").write_text(base.format(folder=tmp_path) + text)
        return read_recipe(tmp_path / "r.yaml")

    return read_with


def test_values_and_defaults(read):
    recipe = read("trainer: {learning_rate: 1e-3}\nusage: {schedule: [[0, 1.0], [10, 0.5]], freeze_steps: 2}\n")
    assert recipe.trainer["learning_rate"] == 0.001
    assert recipe.usage.usage_schedule(0.3).target_at(5) == 0.75
    assert recipe.usage.usage_schedule(0.3).target_at(1) is None, "frozen"
    assert read("usage: {freeze_steps: 2}").usage.usage_schedule(0.3).target_at(5) == 0.3
    assert read("usage: {freeze_steps: 2}").usage.usage_schedule(0.3).target_at(1) is None
    assert recipe.to_dict()["model"]["from"] is None
    assert recipe.to_dict()["trainer"]["save_total_limit"] == 2


def test_the_example_is_a_recipe(tmp_path, monkeypatch):
    example = Path(__file__).parents[2] / "ham_hf" / "training" / "examples" / "small.yaml"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Some text.")
    monkeypatch.chdir(tmp_path)
    assert read_recipe(example).steps == 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contxt: 5", "The recipe has no key `contxt`: did you mean `context`"),
        ("context: many", "`context` must be a whole number, got 'many'"),
        ("context: 1.5", "`context` must be a whole number, got 1.5"),
        ("context: true", "`context` must be a whole number, got True"),
        ("context: 1", "`context` must be at least 2, got 1"),
        ("usage: {target: 1.5}", "`usage`: `target` must be between 0 and 1, got 1.5"),
        ("usage: {target: [0.5, -1]}", "`usage`: `target` must be between 0 and 1"),
        (
            "usage: {schedule: [[0, 1.0], [11, 0.5]]}",
            "`usage: schedule` must end within `steps` (10), got a point at 11",
        ),
        ("usage: {schedule: [[0, 1.0], [5, 2]]}", "`usage`: `schedule` must be between 0 and 1"),
        ("usage: {schedule: [5, 2]}", "`usage`: `schedule` must be pairs"),
        ("usage: {schedule: [[0, 1.0]], target: 0.5}", "at most one of `target` and `schedule`"),
        ("usage: {freeze_steps: 11}", "`usage: freeze_steps` must be at most `steps` (10), got 11"),
        ("usage: {targt: 0.5}", "`usage` has no key `targt`: did you mean `target`"),
        ("usage: 0.5", "`usage` must hold keys with values"),
        ("evaluation: {usages: [0.5, 7]}", "`evaluation`: `usages` must be fractions from 0 to 1, got 7"),
        ("evaluation: {usages: [half]}", "`evaluation: usages` must be a list of a number, got ['half']"),
        ("evaluation: {data: {files: b.txt}}", "`evaluation: data`: `files` must be files"),
        ("trainer: {learning_rat: 1}", "`trainer` has no key `learning_rat`: did you mean `learning_rate`"),
        ("trainer: {learning_rate: fast}", "`trainer: learning_rate` must be a number, got 'fast'"),
        ("trainer: {learning_rate: -1e-3}", "`trainer: learning_rate` must be at least 0, got -0.001"),
        ("trainer: {max_steps: 3}", "`trainer: max_steps` must be left out: it is set by `steps`"),
        ("trainer: {save_only_model: true}", "`trainer: save_only_model` must be left out"),
        ("trainer: {per_device_train_batch_size: 0}", "`trainer: per_device_train_batch_size` must be above 0"),
        (
            "trainer: {lr_scheduler_type: greedy}",
            "`trainer: lr_scheduler_type` must be a schedule that depends",
        ),
        ("trainer: {prediction_loss_only: true}", "`trainer: prediction_loss_only` must be left out"),
        ("trainer: {per_device_eval_batch_size: 0}", "`trainer: per_device_eval_batch_size` must be above 0"),
        ("steps: 5", "`steps` is given twice"),
        ("[", "is not valid YAML"),
    ],
)
def test_refusals(read, text, message):
    with pytest.raises((TypeError, ValueError)) as error:
        read(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "", "The recipe must have the key `steps`, a whole number"),
        ("hidden_size", "hiden_size", "`model: new` has no key `hiden_size`: did you mean `hidden_size`"),
        ("new: {{hidden_size: 16}}", "tokenizer: x", "`model` must have one of `from`"),
        ("a.txt", "b.txt", "b.txt' finds none"),
        ("files:", "name: x, files:", "`data`: must have one of `files`"),
        ("data: {{files", "data: {{document: page, files", "`data`: `document` must be one of"),
        ("data: {{files", "data: {{split: test, files", "`data`: `split` must be left out beside `files`"),
        ("data: {{files", "data: {{streaming: false, files", "`data`: `streaming` must be left out beside `files`"),
    ],
)
def test_refusals_of_what_must_be_there(read, old, new, message):
    assert old in BASE
    with pytest.raises((TypeError, ValueError)) as error:
        read(base=BASE.replace(old, new))
    assert message in str(error.value)


def test_a_way_to_find_documents_is_for_text_files(read, tmp_path):
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="`document` must be left out: each record of json files is a document"):
        read(base=BASE.replace("files: {folder}/a.txt", "document: line, files: {folder}/b.jsonl"))


def test_a_file_is_found_by_its_name_before_that_is_a_pattern(read, tmp_path):
    (tmp_path / "b[1].txt").write_text("Some text.")
    (tmp_path / "b1.txt").write_text("Other text.")
    assert read(base=BASE.replace("{folder}/a.txt", "'{folder}/b[1].txt'")).data.paths() == [tmp_path / "b[1].txt"]


def test_files_of_two_formats_are_refused(read, tmp_path):
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="of one format, got \\['json', 'text'\\]"):
        read(base=BASE.replace("/a.txt", ""))


@pytest.mark.parametrize("depth", [101, 400, 1000, 50_000])
def test_yaml_that_is_nested_too_deep_is_refused(read, depth):
    with pytest.raises(ValueError, match=r"r\.yaml is not valid YAML: it is nested more than 100 deep"):
        read("trainer: " + "[" * depth + "]" * depth)
