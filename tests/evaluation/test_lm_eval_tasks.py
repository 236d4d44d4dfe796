# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness gets the same prompts of `ruler`, the same answers and the same scores."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from ham_hf.evaluation import lm_eval_tasks
from ham_hf.evaluation.lm_eval_tasks import LENGTHS, documents, process_results
from ham_hf.evaluation.ruler import TASKS, make_samples

CHECKPOINT = str(Path(__file__).parents[2] / "ham_hf" / "checkpoints" / "ham-tiny")
FOLDER = Path(lm_eval_tasks.__file__).parent


class Loader(yaml.SafeLoader):
    """Reads `!function` as the harness does: a module and the name of a function in it."""


Loader.add_constructor(
    "!function", lambda _, node: getattr(import_module(node.value.rpartition(".")[0]), node.value.rpartition(".")[2])
)


def read(name):
    """The settings of a YAML file over those that it includes."""
    settings = yaml.load((FOLDER / name).read_text(encoding="utf-8"), Loader)
    included = settings.pop("include", None)
    return (read(included) if included else {}) | settings


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_every_task_has_a_file():
    files = {path.stem: read(path.name) for path in FOLDER.glob("*.yaml") if path.stem != "_ham_ruler"}
    assert files.keys() == TASKS.keys()
    for name, settings in files.items():
        assert settings["task"] == f"ham_ruler_{name}"
        assert settings["dataset_kwargs"] == {"ruler_task": name}
        expected = {"do_sample": False, "max_gen_toks": TASKS[name].max_new_tokens, "until": []}
        assert settings["generation_kwargs"] == expected
        assert settings["output_type"] == "generate_until"
        assert settings["custom_dataset"] is documents
        assert settings["process_results"] is process_results
        assert [metric["metric"] for metric in settings["metric_list"]] == [str(length) for length in LENGTHS]


def test_documents_are_the_samples(tokenizer):
    settings = read("niah_multiquery.yaml")
    metadata = {
        "pretrained": CHECKPOINT,
        "threshold": 0.4,
        "max_seq_lengths": [512, 1024],
        "num_samples": 3,
        "seed": 7,
    }
    found = settings["custom_dataset"](**metadata, **settings["metadata"], **settings["dataset_kwargs"])
    assert [*found] == [settings["test_split"]]
    rows = [*found["test"]]
    expected = [x for length in (512, 1024) for x in make_samples("niah_multiquery", tokenizer, length, 3, seed=7)]
    names = settings["doc_to_text"], settings["gen_prefix"], settings["doc_to_target"]
    assert [(row[names[0]] + row[names[1]], tuple(row[names[2]])) for row in rows] == [x[:2] for x in expected]
    first, *_, last = rows
    assert settings["process_results"](first, [f"{first['outputs'][1]}, none"]) == {"512": 0.25}
    assert settings["process_results"](last, [" and ".join(last["outputs"])]) == {"1024": 1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "`tokenizer` or `pretrained` must be a name or a folder, got None"),
        ({"pretrained": CHECKPOINT, "max_seq_lengths": [1000]}, r"`max_seq_lengths` must be .*, got \[1000\]"),
        ({"pretrained": CHECKPOINT, "max_seq_lengths": 1024}, "`max_seq_lengths` must be a list .*, got 1024"),
        ({"pretrained": CHECKPOINT, "num_samples": 0}, "`count` must be 1 or more, got 0"),
    ],
)
def test_metadata_that_fit_no_task_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        documents("fwe", **metadata)


def test_the_harness_asks_for_the_same_prompts_and_scores_them(tokenizer):
    evaluator = pytest.importorskip("lm_eval.evaluator")
    LM = pytest.importorskip("lm_eval.api.model").LM
    TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
    samples = {task: make_samples(task, tokenizer, 1024, 2) for task in TASKS}
    answers = {x.prompt: x.answers for of_task in samples.values() for x in of_task}
    seen = []

    class Knowing(LM):
        """A model that knows the answers, in upper case."""

        def generate_until(self, requests):
            seen.extend(request.args for request in requests)
            return [", ".join(answers[request.args[0]]).upper() for request in requests]

        loglikelihood = loglikelihood_rolling = None

    manager = TaskManager(
        include_path=str(FOLDER),
        include_defaults=False,
        metadata={"pretrained": CHECKPOINT, "max_seq_lengths": [1024], "num_samples": 2},
    )
    found = evaluator.simple_evaluate(Knowing(), tasks=["ham_ruler"], task_manager=manager, bootstrap_iters=0)
    assert {prompt for prompt, _ in seen} == answers.keys()
    assert all(arguments["do_sample"] is False for _, arguments in seen)
    for task in TASKS:
        results = {name: value for name, value in found["results"][f"ham_ruler_{task}"].items() if ",none" in name}
        assert results["1024,none"] == 1
        assert set(results) == {"1024,none", "1024_stderr,none"}
