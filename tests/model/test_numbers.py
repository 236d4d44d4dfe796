# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Numbers that must not decide anything by accident: broken ones in padding and in scores, defaults of the process."""

import copy
import itertools

import pytest
import torch
from torch.nn.utils import parametrize

from ham_hf import HAMCache, HAMForCausalLM, HAMModel
from ham_hf.configuration_ham import ROUTERS
from ham_hf.delta_rule_ham import gated_delta_rule_with_prediction
from ham_hf.mixer_ham import FLOAT32_PARAMETERS
from ham_hf.ops_ham import l2norm
from ham_hf.reference import naive_gated_delta_rule_with_prediction
from ham_hf.routing_ham import check_threshold

MIXED = ["hybrid", "linear_attention", "full_attention", "hybrid"]
BROKEN = [float("nan"), float("inf"), float("-inf")]


# --------------------------------------------------------------------------- padding


def padded(rows):
    """A mask `[2, 12]` with padding on the left, on the right or between, and positions if the rows are packed."""
    mask = torch.ones(2, 12, dtype=torch.long)
    if rows == "left":
        mask[0, :4] = 0
    elif rows == "right":
        mask[1, 9:] = 0
    else:
        mask[0, 4:6] = mask[1, :2] = mask[1, 11:] = 0
    arguments = {"attention_mask": mask, "threshold": 0.5}
    if rows == "packed":
        arguments["position_ids"] = torch.cat([torch.arange(6), torch.arange(6)]).expand(2, -1)
    return arguments


def with_padding(x, mask, value):
    return torch.where(mask.bool()[..., None], x, value)


@pytest.mark.parametrize("rows", ["left", "right", "packed"])
@pytest.mark.parametrize("router", ["cosine", "learned_error"])
def test_gradients_do_not_know_what_stands_in_padding(router, rows, tiny_config):
    model = HAMModel(tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED)).train()
    arguments, x = padded(rows), torch.randn(2, 12, 32)
    real, results = arguments["attention_mask"].bool(), []
    for value in (0.0, *BROKEN):
        embeds = with_padding(x, real, value).requires_grad_()
        model.zero_grad()
        out = model(inputs_embeds=embeds, use_cache=False, **arguments).last_hidden_state[real]
        out.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out, embeds.grad, *gradients])
        assert all(g.isfinite().all() for g in results[-1])
        assert len(gradients) > 40
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("rows", ["left", "right", "between"])
def test_a_cache_does_not_know_what_stands_in_padding(rows, tiny_config):
    model = HAMModel(tiny_config(num_hidden_layers=4, layer_types=MIXED)).eval()
    arguments, x = padded(rows), torch.randn(2, 12, 32)
    mask, results = arguments["attention_mask"], []
    for value in (0.0, *BROKEN):
        embeds, cache, outputs = with_padding(x, mask, value), HAMCache(model.config), []
        for begin, end in itertools.pairwise((0, 5, 10, 11, 12)):
            call = {"inputs_embeds": embeds[:, begin:end], "attention_mask": mask[:, :end], "threshold": 0.5}
            outputs.append(model(cache=cache, **call).last_hidden_state)
        tensors = [t for layer in cache.layers for t in layer.state_dict().values()]
        results.append([torch.cat(outputs, 1)[mask.bool()], *tensors])
        assert all(t.isfinite().all() for t in results[-1])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_embedding_of_the_padding_token_may_be_anything(tiny_config):
    model = HAMForCausalLM(tiny_config()).eval()
    ids, mask = torch.randint(1, 97, (2, 12)), padded("left")["attention_mask"]
    ids[0, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "threshold": 0.5}
    expected = model.generate(ids, **arguments)
    model.model.embed_tokens.weight.data[0] = torch.nan
    assert torch.equal(model.generate(ids, **arguments), expected)


# --------------------------------------------------------------------------- scores that are no numbers


@pytest.mark.parametrize("router", ROUTERS)
def test_a_broken_token_is_not_dropped_unseen(router, tiny_config):
    model = HAMModel(tiny_config(router=router)).eval()
    x = torch.randn(2, 12, 32)
    x[0, 5] = torch.nan
    for threshold, expected in ((0.0, 1.0), (-1.0, 1.0), (1.001, 0.0)):
        cache = HAMCache(model.config)
        for begin, end in ((0, 8), (8, 9), (9, 12)):
            out = model(inputs_embeds=x[:, begin:end], cache=cache, threshold=threshold, output_routing_scores=True)
            assert all(((s >= 0) & (s <= 1)).all() for s in out.routing_scores)
        assert (cache.kv_usage() == expected).all(), threshold
    usual = model(inputs_embeds=x, threshold=1.0).cache
    if router not in ("random", "recency"):
        kept = [5 in positions for positions in usual.kept_positions(0)[0]]
        assert all(kept), "a threshold of 1 keeps what may be of any value"


# --------------------------------------------------------------------------- decays


