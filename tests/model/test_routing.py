# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Pins what routing scores and thresholds mean, what is refused, and that the control loop meets its target."""

import itertools
import math
from inspect import signature

import pytest
import torch

from ham_hf import HAMForCausalLM, HAMModel, mixer_ham
from ham_hf.configuration_ham import ERROR_ROUTERS, LEARNED_ROUTERS, ROUTERS
from ham_hf.routing_ham import (
    HAMRouter,
    check_kv_budget,
    check_kv_usage,
    check_threshold,
    cosine_score,
    error_score,
    l2_score,
    residual_score,
    usage_threshold,
)
from ham_hf.threshold_control_ham import logit_unit, threshold_gradients, usage_errors
from ham_hf.training.control import parameter_groups


def norm(x):
    return math.sqrt(sum(a * a for a in x))


def scalar_cosine(v, p, beta):
    if norm(v) * norm(p) == 0:
        return 0.5
    return (1 - sum(a * b for a, b in zip(v, p, strict=True)) / (norm(v) * norm(p))) / 2


def scalar_l2(v, p, beta):
    difference = norm([a - b for a, b in zip(v, p, strict=True)])
    return difference**2 / (norm(v) + norm(p)) ** 2 if norm(v) + norm(p) else 0.0


def scalar_residual(v, p, beta):
    r = beta * norm([a - b for a, b in zip(v, p, strict=True)]) / norm(v)
    return r / (1 + r)


FORMULAS = {
    "cosine": (lambda v, p, beta: cosine_score(v, p), scalar_cosine),
    "l2": (lambda v, p, beta: l2_score(v, p), scalar_l2),
    "residual": (residual_score, scalar_residual),
}

# --------------------------------------------------------------------------- scores


@pytest.mark.parametrize("router", ERROR_ROUTERS)
def test_error_scores_equal_their_scalar_formulas(router):
    function, formula = FORMULAS[router]
    v, p, beta = torch.randn(60, 5), torch.randn(60, 5), torch.rand(60)
    v, p = v * 10 ** torch.linspace(-2, 2, 60)[:, None], p * 10 ** torch.linspace(2, -2, 60)[:, None]
    p[:10] = v[:10] * torch.linspace(-2, 2, 10)[:, None]  # parallel and opposite
    p[10] = 0
    if router != "residual":
        v[11] = 0
    expected = [formula(*x) for x in zip(v.tolist(), p.tolist(), beta.tolist(), strict=True)]
    actual = function(v, p, beta)
    assert (actual - torch.tensor(expected)).abs().max() < 2e-6
    assert max(expected) - min(expected) > 0.5, "the cases must spread over the range"


def test_scores_have_their_meaning_at_the_extremes():
    v, zero, one = torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor(1.0)
    assert cosine_score(v, 2 * v).item() == pytest.approx(0, abs=1e-6)
    assert cosine_score(v, -v).item() == pytest.approx(1, abs=1e-6)
    for a, b in [(v, zero), (zero, v), (zero, zero)]:
        assert cosine_score(a, b).item() == 0.5
    assert l2_score(v, v).item() == 0
    assert l2_score(v, -v).item() == pytest.approx(1, abs=1e-6)
    assert l2_score(v, zero).item() == pytest.approx(1, abs=1e-6)
    assert l2_score(zero, zero).item() == 0
    assert residual_score(v, v, one).item() == 0
    assert residual_score(v, zero, one).item() == pytest.approx(0.5, abs=1e-6)
    assert residual_score(v, -9 * v, one).item() == pytest.approx(10 / 11, abs=1e-6)
    assert residual_score(v, zero, 0 * one).item() == 0, "what is not written to the state is not a residual"


def router_inputs(batch=3, length=40, heads=2, hidden=32, value_dim=6, scale=1.0, dtype=torch.float32):
    return {
        "hidden_states": (scale * torch.randn(batch, length, hidden)).to(dtype).requires_grad_(),
        "v": (scale * torch.randn(batch, length, heads, value_dim)).to(dtype).requires_grad_(),
        "prediction": (scale * torch.randn(batch, length, heads, value_dim)).to(dtype).requires_grad_(),
        "beta": torch.rand(batch, length, heads).to(dtype).requires_grad_(),
        "positions": torch.arange(length).expand(batch, -1),
    }


