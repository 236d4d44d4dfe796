# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Training keeps the fraction it is asked for, with any optimizer and engine, and says truly what it keeps."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from ham_hf import HAMForCausalLM
from ham_hf.threshold_control_ham import usage_errors
from ham_hf.training.control import (
    UsageMeter,
    UsageSchedule,
    clipped_parameters,
    parameter_groups,
)

NAN = float("nan")


def batch(rows=8, length=48):
    """Tokens of which most follow from the one before, so that there is something to learn, and scores move."""
    columns = [torch.randint(1, 97, (rows, 1))]
    for _ in range(length - 1):
        follows = (columns[-1] * 7 + 3) % 96 + 1
        columns.append(torch.where(torch.rand(rows, 1) < 0.6, follows, torch.randint(1, 97, (rows, 1))))
    return torch.cat(columns, 1)


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_a_schedule_runs_in_straight_lines_between_its_points():
    schedule = UsageSchedule(((10, 1.0), (20, 0.5), (40, 0.25)), freeze_steps=5)
    found = {step: schedule.target_at(step) for step in (0, 4, 5, 10, 15, 20, 30, 40, 1000)}
    assert found == {0: None, 4: None, 5: 1.0, 10: 1.0, 15: 0.75, 20: 0.5, 30: 0.375, 40: 0.25, 1000: 0.25}
    by_layer = UsageSchedule(((0, [1.0, 0.5]), (10, [0.5, 0.75])))
    assert by_layer.target_at(5) == [0.75, 0.625]
    assert UsageSchedule([[0, 1], [10, 0.5]]).target_at(5) == 0.75, "as a YAML file gives it"


@pytest.mark.parametrize(
    ("points", "freeze_steps", "error", "message"),
    [
        ((), 0, ValueError, "`points` must hold at least one"),
        (0.5, 0, TypeError, "`points` must be pairs"),
        (((0, 0.5, 1),), 0, TypeError, "`points` must be pairs"),
        (((0, 1.1),), 0, ValueError, "`target_kv_usage` must be between 0 and 1, got 1.1"),
        (((0, NAN),), 0, ValueError, "`target_kv_usage` must be between 0 and 1"),
        (((0, True),), 0, TypeError, "`target_kv_usage` must be None, a number"),
        (((0, "1"),), 0, TypeError, "`target_kv_usage` must be None, a number"),
        (((0, None),), 0, TypeError, "`points` must have target usages"),
        (((0, [0.5, 2]),), 0, ValueError, "`target_kv_usage` must be between 0 and 1"),
        (((0, 1.0), (0, 0.5)), 0, ValueError, r"rising steps, got \[0, 0\]"),
        (((5, 1.0), (0, 0.5)), 0, ValueError, r"rising steps, got \[5, 0\]"),
        (((-1, 1.0),), 0, ValueError, "`points` must count steps from 0, got -1"),
        (((0.5, 1.0),), 0, TypeError, "`points` must count steps in whole numbers, got 0.5"),
        (((0, 1.0), (5, [0.5, 0.5])), 0, ValueError, "targets of one form"),
        (((0, [0.5]), (5, [0.5, 0.5])), 0, ValueError, "targets of one form"),
        (((0, 1.0),), -1, ValueError, "`freeze_steps` must count steps from 0, got -1"),
        (((0, 1.0),), True, TypeError, "`freeze_steps` must count steps in whole numbers"),
    ],
)
def test_what_is_no_schedule_is_refused(points, freeze_steps, error, message):
    with pytest.raises(error, match=message):
        UsageSchedule(points, freeze_steps)


def test_a_schedule_that_a_training_does_not_come_to_is_refused():
    UsageSchedule(((0, 1.0), (100, 0.5)), freeze_steps=100).check(100)
    with pytest.raises(ValueError, match="`points` must end within the 99 steps of the training, got one at step 100"):
        UsageSchedule(((0, 1.0), (100, 0.5))).check(99)
    with pytest.raises(ValueError, match="`freeze_steps` must be at most the 99 steps of the training, got 100"):
        UsageSchedule(((0, 1.0),), freeze_steps=100).check(99)
    with pytest.raises(dataclasses.FrozenInstanceError):
        UsageSchedule(((0, 1.0),)).freeze_steps = 3


# --- parameters ------------------------------------------------------------------------------------------------------


