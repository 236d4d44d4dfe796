# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A training tells at once what it does, in a pipe too, and calls each figure by its name."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from ham_hf.training.progress import Progress
from ham_hf.training.train import loss_name
from model_cards.healing.report import before_healing


class Pipe(io.StringIO):
    """Holds back what is written until it is flushed, as a pipe does."""

    def __init__(self):
        super().__init__()
        self.seen = ""

    def flush(self):
        self.seen = self.getvalue()


@pytest.fixture
def pipe():
    return Pipe()


def test_the_first_step_is_told_in_a_pipe_before_any_loss(pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", pipe)
    progress = Progress(tokens=64, bar=False, loss="divergence")
    state = TrainerState(max_steps=100, logging_steps=10, is_world_process_zero=True)
    progress.on_train_begin(None, state, None, model=torch.nn.Linear(2, 2))
    assert "Training 6 parameters: 100 steps of 64 tokens" in pipe.seen
    for step in range(1, 4):
        state.global_step = step
        progress.on_step_end(None, state, None)
    assert [line.split()[:2] for line in pipe.seen.splitlines()[1:]] == [["step", "1"]]
    assert "tokens/s" in pipe.seen
    state.global_step = 10
    progress.on_log(None, state, None, {"loss": 0.5, "learning_rate": 0.1, "grad_norm": 1.0})
    assert "step     10  divergence 0.5000" in pipe.seen
    progress.on_log(None, state, None, {"eval_loss": 2.0, "eval_kept": 0.5, "eval_loss/teacher": 1.5})
    assert pipe.seen.splitlines()[-1].split() == ["(the", "teacher)", "1.5000", "-"]


def test_nothing_is_told_twice_where_every_step_is_logged(pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", pipe)
    progress = Progress(tokens=64, bar=False)
    state = TrainerState(max_steps=100, logging_steps=1, is_world_process_zero=True)
    progress.on_train_begin(None, state, None, model=torch.nn.Linear(2, 2))
    state.global_step = 1
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, {"loss": 0.5, "learning_rate": 0.1, "grad_norm": 1.0})
    assert len(pipe.seen.splitlines()) == 2
    assert "step      1  loss 0.5000" in pipe.seen


@pytest.mark.parametrize(
    ("weight", "name"), [(None, "loss"), (0.0, "loss"), (1.0, "divergence"), (0.5, "loss mixed with divergence")]
)
def test_the_loss_of_next_tokens_alone_is_called_loss(weight, name):
    distillation = None if weight is None else SimpleNamespace(weight=weight)
    assert loss_name(SimpleNamespace(distillation=distillation)) == name


def test_the_losses_before_healing_are_told():
    figures = {name: {"loss": n} for n, name in enumerate(("source", "100%", "50%", "25%", "0%", "opened"), start=1)}
    told = before_healing(figures)
    assert "source 1.0000, converted 2.0000, at 50% 3.0000" in told
    assert "gates opened 6.0000" in told