def scored(module, hidden_states, v, prediction, beta, positions):
    errors = None if module.error is None else error_score(module.error, v, prediction, beta)
    return module(hidden_states, errors, positions)


def test_a_score_is_asked_for_by_its_name():
    with pytest.raises(ValueError, match="`score` must be one of 'cosine', 'l2', 'residual', got 'cosin'"):
        error_score("cosin", *torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_scores_are_float32_in_the_unit_interval(router, dtype, tiny_config):
    module = HAMRouter(tiny_config(router=router), layer_idx=1).to(dtype)
    cases = {scale: router_inputs(scale=scale, dtype=dtype) for scale in (0.0, 1e-6, 1.0, 1e6)}
    cases["parallel"] = router_inputs(dtype=dtype)  # rounding may carry a cosine past 1
    cases["parallel"]["prediction"] = cases["parallel"]["v"] * torch.tensor([-3.0, 1.0])[:, None].to(dtype)
    for scale, inputs in cases.items():
        scores = scored(module, **inputs)
        assert scores.shape == (3, 40, 2)
        assert scores.dtype == torch.float32
        assert ((scores >= 0) & (scores <= 1)).all()
        assert scale != 1.0 or router == "recency" or scores.std() > 0.01


@pytest.mark.parametrize("router", ROUTERS)
def test_only_learned_routers_have_gradients(router, tiny_config):
    module, inputs = HAMRouter(tiny_config(router=router), layer_idx=0), router_inputs()
    scores = scored(module, **inputs)
    assert scores.requires_grad == (router in LEARNED_ROUTERS)
    assert bool(list(module.parameters())) == (router in LEARNED_ROUTERS)
    if not scores.requires_grad:
        return
    scores.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert inputs["hidden_states"].grad.abs().max() > 0
    assert inputs["v"].grad is None, "no gradient reaches the memory through a score"
    assert inputs["prediction"].grad is None
    assert inputs["beta"].grad is None


def test_learned_scores_equal_their_formulas(tiny_config):
    inputs = router_inputs()
    module = HAMRouter(tiny_config(router="learned_error"), layer_idx=0)
    module.error_weight.data = torch.tensor([2.0, -3.0])
    hidden = torch.nn.functional.silu(inputs["hidden_states"] @ module.up_proj.weight.T + module.up_proj.bias)
    logits = hidden @ module.down_proj.weight.T + module.down_proj.bias
    errors = cosine_score(inputs["v"], inputs["prediction"])
    expected = torch.sigmoid(logits + torch.tensor([2.0, -3.0]) * errors)
    assert torch.allclose(scored(module, **inputs), expected, atol=1e-6)
    module.kind, module.error = "learned", None
    assert torch.allclose(scored(module, **inputs), logits.sigmoid(), atol=1e-6)


def test_a_fresh_learned_error_router_ranks_tokens_as_the_error_does(tiny_config):
    """The token has no say at the start; trained, the MLP corrects what the error says."""
    router = HAMForCausalLM(tiny_config(router="learned_error")).model.layers[0].mixer.router
    inputs = router_inputs()
    errors = cosine_score(inputs["v"], inputs["prediction"]).detach()
    scores = scored(router, **inputs).detach()
    for head in range(2):
        by_error = errors[..., head].flatten().argsort()
        assert (scores[..., head].flatten()[by_error].diff() >= 0).all()
    assert torch.equal(scores >= 0.5, errors >= 0.5), "also by the first threshold"
    assert 0.15 < scores.std() < 0.35
    other_tokens = inputs | {"hidden_states": torch.randn_like(inputs["hidden_states"])}
    assert torch.equal(scored(router, **other_tokens), scores)
    router.down_proj.weight.data.normal_()
    assert not torch.equal(scored(router, **other_tokens), scored(router, **inputs))


def test_a_learned_error_router_has_the_parameters_that_it_always_had(tiny_config):
    """Checkpoints that began with an error of weight 1 beside random logits hold these; the formula is theirs, too."""
    router = HAMForCausalLM(tiny_config(router="learned_error")).model.layers[0].mixer.router
    assert {name: list(x.shape) for name, x in router.state_dict().items()} == {
        "up_proj.weight": [8, 32],
        "up_proj.bias": [8],
        "down_proj.weight": [2, 8],
        "down_proj.bias": [2],
        "error_weight": [2],
    }


@pytest.mark.parametrize("router", LEARNED_ROUTERS)
def test_a_learned_router_learns_through_the_values_that_attention_reads(router, tiny_config):
    model = HAMModel(tiny_config(router=router, num_hidden_layers=1)).train()
    mixer = model.layers[0].mixer
    for threshold in (0.0, 1.1):  # also when nothing is kept: a token reads its own scaled value
        model.zero_grad()
        output = model(torch.randint(1, 97, (2, 20)), threshold=threshold, use_cache=False)
        output.last_hidden_state.square().sum().backward()
        assert mixer.router.down_proj.weight.grad.abs().max() > 0
        assert mixer.threshold.grad is None


@pytest.mark.parametrize("router", LEARNED_ROUTERS)
def test_a_score_has_a_gradient_where_attention_is_sharp(router, tiny_config):
    """A norm of what is read cancels the score of a token that is read alone, and with it the gradient."""
    gradients = {}
    for norm in (None, True):
        torch.manual_seed(0)
        # Values so large that the norm's epsilon does not count.
        settings = {"kv_output_norm": norm, "num_hidden_layers": 1, "initializer_range": 0.5}
        model = HAMModel(tiny_config(router=router, **settings)).train()
        # Nothing is kept: every token reads itself.
        out = model(torch.randint(1, 97, (2, 20)), threshold=1.1, use_cache=False).last_hidden_state
        (out * torch.randn_like(out)).sum().backward()
        gradients[norm] = model.layers[0].mixer.router.down_proj.bias.grad.abs().max()
    assert gradients[None] > 100 * gradients[True]


@pytest.mark.parametrize("layer_type", ["hybrid", "linear_attention"])
@pytest.mark.parametrize("router", ROUTERS)
def test_what_the_rnn_predicts_is_computed_where_it_is_read(router, layer_type, tiny_config, monkeypatch):
    read = layer_type == "hybrid" and router in (*ERROR_ROUTERS, "learned_error")
    model = HAMModel(tiny_config(router=router, layer_types=[layer_type] * 2)).eval()
    plain, found = mixer_ham.gated_delta_rule_with_prediction, []
    monkeypatch.setattr(
        mixer_ham,
        "gated_delta_rule_with_prediction",
        lambda *args, **options: found.append(plain(*args, **options)) or found[-1],
    )
    ids = torch.randint(1, 97, (2, 40))
    cache = model(ids[:, :39]).cache
    out = model(ids[:, 39:], cache=cache).last_hidden_state
    assert [prediction is not None for _, prediction, _ in found] == [read] * 4

    def predicting(*args, predict, **options):
        o, prediction, state = plain(*args, **options)
        return o, prediction if predict else None, state

    monkeypatch.setattr(mixer_ham, "gated_delta_rule_with_prediction", predicting)
    cache = model(ids[:, :39]).cache
    assert torch.equal(model(ids[:, 39:], cache=cache).last_hidden_state, out)


@pytest.mark.parametrize("router", [*ERROR_ROUTERS, "learned_error"])
def test_a_router_that_reads_errors_is_given_them(router, tiny_config):
    with pytest.raises(ValueError, match=f"`errors` must be a tensor with the router '{router}', got None"):
        HAMRouter(tiny_config(router=router), layer_idx=0)(torch.zeros(1, 3, 32), None, torch.arange(3)[None])


# --------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("threshold", "shape"),
    [
        (0.25, (1, 1, 1)),
        (1, (1, 1, 1)),
        (float("inf"), (1, 1, 1)),
        ([0.1, 0.2, 3], (3, 1, 1)),
        ((0.1, 0.2, 0.3), (3, 1, 1)),
        (torch.tensor(0.5), (1, 1, 1)),
        (torch.tensor([0.1, 0.9], dtype=torch.float64), (1, 2, 1)),
        (torch.rand(3, 2, 4), (3, 2, 4)),
        (torch.rand(1, 2, 1), (1, 2, 1)),
        (torch.rand(3, 1, 4).bfloat16(), (3, 1, 4)),
        (torch.nn.Parameter(torch.rand(3, 1, 1)), (3, 1, 1)),
    ],
    # Test processes must agree on the names, so these hold no random number.
    ids=lambda x: f"tensor{list(x.shape)}" if isinstance(x, torch.Tensor) else str(x),
)
def test_every_form_of_a_threshold_becomes_one(threshold, shape):
    tensor = check_threshold(threshold, num_layers=3, batch_size=2, num_heads=4)
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32
    assert not tensor.requires_grad
    assert torch.equal(tensor.flatten(), torch.as_tensor(threshold).detach().float().flatten())