def settings(model, groups):
    """The group of each parameter, by name."""
    of = {id(p): {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


def test_every_parameter_has_the_rate_and_the_decay_that_it_needs(tiny_config):
    model = HAMForCausalLM(tiny_config(router="learned_error", attention_bias=True, tie_word_embeddings=True))
    groups = parameter_groups(model, 1e-3, 0.1, threshold_learning_rate=0.5, router_learning_rate=2e-3)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())), "ties count once"
    for name, found in settings(model, groups).items():
        if name.endswith(".threshold"):
            assert (found["lr"], found["weight_decay"]) == (0.5, 0.0)
            continue
        assert found["lr"] == (2e-3 if ".router." in name else 1e-3), name
        matrix = name.endswith(("proj.weight", "conv.weight", "embed_tokens.weight"))
        assert found["weight_decay"] == (0.1 if matrix else 0.0), name
    assert {id(p) for p in groups[-1]["params"]} == {id(layer.mixer.threshold) for layer in model.model.layers}
    clipped = {id(p) for p in clipped_parameters(model)}
    assert clipped == {id(p) for name, p in model.named_parameters() if not name.endswith("threshold")}


def test_what_does_not_learn_is_in_no_group(tiny_config):
    model = HAMForCausalLM(tiny_config())
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers:
        layer.mixer.threshold.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.1)
    assert all("eps" not in group for group in groups), "there is no threshold to move"
    assert sum(len(group["params"]) for group in groups) == len(clipped_parameters(model))
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert not frozen & {id(p) for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "weight_decay", "threshold_learning_rate", "router_learning_rate", "added_learning_rate"],
)
@pytest.mark.parametrize("rate", [-0.1, NAN, float("inf"), "0.1", True])
def test_a_rate_that_is_none_is_refused(name, rate, tiny_config):
    arguments = {"learning_rate": 1e-3, "weight_decay": 0.1} | {name: rate}
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0"):
        parameter_groups(HAMForCausalLM(tiny_config()), **arguments)


# --- the meter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_meter_reads_what_the_model_keeps(training, tiny_config):
    model = HAMForCausalLM(tiny_config(num_hidden_layers=3, layer_types=["hybrid", "full_attention", "hybrid"]))
    model.train(training)
    ids, mask = batch(), torch.ones(8, 48, dtype=torch.long)
    mask[0, :20] = 0
    with UsageMeter(model, bins=10) as meter:
        outputs = model(ids, attention_mask=mask, output_routing_scores=True)
        model(ids[:2])
    model(ids)  # after the measurement
    figures = meter.read()
    scores = [
        torch.cat([x[mask.bool()], y.flatten(0, 1)])
        for x, y in zip(outputs.routing_scores, model(ids[:2], output_routing_scores=True).routing_scores, strict=True)
    ]
    assert figures["tokens"] == len(scores[0]) == 8 * 48 - 20 + 2 * 48
    for n, layer_scores in enumerate(scores):
        threshold = model.model.layers[2 * n].mixer.threshold
        assert torch.equal(figures["thresholds"][n], threshold)
        assert torch.allclose(figures["usage"][n], (layer_scores >= threshold).float().mean(0))
        for head in range(2):
            counts = torch.histc(layer_scores[:, head], 10, 0, 1).long()
            assert (counts - figures["histogram"][n, head]).abs().sum() <= 2, "but for rounding at an edge"
    with pytest.raises(RuntimeError, match="No token was seen"):
        meter.read()


@pytest.mark.parametrize("threshold", [0.0, [0.45, 2.0], torch.tensor([0.0, 2.0] * 4)], ids=["all", "layers", "rows"])
def test_the_meter_knows_the_thresholds_of_a_call(threshold, tiny_config):
    model = HAMForCausalLM(tiny_config()).eval()
    with UsageMeter(model) as meter:
        cache = model(batch(), threshold=threshold).cache
    assert torch.allclose(meter.read()["usage"], cache.kv_usage().mean(1))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_not_measured_again(reentrant, tiny_config):
    model = HAMForCausalLM(tiny_config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = batch()
    calls = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    with UsageMeter(model) as meter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 2
    assert meter.read()["tokens"] == ids.numel()


def test_a_meter_is_entered_once(tiny_config):
    meter = UsageMeter(HAMForCausalLM(tiny_config()))
    with meter, pytest.raises(RuntimeError, match="measures already"):
        meter.__enter__()
    with meter:
        pass


def test_the_meter_leaves_nothing_on_the_model(tiny_config):
    model = HAMForCausalLM(tiny_config())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(TypeError), UsageMeter(model):
        model(batch(), no_such=1)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="no hybrid layer"):
        UsageMeter(HAMForCausalLM(tiny_config(layer_types=["full_attention"] * 2)))
    with pytest.raises(ValueError, match="`model` must hold one HAM, got Linear with 0"):
        UsageMeter(torch.nn.Linear(2, 2))


