# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Transformers' Trainer with all its defaults: usage meets its target, and any batch of labels is learned from."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from ham_hf import (
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
)
from ham_hf.training.control import ThresholdCallback, UsageSchedule, check_movable

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
DECAYING = ("proj.weight", "conv.weight", "embed_tokens.weight", "lm_head.weight")


def text(rows=8, length=32):
    """Tokens of which most follow from the one before; each row learns another part of itself."""
    ids = torch.randint(1, 97, (rows, length))
    for column in range(1, length):
        follows = (ids[:, column - 1] * 7 + 3) % 96 + 1
        ids[:, column] = torch.where(torch.rand(rows) < 0.6, follows, ids[:, column])
    labels = ids.clone()
    for row in range(rows):
        labels[row, : (row * 7) % (length - 2)] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


@pytest.fixture
def trainer_of(tmp_path, tiny_config):
    def make(rows, model=None, callbacks=(), trainer=Trainer, options=None, **arguments):
        if model is None:
            torch.manual_seed(1)
            model = HAMForCausalLM(tiny_config(target_kv_usage=0.25))
        settings = {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
        }
        arguments = TrainingArguments(
            str(tmp_path / "run"), use_cpu=True, report_to=[], disable_tqdm=True, **(settings | arguments)
        )
        return trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks), **(options or {}))

    return make


def thresholds_of(model):
    return torch.stack([layer.mixer.threshold.detach().clone() for layer in model.model.layers])