def test_no_threshold_stays_none():
    assert check_threshold(None, 3, 2, 4) is None


@pytest.mark.parametrize(
    ("threshold", "error"),
    [
        (float("nan"), ValueError),
        ([0.1, float("nan"), 0.2], ValueError),
        (torch.tensor([0.1, torch.nan]), ValueError),
        ([0.1, 0.2], ValueError),
        ([], ValueError),
        ((0.1,) * 4, ValueError),
        (torch.ones(3), ValueError),  # one per layer is a list; a vector is one per row
        (torch.ones(3, 2), ValueError),
        (torch.ones(2, 2, 4), ValueError),
        (torch.ones(3, 3, 4), ValueError),
        (torch.ones(3, 2, 3), ValueError),
        (torch.ones(1, 3, 2, 4), ValueError),
        (torch.ones(0), ValueError),
        (True, TypeError),
        ([0.1, True, 0.2], TypeError),
        ("0.5", TypeError),
        (["0.1", "0.2", "0.3"], TypeError),
        ([[0.1, 0.2, 0.3]], TypeError),
        (torch.tensor([0, 1]), TypeError),
        (torch.tensor([True, False]), TypeError),
        ({"a": 1.0}, TypeError),
        (0.5j, TypeError),
    ],
    ids=lambda x: str(x)[:30].replace("\n", ""),
)
def test_a_threshold_that_does_not_fit_is_refused_with_what_is_expected(threshold, error, tiny_config):
    with pytest.raises(
        error, match=r"`threshold`.*expected a number.*list of 3.*tensor \[2\].*\[3 or 1, 2 or 1, 4 or 1\]"
    ):
        check_threshold(threshold, num_layers=3, batch_size=2, num_heads=4)
    model = HAMForCausalLM(tiny_config(num_hidden_layers=3, num_key_value_heads=4)).eval()
    with pytest.raises(error, match="`threshold`"):
        model(torch.ones(2, 4, dtype=torch.long), threshold=threshold)


