# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own Trainer follows a schedule of the target usage, logs what is kept, and resumes as if never cut."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ham_hf import HAMForCausalLM
from ham_hf.training.control import ThresholdCallback, UsageSchedule, parameter_groups

SCHEDULE = UsageSchedule(((2, 1.0), (10, 0.25)), freeze_steps=2)
STEPS = 12


class Watched(Trainer):
    """Keeps its own account, by step, of the target, the thresholds and the tokens kept in training."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.targets, self.kept, self.thresholds, self.evaluated = {}, {}, {}, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False, output_routing_scores=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            step = self.state.global_step
            thresholds = torch.stack([layer.mixer.threshold.detach().clone() for layer in model.model.layers])
            kept = torch.stack(outputs.routing_scores) >= thresholds[:, None, None]
            self.targets[step], self.thresholds[step] = model.config.target_kv_usage, thresholds
            self.kept.setdefault(step, []).append(kept.float().mean((1, 2)))
        else:
            self.evaluated += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def trainer_of(tmp_path, tiny_config):
    rows = [{"input_ids": x, "labels": x} for x in torch.randint(1, 97, (STEPS * 8, 24))]

    def make(schedule=SCHEDULE, settings=None, callbacks=(), model=None, **arguments):
        if model is None:
            torch.manual_seed(1)
            model = HAMForCausalLM(tiny_config(**(settings or {})))
        options = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **(options | arguments),
        )
        return Watched(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows[:8],
            optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3, 0.1)), None),
            callbacks=[ThresholdCallback(schedule), *callbacks],
        )

    return make


def logs_of(trainer):
    return [x for x in trainer.state.log_history if "loss" in x]


def test_targets_follow_the_schedule_and_logs_tell_what_was_kept(trainer_of):
    trainer = trainer_of()
    trainer.train()
    assert trainer.targets == {step: SCHEDULE.target_at(step) for step in range(STEPS)}
    assert trainer.targets[1] is None
    assert trainer.targets[6] == 0.625
    assert torch.equal(trainer.thresholds[2], trainer.thresholds[0]), "held at first"
    assert trainer.thresholds[5].max() < trainer.thresholds[2].min(), "all is to be kept"
    assert trainer.evaluated == 4
    logs = logs_of(trainer)
    assert [x["step"] for x in logs] == [2, 4, 6, 8, 10, 12]
    for x in logs:
        # Of the two steps since the last log, without the evaluations between.
        kept = torch.stack([*trainer.kept[x["step"] - 2], *trainer.kept[x["step"] - 1]]).mean(0)
        assert x["kv_usage"] == pytest.approx(kept.mean().item(), abs=1e-6)
        for n, heads in enumerate(kept):
            assert x[f"kv_usage/layer_{n}"] == pytest.approx(heads.mean().item(), abs=1e-6)
            assert x[f"kv_usage_min/layer_{n}"] == pytest.approx(heads.min().item(), abs=1e-6)
            assert x[f"kv_usage_max/layer_{n}"] == pytest.approx(heads.max().item(), abs=1e-6)
            expected = trainer.thresholds[x["step"] - 1][n].mean().item()
            assert x[f"threshold/layer_{n}"] == pytest.approx(expected, abs=1e-6)
        assert x.get("kv_usage_target") == SCHEDULE.target_at(x["step"] - 1)
    assert not trainer.model.model._forward_pre_hooks, "the meter has left"


def test_each_layer_follows_a_schedule_of_its_own(trainer_of):
    schedule = UsageSchedule(((0, [0.0, 1.0]), (8, [0.5, 0.5])))
    trainer = trainer_of(schedule)
    trainer.train()
    assert trainer.targets[4] == [0.25, 0.75]
    assert trainer.thresholds[4][0].min() > trainer.thresholds[4][1].max()
    assert [x["kv_usage_target"] for x in logs_of(trainer)] == [0.5] * 6, "the mean of layers"


def test_a_resumed_training_is_the_unbroken_one(trainer_of, tmp_path):
    unbroken = trainer_of(eval_strategy="no")
    unbroken.train()
    first = trainer_of(eval_strategy="no", save_strategy="steps", save_steps=6, callbacks=[StopAt(6)])
    first.train()
    resumed = trainer_of(eval_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert sorted(resumed.targets) == list(range(6, STEPS))
    for step in range(STEPS):
        part = first if step < 6 else resumed
        assert part.targets[step] == unbroken.targets[step]
        assert torch.equal(part.thresholds[step], unbroken.thresholds[step])
    names = {"loss", "step", "grad_norm", "kv_usage", "threshold/layer_0", "threshold/layer_1"}
    of = [[{name: x[name] for name in names} for x in logs_of(trainer)] for trainer in (resumed, unbroken)]
    assert of[0] == of[1]
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (SCHEDULE, {"threshold": 0.5}, "`threshold` of the configuration must be None, .* got 0.5"),
        (UsageSchedule(((0, [0.5] * 3),)), {}, r"one entry per hybrid layer \(2\), got 3"),
        (UsageSchedule(((0, [0.5] * 2),)), {"threshold_scope": "model"}, "`target_kv_usage`.*scope"),
        (UsageSchedule(((0, 1.0), (13, 0.5))), {}, "`points` must end within the 12 steps of the training"),
        (UsageSchedule(((0, 1.0),), 13), {}, "`freeze_steps` must be at most the 12 steps of the training"),
        (SCHEDULE, {"router": "recency"}, "`router` of the configuration must be another than 'recency'"),
        (SCHEDULE, {"layer_types": ["full_attention"] * 2}, "`model` has no hybrid layer"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_the_first_step(trainer_of, schedule, settings, message):
    trainer = trainer_of(schedule, settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not trainer.targets


@pytest.mark.slow
def test_a_training_that_broke_off_within_a_step_leaves_no_meter_to_the_next(trainer_of):
    def meters_on(module):
        return [hook for hook in module._forward_hooks.values() if "UsageMeter" in hook.__qualname__]

    class BreakOff(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = trainer_of(callbacks=[breaking := BreakOff()])
    mixer = trainer.model.model.layers[0].mixer
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(meters_on(mixer)) == 1
    trainer.remove_callback(breaking)
    trainer.train()
    assert not meters_on(mixer)


def test_thresholds_that_do_not_learn_are_refused(trainer_of, tiny_config):
    model = HAMForCausalLM(tiny_config())
    for layer in model.model.layers:
        layer.mixer.threshold.requires_grad_(False)
    trainer = trainer_of(model=model)
    with pytest.raises(ValueError, match="`model` has no threshold that learns"):
        trainer.train()
    assert not trainer.targets