def usage_logged(trainer):
    return torch.tensor([x["kv_usage"] for x in trainer.state.log_history if "kv_usage" in x])


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"weight_decay": 0.1}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01, "optim": "adafactor"},
        pytest.param(
            {"optim": "sgd", "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["adamw", "adafactor, accumulated and clipped", "sgd, accumulated, loss of logits"],
)
def test_usage_meets_its_target_with_any_optimizer(arguments, trainer_of):
    trainer = trainer_of(text(64), callbacks=[ThresholdCallback()], max_steps=50, **arguments)
    trainer.train()
    usage = usage_logged(trainer)
    assert usage[0] > 0.4
    assert (usage[-20:].mean() - 0.25).abs() < 0.02, usage
    assert trainer.model.config.target_kv_usage == 0.25, "between steps, for what is saved"


def test_weight_decay_falls_on_matrices_alone(trainer_of, tiny_config):
    """The first step of AdamW differs by the decay, and by nothing else."""
    moved = []
    for decay in (0.0, 0.5):
        torch.manual_seed(1)
        model = HAMForCausalLM(tiny_config(router="learned_error", attention_bias=True))
        for layer in model.model.layers:  # zeros do not decay
            torch.nn.init.normal_(layer.mixer.router.down_proj.weight)
        frozen = ThresholdCallback(UsageSchedule(((0, 0.25),), freeze_steps=1))
        trainer = trainer_of(text(4), model, [frozen], max_steps=1, learning_rate=1e-2, weight_decay=decay)
        groups = []
        trainer.add_callback(Groups(groups))
        trainer.train()
        assert groups[0] == groups[1], "what a checkpoint holds is as Trainer made it"
        moved.append({name: x.detach() for name, x in model.named_parameters()})
    for name, x in moved[0].items():
        assert torch.equal(x, moved[1][name]) != name.endswith(DECAYING), name
        if name.endswith("threshold"):
            assert torch.equal(x, torch.full_like(x, 0.5))


class Groups(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def look(self, optimizer):
        self.seen.append([[id(x) for x in group["params"]] for group in optimizer.param_groups])

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.look(optimizer)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.look(optimizer)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_resumed_training_is_the_unbroken_one(trainer_of, tmp_path):
    rows, schedule = text(32), UsageSchedule(((0, 1.0), (6, 0.25)))
    settings = {"max_steps": 6, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 3, "seed": 1}
    unbroken = trainer_of(rows, callbacks=[ThresholdCallback(schedule)], **settings | {"save_strategy": "no"})
    unbroken.train()
    trainer_of(rows, callbacks=[ThresholdCallback(schedule), StopAt(3)], **settings).train()
    resumed = trainer_of(rows, callbacks=[ThresholdCallback(schedule)], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert (thresholds_of(unbroken.model) - 0.5).abs().min() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True))
    assert HAMForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3").config.target_kv_usage == 0.75


def test_the_pieces_of_a_batch_move_thresholds_as_the_whole(trainer_of):
    """The callback counts tokens, whatever rows and labels fall to a piece."""
    rows = text(16)
    found = []
    for pieces in (1, 4):
        callback = ThresholdCallback()
        trainer = trainer_of(
            rows, None, [callback], per_device_train_batch_size=8 // pieces, gradient_accumulation_steps=pieces
        )
        trainer.train()
        found.append(thresholds_of(trainer.model))
    assert (found[0] - 0.5).abs().min() > 0.05
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_what_nobody_can_steer_is_refused(trainer_of, tiny_config):
    held = trainer_of(text(4), HAMForCausalLM(tiny_config(target_kv_usage=None)), [ThresholdCallback()])
    with pytest.raises(ValueError, match="`target_kv_usage` of the configuration must be set"):
        held.train()
    with pytest.raises(ValueError, match="`threshold_learning_rate` must be a finite number"):
        ThresholdCallback(threshold_learning_rate=-1)
    whole = [torch.nn.Parameter(torch.zeros(2))]
    check_movable(SimpleNamespace(deepspeed=None), whole, 2)
    with pytest.raises(ValueError, match="`deepspeed` must be left out"):
        check_movable(SimpleNamespace(deepspeed="zero.json"), whole, 2)
    with pytest.raises(ValueError, match="`fsdp_version` must be 2"):
        check_movable(SimpleNamespace(deepspeed=None), [torch.nn.Parameter(torch.zeros(0))], 2)


# --- batches ---------------------------------------------------------------------------------------------------------


def finite(model):
    return [name for name, x in model.named_parameters() if not x.isfinite().all()] == []


def test_a_batch_without_labels_leaves_a_model_whole(trainer_of):
    rows = text(16)
    for row in rows[4:8]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = trainer_of(rows)
    trainer.train()
    assert finite(trainer.model)
    assert len([x for x in trainer.state.log_history if "loss" in x and x["grad_norm"] > 0.1]) == 3


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_that_are_all_ignored_give_gradients_of_zero(items, name, tiny_config):
    model = HAMForCausalLM(tiny_config(target_kv_usage=0.0)).train()
    ids = torch.randint(1, 97, (2, 12))
    arguments = {} if items is None else {"num_items_in_batch": items}
    model(ids, **{name: torch.full_like(ids, -100)}, **arguments).loss.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in model.parameters())
    model.zero_grad()
    model(ids, **{name: torch.full_like(ids, 7)}, ignore_index=7, **arguments).loss.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in model.parameters())


@pytest.mark.parametrize("empty", [False, True], ids=["labels", "no labels"])
@pytest.mark.parametrize("head", [HAMForTokenClassification, HAMForSequenceClassification, HAMForQuestionAnswering])
def test_every_head_trains(head, empty, trainer_of, tiny_config):
    rows = text(16)
    for n, row in enumerate(rows):
        del row["labels"]
        if head is HAMForQuestionAnswering:
            position = torch.tensor(32 if empty else n % 3)  # one beyond the row is ignored
            row |= {"start_positions": position, "end_positions": position}
        elif head is HAMForSequenceClassification:
            row["labels"] = torch.tensor(-100 if empty else n % 2)
        else:
            row["labels"] = torch.full_like(row["input_ids"], -100) if empty else row["input_ids"] % 2
    model = head(tiny_config())
    before = model.model.layers[0].mixer.q_proj.weight.detach().clone()
    trainer = trainer_of(rows, model, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert finite(model)
    assert torch.equal(model.model.layers[0].mixer.q_proj.weight, before) == empty


@pytest.mark.parametrize("parts", [1, 2])
def test_a_head_of_a_classifier_learns_the_mean_of_its_pieces(parts, trainer_of, tiny_config):
    """Its loss is a mean already, which Trainer must divide by the number of pieces."""
    rows = [{"input_ids": x["input_ids"], "labels": x["input_ids"] % 2} for x in text(8)]
    torch.manual_seed(1)
    model = HAMForTokenClassification(tiny_config(classifier_dropout=0.0))
    trainer = trainer_of(
        rows, model, max_steps=1, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts
    )
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    expected = model.eval()(**batch).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-4)