@pytest.mark.parametrize(
    ("check", "good", "types", "values"),
    [
        (check_kv_usage, [None, 0, 0.5, 1], [True, "0.5", [0.5], torch.tensor([0.5, 0.5])], [-0.1, 1.1, float("nan")]),
        (check_kv_budget, [None, 1, 4096], [True, 1.0, "4", torch.tensor([4, 4])], [0, -1]),
    ],
    ids=["kv_usage", "kv_budget"],
)
def test_usage_and_budget_are_checked(check, good, types, values):
    assert [check(x) for x in good] == good
    for bad, error in [(x, TypeError) for x in types] + [(x, ValueError) for x in values]:
        with pytest.raises(error, match=check.__name__.removeprefix("check_")):
            check(bad)


@pytest.mark.parametrize("router", ROUTERS)
def test_thresholds_beyond_the_scores_keep_all_or_nothing(router, tiny_config):
    model = HAMModel(tiny_config(router=router)).eval()
    ids = torch.randint(1, 97, (2, 20))
    for threshold, expected in [(0.0, 1.0), (-3, 1.0), (float("-inf"), 1.0), (1.001, 0.0), (float("inf"), 0.0)]:
        usage = model(ids, threshold=threshold).cache.kv_usage()
        assert torch.equal(usage, torch.full((2, 2, 2), expected)), threshold