@pytest.mark.parametrize("length", [64, 130])
@pytest.mark.parametrize("decay", ["strong", "mixed"])
def test_chunks_are_as_exact_as_steps_whatever_decays(decay, length):
    """Decays are differences of sums of up to 1,600, where float32 ends at 1e-4."""
    strong = -1 - 49 * torch.rand(2, length, 2)
    weak = -1e-3 * torch.rand(2, length, 2)
    inputs = [
        l2norm(torch.randn(2, length, 4, 16)),
        l2norm(torch.randn(2, length, 2, 16)),
        torch.randn(2, length, 2, 16),
        strong if decay == "strong" else torch.where(torch.rand(2, length, 2) < 0.3, strong, weak),
        torch.rand(2, length, 2),
    ]
    inputs = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    actual, exact = gated_delta_rule_with_prediction(*inputs), naive_gated_delta_rule_with_prediction(*wide)
    weights = [torch.randn(x.shape) for x in actual]
    gradients = [
        torch.autograd.grad(outputs, tensors, [w.to(outputs[0].dtype) for w in weights])
        for outputs, tensors in ((actual, inputs), (exact, wide))
    ]
    for x, y in zip([*actual, *gradients[0]], [*exact, *gradients[1]], strict=True):
        assert (x - y).abs().max() < 2e-6 * max(1, y.abs().max())


# --------------------------------------------------------------------------- defaults of the process


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def other_defaults(request):
    """A process whose tensors are wider, narrower, or nowhere unless an operation says otherwise."""
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


@pytest.fixture
def before_defaults(tiny_config):
    """A model, its input and what they give; asked for before `other_defaults`."""
    model = HAMModel(tiny_config(num_hidden_layers=4, layer_types=MIXED)).eval()
    ids = torch.randint(1, 97, (2, 40))
    return model, ids, outputs(model, ids)


def outputs(model, ids):
    """Of a prompt and two steps at a number as threshold, of a learned one, and of packed rows."""
    results = []
    for threshold in (0.5, [0.4, 0.6], None):
        cache = None
        for part in (ids[:, :38], ids[:, 38:39], ids[:, 39:]):
            out = model(part, cache=cache, threshold=threshold, use_cache=True, output_routing_scores=True)
            cache = out.cache
            results += [out.last_hidden_state, *out.routing_scores]
        results += [layer.store.tokens().scores for layer in cache.layers if layer.store is not None]
    positions = torch.cat([torch.arange(n, device=ids.device) for n in (25, 15)])[None]
    return [*results, model(ids, position_ids=positions, threshold=0.5, use_cache=False).last_hidden_state]


def test_defaults_of_the_process_change_nothing(before_defaults, other_defaults):
    model, ids, expected = before_defaults
    for x, y in zip(outputs(model, ids), expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("threshold", [0.3, [0.3, 0.7]], ids=str)
def test_thresholds_are_float32_on_the_cpu(threshold):
    tensor = check_threshold(threshold, 2, 1, 1)
    assert tensor.dtype == torch.float32
    assert tensor.device.type == "cpu"


# --------------------------------------------------------------------------- what stays in float32


def own_tensors(model):
    return {n: x for n, x in model.state_dict().items() if n.rsplit(".", 1)[-1] in FLOAT32_PARAMETERS}


def thirds(model):
    """Thresholds and the like set to numbers that half precision moves."""
    for x in own_tensors(model).values():
        x.copy_(torch.rand_like(x) + 1 / 3)
    return {name: x.clone() for name, x in own_tensors(model).items()}


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to a device": lambda model: model.to("cpu", torch.float16),
    "from float64": lambda model: model.double().half(),
    "from float64, to": lambda model: model.to(torch.float64).to(torch.bfloat16),
    "of a copy": lambda model: copy.deepcopy(model.half()),
    "and back": lambda model: model.half().float(),
    "of float64 and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_thresholds_and_decays_keep_their_digits(cast, tiny_config):
    model = HAMForCausalLM(tiny_config(router="learned_error"))
    expected = thirds(model)
    model = CASTS[cast](model)
    assert model.lm_head.weight.dtype == (torch.float32 if "back" in cast else model.dtype)
    found = own_tensors(model)
    assert len(found) == 2 * len(FLOAT32_PARAMETERS)
    for name, x in found.items():
        assert x.dtype == torch.float32, name
        assert torch.equal(x, expected[name]), name
    assert model(torch.randint(1, 97, (1, 40))).logits.isfinite().all()


def test_float64_is_float64_throughout(tiny_config):
    model = HAMForCausalLM(tiny_config()).double()
    assert {x.dtype for x in own_tensors(model).values()} == {torch.float64}


def test_gradients_of_thresholds_and_decays_keep_their_digits(tiny_config):
    model = HAMForCausalLM(tiny_config())
    ids = torch.randint(1, 97, (1, 40))
    model(ids, labels=ids).loss.backward()
    mixer = model.model.layers[0].mixer
    before = {name: getattr(mixer, name).grad.clone() for name in FLOAT32_PARAMETERS[:3]}
    model.half()
    assert all(torch.equal(getattr(mixer, name).grad, grad) for name, grad in before.items())
    assert mixer.q_proj.weight.grad.dtype == torch.float16


class Same(torch.nn.Module):
    def forward(self, x):
        return 1 * x


def test_a_parametrized_decay_keeps_its_digits(tiny_config):
    model = HAMForCausalLM(tiny_config(router="learned_error"))
    expected = thirds(model)
    mixer = model.model.layers[0].mixer
    parametrize.register_parametrization(mixer, "A_log", Same())
    model.bfloat16()
    assert torch.equal(mixer.A_log, expected["model.layers.0.mixer.A_log"])
    parametrize.remove_parametrizations(mixer, "A_log")
    assert all(torch.equal(x, expected[name]) for name, x in own_tensors(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_made_in_a_dtype(dtype, tiny_config):
    model = HAMForCausalLM._from_config(tiny_config(), dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    assert {x.dtype for x in own_tensors(model).values()} == {torch.float32}
    assert model(torch.randint(1, 97, (1, 40))).logits.isfinite().all()