# --- the loop --------------------------------------------------------------------------------------------------------


def optimizers(kind, model):
    groups = parameter_groups(model, 3e-3, 0.01)
    if kind == "sgd":
        if model.config.router == "learned":
            # The auxiliary loss draws scores together, and a fast threshold steps past them.
            groups = parameter_groups(model, 3e-3, 0.01, threshold_learning_rate=0.05)
        return [torch.optim.SGD(groups, lr=3e-3, momentum=0.9)]
    if kind == "adamw":
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    matrices = {id(p): p for name, p in model.named_parameters() if p.ndim == 2 and "proj.weight" in name}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in matrices]
    muon = torch.optim.Muon(list(matrices.values()), lr=3e-3, weight_decay=0.01)
    return [muon, torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))]


def thresholds_of(model):
    return torch.stack([layer.mixer.threshold.detach().clone() for layer in model.model.layers])


def train(model, schedule, steps, kind="adamw"):
    """A plain loop of PyTorch; the usage and the thresholds `[steps, L, Hk]` after each step."""
    optimizer = optimizers(kind, model)
    usage, thresholds = [], []
    model.train()
    with UsageMeter(model) as meter:
        for step in range(steps):
            model.config.target_kv_usage = schedule.target_at(step)
            ids = batch()
            model(ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(clipped_parameters(model), 1.0)
            for x in optimizer:
                x.step()
                x.zero_grad()
            usage.append(meter.read()["usage"])
            thresholds.append(thresholds_of(model))
    return torch.stack(usage), torch.stack(thresholds)


@pytest.mark.parametrize(
    ("kind", "router", "scope", "target"),
    [
        ("sgd", "cosine", "head", 0.25),
        pytest.param("sgd", "learned", "head", 0.5, marks=pytest.mark.slow),
        pytest.param("adamw", "cosine", "model", 0.5, marks=pytest.mark.slow),
        pytest.param("adamw", "learned", "layer", [0.25, 0.75], marks=pytest.mark.slow),
        pytest.param("muon", "cosine", "head", [0.75, 0.25], marks=pytest.mark.slow),
    ],
)
def test_usage_meets_its_target_and_stays_there(kind, router, scope, target, tiny_config):
    # The targets of these are those of every head, which one layer shows as well as two.
    layers = 1 if kind == "sgd" else 2
    # Learned scores move while they learn, and a slow threshold is behind them until they have settled.
    settled = 120 if (kind, router) == ("sgd", "learned") else 60
    model = HAMForCausalLM(tiny_config(num_hidden_layers=layers, router=router, threshold_scope=scope))
    usage, _ = train(model, UsageSchedule(((0, target),)), settled + 60, kind)
    errors = torch.stack([usage_errors(x, target, scope) for x in usage[settled:]])
    for window in errors.split(30):
        assert window.mean(0).abs().max() < 0.02, window.mean(0)
    assert errors.abs().max() < 0.2, "of single batches"


@pytest.mark.parametrize("scope", ["head", *(pytest.param(x, marks=pytest.mark.slow) for x in ("layer", "model"))])
def test_a_quota_is_that_of_its_scope(scope, tiny_config):
    """Heads and layers score apart, and thresholds begin together: usage stays apart within a scope, not beyond it."""
    model = HAMForCausalLM(tiny_config(router="learned", threshold_scope=scope))
    routers = [layer.mixer.router for layer in model.model.layers]
    for router, bias in zip(routers, ([2.0, 0.5], [-0.5, -2.0]), strict=True):
        router.down_proj.bias.data.copy_(torch.tensor(bias))
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mixer.threshold.requires_grad_()
    usage, _ = train(model, UsageSchedule(((0, 0.5),)), 120)
    by_head = usage[80:].mean(0)
    by_layer = by_head.mean(1)
    assert abs(by_head.mean() - 0.5) < 0.02
    assert ((by_head - 0.5).abs().max() < 0.03) == (scope == "head")
    assert (by_layer.diff().abs().max() < 0.03) == (scope != "model")
    if scope == "layer":
        assert (by_head[:, 0] - by_head[:, 1] > 0.2).all()
    if scope == "model":
        assert by_layer[0] - by_layer[1] > 0.2


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_thresholds_are_held_while_frozen_and_move_afterwards(kind, tiny_config):
    model = HAMForCausalLM(tiny_config(target_kv_usage=0.9))
    before, weights = thresholds_of(model), model.model.layers[0].mixer.q_proj.weight.detach().clone()
    _, thresholds = train(model, UsageSchedule(((0, 0.9),), freeze_steps=4), 7, kind)
    assert all(torch.equal(x, before) for x in thresholds[:4])
    assert not torch.equal(model.model.layers[0].mixer.q_proj.weight, weights), "everything else learns"
    moves = (thresholds[4:] - thresholds[3:-1]).abs()
    assert moves[0].min() > 1e-3, "the update that follows 4 others is the first of the thresholds"


@pytest.mark.parametrize("router", ["cosine", pytest.param("learned_error", marks=pytest.mark.slow)])
def test_usage_follows_a_falling_target(router, tiny_config):
    schedule = UsageSchedule(((0, 1.0), (20, 1.0), (100, 0.5)))
    layers = 1 if router == "cosine" else 2
    model = HAMForCausalLM(tiny_config(num_hidden_layers=layers, router=router))
    usage, thresholds = train(model, schedule, 140)
    targets = torch.tensor([schedule.target_at(step) for step in range(140)])
    errors = usage - targets[:, None, None]
    if router == "cosine":  # learned scores move, too, and are followed later
        assert errors[105:120].mean(0).abs().max() < 0.02, "1 / 0.2 steps after the target has come to its end"
    assert errors[120:].mean(0).abs().max() < 0.02
    assert errors[20:].abs().max() < 0.2, "of single batches, on the way too"
    assert thresholds.min() > -0.25
    assert thresholds.max() < 1.05


def test_a_model_that_kept_nothing_comes_to_its_target(tiny_config):
    """Thresholds of 1.01, above all scores, are those of a converted Gated DeltaNet: 50 steps bring them down."""
    model = HAMForCausalLM(tiny_config())
    for layer in model.model.layers:
        layer.mixer.threshold.data.fill_(1.01)
    usage, thresholds = train(model, UsageSchedule(((0, 0.5),)), 80)
    assert usage[0].max() == 0
    assert thresholds.diff(dim=0)[0].max() < -0.009, "towards the scores from the first step on"
    for window in usage[50:].split(15):
        assert (window.mean(0) - 0.5).abs().max() < 0.03, window.mean(0)


@pytest.mark.parametrize("scope", ["head", pytest.param("model", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_an_extreme_target_is_met_without_winding_up(target, scope, tiny_config):
    model = HAMForCausalLM(tiny_config(num_hidden_layers=1 if scope == "head" else 2, threshold_scope=scope))
    usage, thresholds = train(model, UsageSchedule(((0, target),)), 100)
    assert (usage[-30:].mean() - target).abs() < 0.02
    assert thresholds.min() > -0.2, "a step of at most 0.2 below 0"
    assert thresholds.max() < 1.2, "a step of at most 0.2 above 1"


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_accumulated_pieces_move_thresholds_as_the_whole_batch_does(scope, tiny_config):
    """Of one process with accelerate, whose `backward` divides by the pieces, which Trainer multiplies by as well."""
    config = tiny_config(threshold_scope=scope, target_kv_usage=0.25)
    whole, parts = (HAMForCausalLM(config) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    before = thresholds_of(whole)
    optimizer = torch.optim.AdamW(parameter_groups(whole, 1e-4, 0.0), eps=1e-3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, accumulated = accelerator.prepare(parts, torch.optim.AdamW(parameter_groups(parts, 1e-4, 0.0), eps=1e-3))
    for _ in range(5):
        ids = batch()
        whole(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for piece in ids.chunk(4):
            with accelerator.accumulate(model):
                loss = model(piece, labels=piece, use_cache=False, num_items_in_batch=ids[:, 1:].numel()).loss
                accelerator.backward(loss * 4)
                accumulated.step()
                accumulated.zero_grad()
    assert (thresholds_of(whole) - before).abs().min() > 1e-2
    # A token at a threshold that is rounded to its other side would make 2e-4.
    assert (thresholds_of(parts) - thresholds_of(whole)).abs().max() < 1e-5