def test_a_token_is_kept_iff_its_score_reaches_the_threshold(tiny_config):
    model = HAMModel(tiny_config(num_hidden_layers=3, layer_types=["hybrid", "linear_attention", "hybrid"])).eval()
    ids = torch.randint(1, 97, (2, 40))
    per_head = torch.tensor([[[0.47, 0.5], [0.49, 0.52]], [[0.3, 0.51], [0.5, 0.45]]])
    forms = {
        "number": (0.5, torch.full((2, 2, 2), 0.5)),
        "list": ([0.48, 0.51], torch.tensor([0.48, 0.51])[:, None, None].expand(2, 2, 2)),
        "rows": (torch.tensor([0.47, 0.52]), torch.tensor([0.47, 0.52])[None, :, None].expand(2, 2, 2)),
        "all": (per_head, per_head),
    }
    for name, (threshold, limits) in forms.items():
        output = model(ids, threshold=threshold, output_routing_scores=True)
        assert len(output.routing_scores) == 2
        for n, layer in enumerate([0, 2]):
            positions = output.cache.kept_positions(layer)
            for row, head in itertools.product(range(2), range(2)):
                kept = (output.routing_scores[n][row, :, head] >= limits[n, row, head]).nonzero()[:, 0]
                assert positions[row][head].tolist() == kept.tolist(), (name, layer, row, head)
        kept = output.cache.kept_tokens()[[0, 2]]
        assert 0 < kept.sum() < 2 * 2 * 2 * 40, "the thresholds must divide the tokens"


def test_first_scores_of_a_sequence_are_exactly_half(tiny_config):
    scores = HAMModel(tiny_config())(torch.randint(1, 97, (3, 9)), output_routing_scores=True).routing_scores
    assert all(torch.equal(x[:, 0], torch.full((3, 2), 0.5)) for x in scores)


# --------------------------------------------------------------------------- usage and calibration


def test_usage_threshold_reads_known_quantiles():
    levels = torch.linspace(0, 1, 65)
    quantiles = torch.stack([levels, levels**2, 0.5 + levels / 4])
    for usage in (0.25, 0.5, 0.123, 0.9):
        t = usage_threshold(quantiles, usage)
        assert t[0].item() == pytest.approx(1 - usage, abs=1e-6)
        assert t[1].item() == pytest.approx((1 - usage) ** 2, abs=1e-4)  # interpolated
        assert t[2].item() == pytest.approx(0.5 + (1 - usage) / 4, abs=1e-6)
    assert (usage_threshold(quantiles, 0.0) > 1).all()
    assert (usage_threshold(quantiles, 1.0) <= 0).all()


def test_usage_threshold_falls_as_usage_grows_and_keeps_the_fraction():
    scores = torch.rand(3, 5000).square()
    quantiles = torch.quantile(scores, torch.linspace(0, 1, 65), dim=1).T
    previous = None
    for usage in torch.linspace(0, 1, 23).tolist():
        threshold = usage_threshold(quantiles, usage)
        kept = (scores >= threshold[:, None]).float().mean(1)
        assert (kept - usage).abs().max() < 0.01
        assert previous is None or (threshold < previous).all()
        previous = threshold


def test_usage_without_calibration_is_refused(tiny_config):
    with pytest.raises(ValueError, match="calibrate"):
        usage_threshold(torch.zeros(2, 65), 0.5)
    with pytest.raises(ValueError, match="calibrate"):
        HAMModel(tiny_config())(torch.ones(1, 3, dtype=torch.long), kv_usage=0.5)


# --------------------------------------------------------------------------- the control loop

USAGE = torch.tensor([[0.1, 0.5], [0.9, 0.3]])


@pytest.mark.parametrize(
    ("scope", "measured"),
    [
        ("head", USAGE),
        ("layer", torch.tensor([[0.3, 0.3], [0.6, 0.6]])),
        ("model", torch.full((2, 2), 0.45)),
    ],
)
def test_the_gradient_is_target_minus_usage(scope, measured):
    inside = torch.full((2, 2), 0.5)
    assert torch.allclose(threshold_gradients(inside, USAGE, 0.4, scope), 0.4 - measured, atol=1e-7)
    assert torch.allclose(usage_errors(USAGE, 0.4, scope), measured - 0.4, atol=1e-7)
    assert torch.equal(threshold_gradients(inside, USAGE, None, scope), torch.zeros(2, 2))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_each_layer_may_have_its_target(scope):
    inside = torch.full((2, 2), 0.5)
    both = threshold_gradients(inside, USAGE, [0.25, 0.75], scope)
    for layer, target in enumerate([0.25, 0.75]):
        assert torch.allclose(both[layer], threshold_gradients(inside, USAGE, target, scope)[layer])


