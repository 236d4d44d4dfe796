# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness scores a HAM checkpoint at the threshold among its model arguments."""

import json
import os
from pathlib import Path

import pytest
import torch

from ham_hf.inspection.demo_prompt import DEMO_PROMPT

Instance = pytest.importorskip("lm_eval.api.instance").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

ROOT = Path(__file__).parents[2]
TASKS = Path("tests/tools/tasks")


# The harness would read ten thousand tasks of its own before it came to the one that is asked for.
OWN_TASK_ONLY = """
import sys
from functools import partialmethod
from lm_eval.tasks import TaskManager

TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
"""
BY_HAM = OWN_TASK_ONLY + "from ham_hf.cli import main; sys.exit(main(['run', 'lm_eval', *sys.argv[1:]]))"
BY_ITSELF = OWN_TASK_ONLY + "from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"


def evaluate(run_program, program, checkpoint, threshold, output, extra=""):
    """The accuracy and every log-likelihood that the harness found, in its own process."""
    arguments = f"pretrained={checkpoint},dtype=float32,threshold={threshold}{extra}"
    options = f"--tasks recall --include_path {TASKS} --device cpu --batch_size 3 --log_samples".split()
    environment = os.environ | {"HF_DATASETS_CACHE": str(output / "datasets"), "HF_HOME": str(output / "home")}
    environment["PYTHONPATH"] = str(ROOT)
    options += ["--model", "hf", "--model_args", arguments, "--output_path", output]
    result = run_program(program, *options, folder=ROOT, environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]["recall"]
    samples = [json.loads(line) for line in next(output.rglob("samples_*.jsonl")).read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    return results["acc,none"], [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in samples]


def directly(model, tokenizer, threshold):
    """The same, computed from the logits of one sequence at a time."""
    documents = [json.loads(line) for line in (ROOT / TASKS / "recall.jsonl").read_text().splitlines()]
    likelihoods = []
    for document in documents:
        start = len(tokenizer(document["context"]).input_ids)
        rows = [
            tokenizer(document["context"] + choice, return_tensors="pt").input_ids for choice in document["choices"]
        ]
        with torch.no_grad():
            scores = [model(ids[:, :-1], threshold=threshold).logits.log_softmax(-1) for ids in rows]
        targets = [ids[0, start:, None] for ids in rows]
        likelihoods.append(
            [x[0, start - 1 :].gather(1, ids).sum().item() for x, ids in zip(scores, targets, strict=True)]
        )
    right = [row.index(max(row)) == d["answer"] for row, d in zip(likelihoods, documents, strict=True)]
    return sum(right) / len(right), likelihoods


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0, 2])
def test_threshold_decides_the_score(threshold, checkpoint, with_code, model, tokenizer, run_program, tmp_path):
    """Once by `ham-hf run`, once by the code beside the checkpoint in a process that never imports ham_hf."""
    if threshold == 0:
        found = evaluate(run_program, BY_HAM, checkpoint, threshold, tmp_path)
    else:
        found = evaluate(run_program, BY_ITSELF, with_code, threshold, tmp_path, ",trust_remote_code=True")
    accuracy, likelihoods = directly(model, tokenizer, threshold)
    assert found[0] == accuracy
    # Rows of a batch are padded, so matrix products add up in another order: 1.4e-5 measured, of sums about 20.
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(likelihoods), atol=1e-3, rtol=0)
    of_the_other = directly(model, tokenizer, 2 - threshold)[0]
    assert (accuracy > of_the_other) is (threshold == 0), "what is kept is recalled"


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_generation_takes_a_threshold_of_its_own(threshold, model, tokenizer):
    """`--gen_kwargs threshold=...` reaches a task of the kind `generate_until`, whose prompts are padded."""
    prompts = [DEMO_PROMPT, "The captain looked at the sea, and"]
    arguments = {"until": ["<|endoftext|>"], "max_gen_toks": 8, "do_sample": False, "threshold": threshold}
    requests = [Instance("generate_until", {}, (prompt, arguments), i) for i, prompt in enumerate(prompts)]
    found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu").generate_until(requests)
    expected = {0.0: [], 2.0: []}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for own, texts in expected.items():
            out = model.generate(ids, max_new_tokens=8, do_sample=False, threshold=own)
            texts.append(tokenizer.decode(out[0, ids.shape[1] :]))
    assert found == expected[threshold]
    assert expected[0.0][0] != expected[2.0][0]