# --- losses that Trainer makes ---------------------------------------------------------------------------------------


class OwnHAM(HAMForCausalLM):
    """A class of a user's own, whose name nobody knows."""


@pytest.mark.parametrize("model_class", [HAMForCausalLM, OwnHAM])
@pytest.mark.parametrize("parts", [1, 2])
def test_smoothed_labels_are_the_tokens_that_follow(model_class, parts, trainer_of, tiny_config):
    rows = text(8)
    model = model_class(tiny_config())
    trainer = trainer_of(
        rows,
        model,
        max_steps=1,
        label_smoothing_factor=0.2,
        per_device_train_batch_size=8 // parts,
        gradient_accumulation_steps=parts,
    )
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    logs = model.eval()(ids).logits[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != -100
    right = logs.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    smoothed = -(0.8 * right + 0.2 * logs.mean(-1))[counted].mean()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(smoothed.item(), abs=2e-4)


def test_a_loss_of_ones_own_is_given_the_logits(trainer_of):
    calls = []

    def squared(outputs, labels, num_items_in_batch=None):
        calls.append((outputs.loss, labels.shape, int(num_items_in_batch)))
        return outputs.logits.square().sum() / num_items_in_batch

    rows = text(8)
    trainer = trainer_of(rows, options={"compute_loss_func": squared}, max_steps=1)
    trainer.train()
    assert calls == [(None, (4, 32), sum(int((row["labels"][1:] != -100).sum()) for row in rows[:4]))]
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_the_number_of_items_is_the_only_argument_without_labels(tiny_config):
    model = HAMForCausalLM(tiny_config()).eval()
    ids = torch.randint(1, 97, (2, 12))
    assert torch.equal(model(ids, num_items_in_batch=5).logits, model(ids).logits)
    with pytest.raises(TypeError, match=r"unexpected keyword arguments .*ignore_index"):
        model(ids, ignore_index=3)


# --- pieces of a batch in a loop of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize("padded", [False, True], ids=["rows of one length", "rows of unequal lengths"])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
def test_pieces_of_a_batch_add_up_to_its_gradient(shifted, padded, scope, tiny_config):
    """Whatever part of each row is learned: each piece weighs its rows as the whole does."""
    model = HAMForCausalLM(tiny_config(target_kv_usage=0.1, threshold_scope=scope)).train()
    rows = text(8)
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(8):
            ids[row, 32 - 3 * row :], mask[row, 32 - 3 * row :], labels[row, 32 - 3 * row :] = 0, 0, -100
        labels[7], labels[6, 13] = -100, 5
    items = (labels[:, 1:] != -100).sum()
    if shifted:
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    name = "shift_labels" if shifted else "labels"

    def gradient(size):
        model.zero_grad()
        for piece in zip(ids.split(size), mask.split(size), labels.split(size), strict=True):
            x, real, y = piece
            model(x, real, **{name: y}, num_items_in_batch=items, use_cache=False).loss.backward()
        return torch.stack([layer.mixer.threshold.grad for layer in model.model.layers])

    whole = gradient(8)
    assert whole.abs().min() > 0.05
    for size in (1, 2, 4):
        assert (gradient(size) - whole).abs().max() < 1e-6