def test_thresholds_beyond_all_scores_are_not_sent_further():
    """By the mean of a layer, one head's threshold could otherwise wind up without an end."""
    usage = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    thresholds = torch.tensor([[0.0, 0.5], [0.5, 1.01]])
    lower = threshold_gradients(thresholds, usage, [0.75, 0.25], "layer")
    assert torch.equal(lower, torch.tensor([[0.0, 0.25], [-0.25, 0.0]]))
    back = threshold_gradients(thresholds, usage, [0.25, 0.75], "layer")
    torch.testing.assert_close(back, torch.tensor([[-0.025, -0.25], [0.25, 0.025]]))


def test_steps_have_one_length_in_logits():
    thresholds = torch.tensor([[0.5, 0.9, 0.98, 0.0, 1.01]])
    torch.testing.assert_close(logit_unit(thresholds), torch.tensor([[1.0, 0.36, 0.1, 0.1, 0.1]]))
    gradients = threshold_gradients(thresholds, torch.full((1, 5), 0.5), 0.25, "head")
    torch.testing.assert_close(gradients[0, :3], -0.25 * torch.tensor([1.0, 0.36, 0.1]))


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (3.5, 0.5), (-3.5, 0.5)], ids=["spread", "high", "low"])
def test_usage_does_not_jump_where_scores_are_saturated(mean, deviation):
    """The loop at the rate of `parameter_groups`, on made-up scores; with equal steps it swings to 0 and back."""
    rate = signature(parameter_groups).parameters["threshold_learning_rate"].default
    threshold, usages = torch.full((1, 1), 0.5), []
    for _ in range(300):
        scores = (mean + deviation * torch.randn(1000)).sigmoid()
        usage = (scores >= threshold).float().mean().view(1, 1)
        threshold = threshold - rate * threshold_gradients(threshold, usage, 0.25, "head")
        usages.append(usage.item())
    late = torch.tensor(usages[150:])
    assert abs(late.mean() - 0.25) < 0.02
    assert (late - 0.25).abs().max() < 0.15


def test_control_adds_nothing_to_the_loss_and_touches_only_thresholds(tiny_config):
    model = HAMForCausalLM(tiny_config(target_kv_usage=0.25))
    ids = torch.randint(1, 97, (2, 30))
    losses, grads = [], []
    for training in (True, False):
        model.train(training).zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: x.grad for name, x in model.named_parameters() if "threshold" not in name})
        kept = model.eval()(ids).cache.kv_usage().mean(1)
        for layer, usage in zip(model.model.layers, kept, strict=True):
            grad = layer.mixer.threshold.grad
            assert training == (grad is not None)
            assert grad is None or torch.allclose(grad, 0.25 - usage, atol=1e-6)
    assert torch.equal(*losses)
    assert all(
        x is None if y is None else torch.equal(x, y)
        for x, y in zip(grads[0].values(), grads[1].values(), strict=True)
    )


