# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer with every head: it trains them, and collects what they predict, but not their caches."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ham_hf import (
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    inputs_ham,
)

HEADS = (HAMForCausalLM, HAMForSequenceClassification, HAMForTokenClassification, HAMForQuestionAnswering)


def rows(head) -> list[dict[str, torch.Tensor]]:
    texts = torch.randint(3, 97, (4, 9))
    labels: dict[Any, dict[str, torch.Tensor]] = {
        HAMForCausalLM: {"labels": texts},
        HAMForSequenceClassification: {"labels": torch.tensor([0, 1, 1, 0])},
        HAMForTokenClassification: {"labels": texts % 2},
        HAMForQuestionAnswering: {
            "start_positions": torch.tensor([0, 1, 2, 3]),
            "end_positions": torch.tensor([3, 4, 8, 3]),
        },
    }
    return [{"input_ids": text} | {name: x[n] for name, x in labels[head].items()} for n, text in enumerate(texts)]


@pytest.mark.parametrize("head", HEADS)
def test_caches_are_not_collected(tiny_config, tmp_path, head):
    model, data = head(tiny_config()), rows(head)
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True, use_cache=True)
    predicted = Trainer(model, arguments).predict(data)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    expected = model(**batch)
    if head in HEADS[:2]:  # the others return none
        assert inputs_ham.CACHE_NAME in expected
    names = ("start_logits", "end_logits") if head is HAMForQuestionAnswering else ("logits",)
    found = predicted.predictions if len(names) > 1 else (predicted.predictions,)
    for x, name in zip(found, names, strict=True):
        torch.testing.assert_close(torch.from_numpy(x), expected[name])
    assert predicted.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("head", [HEADS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in HEADS[1:3]), HEADS[3]])
def test_accumulated_steps_are_those_of_whole_batches(tiny_config, tmp_path, head):
    """Of SGD, whose steps are as long as the gradient; all rows have equally many labels."""
    trained = []
    for size, calls in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = head(tiny_config(target_kv_usage=None)).train()
        if hasattr(model, "dropout"):
            model.dropout = torch.nn.Identity()
        arguments = TrainingArguments(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=calls,
            max_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        torch.manual_seed(1)
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        Trainer(model, arguments, train_dataset=rows(head)).train()
        trained.append({name: x.detach() - before[name] for name, x in model.named_parameters()})
    assert any(x.abs().max() > 1e-3 for x in trained[0].values())
    for name, x in trained[0].items():
        torch.testing.assert_close(trained[1][name], x, rtol=1e-3, atol=1e-6)