def test_control_counts_real_tokens_only(tiny_config):
    model = HAMForCausalLM(tiny_config(target_kv_usage=0.0)).train()
    ids = torch.randint(1, 97, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    cache = model.eval()(ids, attention_mask=mask).cache
    for layer, kept in zip(model.model.layers, cache.kept_tokens(), strict=True):
        assert 0 < kept.sum() < 80
        assert torch.allclose(-layer.mixer.threshold.grad, kept.sum(0) / 40, atol=1e-6)


@pytest.mark.parametrize("labels", [True, False], ids=["language model", "loss of logits"])
def test_held_thresholds_have_a_gradient_of_zero(labels, tiny_config):
    """Zero rather than none: ranks wait for the gradient of every parameter."""
    model = HAMForCausalLM(tiny_config(target_kv_usage=None)).train()
    ids = torch.randint(1, 97, (2, 30))
    outputs = model(ids, labels=ids if labels else None)
    (outputs.loss if labels else outputs.logits.square().mean()).backward()
    for layer in model.model.layers:
        assert torch.equal(layer.mixer.threshold.grad, torch.zeros(2))
        assert layer.mixer.q_proj.weight.grad.any()


def test_both_ways_to_a_loss_have_the_same_target(tiny_config):
    model = HAMForCausalLM(tiny_config(target_kv_usage=[0.1, 0.9], threshold_scope="layer")).train()
    ids = torch.randint(1, 97, (2, 30))
    gradients = []
    for loss in (lambda: model(ids, labels=ids).loss, lambda: model(ids).logits.square().mean()):
        model.zero_grad()
        loss().backward()
        gradients.append(torch.stack([layer.mixer.threshold.grad for layer in model.model.layers]))
    assert (gradients[0][0] < -0.001).all()
    assert (gradients[0][1] > 0.001).all()
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize(
    ("router", "scope"),
    [
        ("cosine", "layer"),
        *(
            pytest.param(router, scope, marks=pytest.mark.slow)
            for router in ("cosine", "learned")
            for scope in ("head", "layer", "model")
            if (router, scope) != ("cosine", "layer")
        ),
    ],
)
def test_descent_drives_usage_to_the_target(router, scope, tiny_config):
    config = tiny_config(router=router, target_kv_usage=0.3, threshold_scope=scope)
    model = HAMForCausalLM(config).train()
    thresholds = [p for name, p in model.named_parameters() if name.endswith("mixer.threshold")]
    others = [p for name, p in model.named_parameters() if not name.endswith("mixer.threshold")]
    optimizer = torch.optim.SGD([{"params": thresholds, "lr": 0.2}, {"params": others, "lr": 0.05}])
    measured = []
    for step in range(80):
        ids = torch.randint(1, 97, (4, 32))
        optimizer.zero_grad()
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        if step >= 40:
            measured.append(outputs.cache.kv_usage().mean(1))
    usage = torch.stack(measured).mean(0)
    assert usage_errors(usage, 0.3, scope).abs().max() < 0.02, usage


def test_control_adds_up_to_one_batch_over_accumulation_steps(tiny_config):
    """With `num_items_in_batch` the loss of every micro-batch is a share of a sum, and so is the control."""
    model = HAMForCausalLM(tiny_config()).train()
    ids = torch.randint(1, 97, (4, 24))
    items = ids[:, 1:].numel()

    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            model(batch, labels=batch, num_items_in_batch=items, use_cache=False).loss.backward()
        return torch.stack([layer.mixer.threshold.grad for layer in model.model.layers])

    whole, pieces = gradient([ids]), gradient(ids.split(1))
    assert whole.abs().max() > 0.01
    assert torch.allclose(whole, pieces, atol=1e-6)


@pytest.mark.parametrize("usage", [0.0, 0.3, 1.0])
def test_a_usage_of_a_model_in_half_precision_is_a_threshold_in_float32(usage):
    """As scores are, and as the kernel of a decoding step takes it: `model.bfloat16()` rounds the quantiles, too."""
    assert usage_threshold(torch.linspace(0, 1, 65).bfloat16()[None], usage).dtype == torch.float32


def test_a_tiny_usage_is_still_a_usage():
    quantiles = torch.linspace(0, 1, 65)[None]
    assert usage_threshold(quantiles, 1e-17) == pytest.approx(1.0)


def test_learned_scores_in_half_precision_do_not_tie(tiny_config):
    module = HAMRouter(tiny_config(router="learned"), layer_idx=0).to(torch.bfloat16)
    scores = scored(module, **router_inputs(batch=4, length=200, dtype=torch.bfloat16))
    assert scores[..., 0].unique().numel() > 700, "800 tokens"


@pytest.mark.parametrize("router", ["learned", "learned_error"])
@pytest.mark.parametrize("hidden_size", [32, 256])
def test_a_fresh_router_spreads_its_scores(router, hidden_size, tiny_config):
    """With scores that all lie at the threshold, its smallest step turns every mask over."""
    model = HAMForCausalLM(tiny_config(router=router, hidden_size=hidden_size)).eval()
    with torch.no_grad():
        scores = model(torch.randint(1, 97, (4, 64)), output_routing_scores=True).routing_scores
    for layer in scores:
        assert 0.1 < layer.std() < 0.4
        assert 0.3 < layer.mean() < 0.8
