# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares the fused update of a decoding step with the same step composed of the model's PyTorch operations."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytest.importorskip("triton")

import ham_kernels
from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.delta_rule_ham import gated_delta_rule_with_prediction
from ham_hf.inputs_ham import TokenLayout
from ham_hf.ops_ham import l2norm, short_convolution
from ham_hf.routing_ham import Retention, cosine_score, l2_score, residual_score
from ham_kernels.decode_update import SCORES, AttentionView, Convolution, Gates, Routing, decode_update

# The package gives the function this name.
module = importlib.import_module("ham_kernels.decode_update")
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
# Names that `make` gives to the fields of each group.
NAMES = {
    "convolution": ("conv_state", "conv_weight"),
    "gates": ("a", "b", "A_log", "dt_bias"),
    "routing": ("threshold", "score", "given", "error_weight", "positions", "sinks"),
    "view": ("norm_weights", "rope", "attention_conv", "scale_values", "eps"),
}


def rms_norm(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def composed(
    qkv,
    conv_state,
    conv_weight,
    a,
    b,
    A_log,
    dt_bias,
    state,
    threshold,
    score="cosine",
    given=None,
    error_weight=None,
    norm_weights=None,
    rope=None,
    attention_conv=True,
    scale_values=False,
    eps=1e-6,
    allow_neg_eigval=False,
):
    """The step as `HAMMixer.forward` computes it: the outputs by name, with the two new states."""
    _, kv_heads, key_dim, value_dim = state.shape
    sizes = [qkv.shape[1] - kv_heads * (key_dim + value_dim), kv_heads * key_dim, kv_heads * value_dim]
    wide = A_log.dtype

    def split(x):
        q, k, v = x.split(sizes, -1)
        return q.unflatten(-1, (-1, key_dim)), k.unflatten(-1, (-1, key_dim)), v.unflatten(-1, (-1, value_dim))

    convolved, conv_state = short_convolution(qkv[:, None], conv_weight, conv_state)
    q, k, v = split(convolved)
    beta = b[:, None].to(wide).sigmoid() * (2 if allow_neg_eigval else 1)
    g = -A_log.exp() * F.softplus(a[:, None].to(wide) + dt_bias)
    o, prediction, state = gated_delta_rule_with_prediction(l2norm(q), l2norm(k), v, g, beta, initial_state=state)
    if score == "given":
        scores = given[:, None]
    elif score == "residual":
        scores = residual_score(v.to(wide), prediction, beta)
    elif score == "learned_error":
        scores = (given[:, None] + error_weight * cosine_score(v.to(wide), prediction)).sigmoid()
    else:
        scores = {"cosine": cosine_score, "l2": l2_score}[score](v.to(wide), prediction)
    q, k, v = split(convolved if attention_conv else qkv[:, None])
    if scale_values:
        v = v * scores[..., None].to(v.dtype)
    if norm_weights is not None:
        q, k = rms_norm(q, norm_weights[0], eps), rms_norm(k, norm_weights[1], eps)
    if rope is not None:
        q, k = apply_rotary_pos_emb(q, k, *(x[:, None] for x in rope), unsqueeze_dim=2)
    named = {"o": o.to(qkv.dtype), "q": q, "k": k, "v": v, "scores": scores}
    return {name: x.squeeze(1) for name, x in named.items()} | {
        "keep": scores.squeeze(1) >= threshold,
        "conv_state": conv_state,
        "state": state,
    }


def make(device, batch=2, kv_heads=2, groups=1, key_dim=16, value_dim=16, width=4, dtype=torch.float32, **options):
    """Random arguments of a step in the middle of a sequence; `rope` and `qk_norm` are on unless `options` say no."""
    channels = kv_heads * (groups * key_dim + key_dim + value_dim)

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    arguments = {
        "qkv": randn(batch, channels),
        "conv_state": randn(batch, width - 1, channels),
        "conv_weight": randn(channels, width) / 2,
        "a": 2 * randn(batch, kv_heads),
        "b": randn(batch, kv_heads),
        "A_log": torch.rand(kv_heads, device=device) - 2,
        "dt_bias": torch.randn(kv_heads, device=device),
        "state": torch.randn(batch, kv_heads, key_dim, value_dim, device=device),
        "threshold": torch.full((1, 1), 0.5, device=device),
    }
    if options.pop("qk_norm", True):
        arguments["norm_weights"] = (1 + 0.2 * randn(key_dim), 1 + 0.2 * randn(key_dim))
    if options.pop("rope", True):
        angle = 6 * torch.rand(batch, key_dim // 2, device=device).repeat(1, 2)
        arguments["rope"] = (angle.cos().to(dtype), angle.sin().to(dtype))
    if options.get("score") == "given":
        arguments["given"] = torch.rand(batch, kv_heads, device=device)
    if options.get("score") == "learned_error":
        arguments["given"] = torch.randn(batch, kv_heads, device=device)
        arguments["error_weight"] = torch.randn(kv_heads, device=device)
    return arguments | options


def cast(arguments, convert):
    """The arguments with `convert` applied to every tensor."""

    def one(x):
        if isinstance(x, tuple):
            return tuple(map(one, x))
        return convert(x) if isinstance(x, torch.Tensor) else x

    return {name: one(x) for name, x in arguments.items()}


def call(arguments):
    """Calls `decode_update` with arguments from `make`."""
    rest = dict(arguments)
    fields = {"convolution": Convolution, "gates": Gates, "routing": Routing, "view": AttentionView}
    names = {"conv_state": "state", "conv_weight": "weight", "attention_conv": "convolved"}
    groups = {}
    for group, kind in fields.items():
        found = {names.get(name, name): rest.pop(name) for name in NAMES[group] if name in rest}
        groups[group] = kind(**found)
    if groups["routing"].score is None and groups["routing"].threshold is None:
        groups["routing"] = None
    return decode_update(**groups, **rest)


def run(arguments):
    """The kernel's outputs by name, and the states that it updated in place; its inputs lie amid NaN."""
    buffers = []

    def inside_nan(x):
        if not x.is_floating_point():
            return x
        buffers.append(x.new_full((x.numel() + 128,), torch.nan))
        return buffers[-1][64:-64].view(x.shape).copy_(x)

    arguments = cast(arguments, inside_nan)
    out = call(arguments)
    assert all(x[:64].isnan().all() and x[-64:].isnan().all() for x in buffers), "something was written out of bounds"
    named = {name: x for name, x in out._asdict().items() if x is not None}
    return named | {name: arguments[name] for name in ("conv_state", "state")}


def check(draws, assert_error_within):
    """Compares the kernel with the composed step; the errors of all draws of the arguments form one sample."""
    samples = []
    for arguments in draws:
        exact, baseline, out = composed(**cast(arguments, torch.Tensor.double)), composed(**arguments), run(arguments)
        assert out.keys() == exact.keys()
        assert torch.equal(out["conv_state"], baseline["conv_state"])
        assert torch.equal(out["keep"], out["scores"] >= arguments["threshold"])
        samples.append((out, exact, baseline))
    for name in out.keys() - {"keep", "conv_state"}:
        assert out[name].dtype == baseline[name].dtype, name
        assert_error_within(
            *(torch.cat([x[name] for x in results]) for results in zip(*samples, strict=True)), name=name
        )


def make_many(device, **options):
    """Enough draws of `make` for 32 scores."""
    streams = options.get("batch", 2) * options.get("kv_heads", 2)
    return [make(device, **options) for _ in range(-(-32 // streams))]


@pytest.mark.parametrize(
    ("dtype", "score"),
    [
        pytest.param(dtype, score, marks=pytest.mark.slow if score in slow else [])
        for dtype, slow in ((torch.float32, ()), (torch.bfloat16, ("l2", "residual")), (torch.float16, SCORES))
        for score in SCORES
    ],
    ids=str,
)
def test_equals_the_composed_step(dtype, score, device, assert_error_within):
    # The fewest streams with enough scores.
    arguments = make(device, batch=16, groups=2, dtype=dtype, score=score)
    arguments["scale_values"] = score in ("given", "learned_error")
    check([arguments], assert_error_within)


def test_norm_weights_in_float32(device):
    """A norm that adds its weight to 1 passes the sum in float32, where 1.001 differs from 1, unlike in bfloat16."""
    arguments = make(device, dtype=torch.bfloat16)
    wide = {"norm_weights": tuple(x.float() for x in arguments["norm_weights"])}
    expected, out = run(arguments), run(arguments | wide)
    assert all(torch.equal(expected[name], out[name]) for name in expected)
    finer = {"norm_weights": tuple(x * 1.001 for x in wide["norm_weights"])}
    assert not torch.equal(run(arguments | finer)["k"], expected["k"])


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "kv_heads": 1, "groups": 1, "key_dim": 16, "value_dim": 16},
        {"batch": 3, "kv_heads": 2, "groups": 3, "key_dim": 12, "value_dim": 20},
        {"batch": 1, "kv_heads": 3, "groups": 4, "key_dim": 6, "value_dim": 5},
        {"batch": 2, "kv_heads": 1, "groups": 1, "key_dim": 40, "value_dim": 72, "width": 3},
        {"batch": 2, "kv_heads": 1, "groups": 2, "key_dim": 8, "value_dim": 4, "width": 1},
        {"batch": 2, "kv_heads": 1, "groups": 2, "key_dim": 8, "value_dim": 4, "width": 2},
    ],
    ids=str,
)
def test_odd_sizes(sizes, device, assert_error_within):
    check(make_many(device, **sizes), assert_error_within)


def test_a_state_of_several_tiles(device, assert_error_within, monkeypatch):
    monkeypatch.setattr(module, "STATE_TILE", 64)
    check(make_many(device, groups=2, key_dim=12, value_dim=20), assert_error_within)


@pytest.mark.parametrize(
    "options",
    [
        {"rope": False},
        {"qk_norm": False},
        {"rope": False, "qk_norm": False},
        {"attention_conv": False},
        {"allow_neg_eigval": True, "score": "residual"},
    ],
    ids=str,
)
def test_options(options, device, assert_error_within):
    check(make_many(device, **options), assert_error_within)


@pytest.mark.parametrize("attention_conv", [False, True])
def test_values_scaled_by_a_score_that_the_state_decides(attention_conv, device, assert_error_within):
    options = {"groups": 2, "score": "learned_error", "scale_values": True, "attention_conv": attention_conv}
    check(make_many(device, **options), assert_error_within)


def test_a_layer_without_attention(device):
    arguments = make(device, batch=3, groups=2, rope=False, qk_norm=False)
    expected = run(arguments)
    out = run(arguments | {"score": None, "threshold": None})
    assert out.keys() == {"o", "conv_state", "state"}
    for name, x in out.items():
        assert torch.equal(x, expected[name]), name


def test_addresses_have_64_bits(last_of):
    """The last of many streams, with more than 2^31 numbers of state together, gives the same as alone."""
    small = make("cpu", batch=1, key_dim=256, value_dim=256)
    of_rows = ("qkv", "conv_state", "a", "b", "state")

    def results(rows):
        arguments = {name: last_of(rows, x) if name in of_rows else x for name, x in small.items()}
        arguments["rope"] = tuple(last_of(rows, x) for x in small["rope"])
        out = call(arguments)
        return [*(x[-1, -1] for x in out), arguments["state"][-1], arguments["conv_state"][-1]]

    alone, far = results(1), results(2**14 + 1)
    assert not torch.equal(alone[-2][-1], small["state"][0, -1])
    for a, b in zip(alone, far, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_thresholds_of_every_shape(shape, device):
    arguments = make(device, batch=3, rope=False)
    arguments["threshold"] = torch.rand(shape, device=device)
    out = run(arguments)
    assert torch.equal(out["keep"], out["scores"] >= arguments["threshold"])
    out = run(arguments | {"threshold": out["scores"].clone()})
    assert out["keep"].all(), "a score that equals the threshold is kept"


def test_sinks_are_kept_whatever_their_score(device):
    positions = torch.tensor([0, 3, 4, 2, 2**40], device=device)
    real = torch.tensor([True, True, True, False, True], device=device)
    arguments = make(device, batch=5) | {"threshold": torch.full((1, 1), 2.0, device=device), "real": real}
    expected, out = run(arguments), run(arguments | {"positions": positions, "sinks": 4})
    assert out["keep"].tolist() == [[True] * 2, [True] * 2, [False] * 2, [False] * 2, [False] * 2]
    for name in out.keys() - {"keep"}:
        assert torch.equal(out[name][real], expected[name][real]), name
    out = run(arguments | {"positions": positions, "sinks": 4, "threshold": torch.zeros_like(arguments["threshold"])})
    assert out["keep"].tolist() == [[x] * 2 for x in real.tolist()], "other tokens are kept by their score"


def test_padding_changes_nothing(device):
    arguments = make(device, batch=3, groups=2) | {"threshold": torch.full((1, 1), -1.0, device=device)}
    out, padded = run(arguments), run(arguments | {"real": torch.tensor([True, False, True], device=device)})
    assert out["keep"].all()
    assert padded["keep"].tolist() == [[True] * 2, [False] * 2, [True] * 2]
    for name in ("conv_state", "state"):
        assert torch.equal(padded[name][1], arguments[name][1])
    for name in out.keys() - {"keep"}:
        assert torch.equal(padded[name][::2], out[name][::2])


def test_padding_that_is_not_a_number_changes_nothing(device):
    arguments = make(device, batch=3, groups=2) | {"real": torch.tensor([True, False, True], device=device)}
    clean = run(arguments)
    for name in ("qkv", "a", "b"):
        arguments[name][1] = torch.nan
    out = run(arguments)
    assert not out["keep"][1].any()
    for name in ("conv_state", "state"):
        assert torch.equal(out[name], clean[name]), name
    for name in out.keys() - {"keep"}:
        assert torch.equal(out[name][::2], clean[name][::2]), name


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.001])
@pytest.mark.parametrize("score", SCORES)
def test_what_is_not_a_number_scores_1(score, threshold, device):
    arguments = make(device, score=score) | {"threshold": torch.full((1, 1), threshold, device=device)}
    arguments["qkv"][0] = torch.nan
    if "given" in arguments:
        arguments["given"][0] = torch.nan
    out = run(arguments)
    assert out["scores"][0].tolist() == [1.0, 1.0]
    assert out["keep"][0].tolist() == [threshold <= 1] * 2
    assert (out["scores"][1] < 1).all()


@pytest.mark.parametrize("score", ["cosine", "l2", "residual"])
def test_an_empty_state_and_values_of_zero(score, device):
    """Zero vectors score as in PyTorch, 0.5 by the cosine."""
    arguments = make(device, score=score)
    arguments["state"].zero_()
    arguments["qkv"][1] = 0
    arguments["conv_state"][1] = 0
    out, expected = run(arguments), composed(**arguments)
    torch.testing.assert_close(out["scores"], expected["scores"], atol=1e-6, rtol=0)


def test_one_table_of_angles_serves_all_rows(device):
    arguments = make(device, batch=3)
    angles = tuple(x[:1].contiguous() for x in arguments["rope"])
    shared = run(arguments | {"rope": angles})
    own = run(arguments | {"rope": tuple(x.expand(3, -1).contiguous() for x in angles)})
    assert torch.equal(shared["q"], own["q"])
    assert torch.equal(shared["k"], own["k"])


def test_follows_the_mixer_token_by_token(device, tiny_config, choose_kernels):
    """Six tokens through a layer of the model with its cache, and through the kernel with its states."""
    choose_kernels(lambda op, *tensors: None)  # on a GPU the mixer must run PyTorch too
    config = tiny_config(num_hidden_layers=1, head_dim=16, value_head_dim=24)
    mixer = HAMForCausalLM(config).eval().to(device).model.layers[0].mixer
    mixer.threshold.data.uniform_(0.3, 0.7)
    cache = HAMCache(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    conv_state = torch.zeros(2, config.conv_kernel_size - 1, sum(mixer.sizes), device=device)
    state = torch.zeros(2, kv_heads, 16, 24, device=device)
    seen = {}
    mixer.rnn_norm.register_forward_pre_hook(lambda module, inputs: seen.update(o=inputs[0]))
    original = cache.layers[0].update
    cache.layers[0].update = lambda step, budget: (seen.update(step=step), original(step, budget))
    kept = 0
    with torch.inference_mode():
        for t in range(6):
            hidden = torch.randn(2, 1, config.hidden_size, device=device)
            angle = t * 10000.0 ** (-torch.arange(8, device=device) / 8).repeat(2)
            rope = (angle.cos()[None], angle.sin()[None])
            position = torch.full((2, 1), t, device=device)
            tokens = TokenLayout(real=None, positions=position, seq_idx=None, past_real=None)
            mixer(hidden, tuple(x[:, None] for x in rope), tokens, Retention(), cache)
            x = hidden[:, 0]
            out = decode_update(
                torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], -1),
                Convolution(conv_state, mixer.conv.weight),
                Gates(mixer.a_proj(x), mixer.b_proj(x), mixer.A_log, mixer.dt_bias),
                state,
                Routing(mixer.threshold[None]),
                AttentionView((mixer.q_norm.weight, mixer.k_norm.weight), rope, eps=config.rms_norm_eps),
            )
            step = seen["step"]
            expected = (seen["o"], step.keys, step.values, step.scores, step.conv_state, step.recurrent_state)
            expected = [x.squeeze(1) for x in expected[:4]] + list(expected[4:])
            for found, wanted in zip((out.o, out.k, out.v, out.scores, conv_state, state), expected, strict=True):
                torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
            assert torch.equal(out.keep, step.keep[:, 0])
            kept += int(out.keep.sum())
    assert 0 < kept < 6 * 2 * kv_heads
    assert out.q.shape == (2, heads, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "cosin"}, "`routing.score` must be one of 'cosine', .* got 'cosin'"),
        ({"score": "given"}, "`routing.given` must be a tensor with `score` 'given', got None"),
        ({"given": torch.zeros(2, 2)}, "`routing.given` must be None with `score` 'cosine'"),
        ({"score": "learned_error", "given": torch.zeros(2, 2)}, "`routing.error_weight` must be a tensor"),
        ({"score": None}, "`routing.score` must be one of .* got None"),
        ({"threshold": None}, "`routing.threshold` must be a tensor with `score` 'cosine'"),
        ({"qkv": torch.zeros(2, 3, 4)}, r"`qkv` must be \[B, C\]"),
        ({"qkv": torch.zeros(2, 97)}, "`qkv` must have the channels"),
        ({"state": torch.zeros(2, 2, 16)}, r"`state` must be \[B, Hk, K, V\]"),
        ({"state": torch.zeros(2, 2, 16, 16).double()}, "`state` must be .*float64"),
        ({"conv_state": torch.zeros(2, 2, 96)}, r"`convolution.state` must be \[2, 3, 96\]"),
        ({"conv_state": torch.zeros(2, 96, 3).mT}, "`convolution.state` must be .* contiguous"),
        ({"A_log": torch.zeros(2).bfloat16()}, "`gates.A_log` must be .*bfloat16"),
        ({"b": torch.zeros(2, 2, requires_grad=True)}, "`gates.b` requires a gradient"),
        ({"norm_weights": (torch.ones(16), torch.ones(15))}, r"`view.norm_weights\[1\]` must be \[16\]"),
        ({"rope": (torch.ones(1, 8), torch.ones(1, 8))}, r"`view.rope\[0\]` must be \[1, 16\]"),
        ({"threshold": torch.zeros(3, 2)}, r"`routing.threshold` must be \[2 or 1, 2 or 1\]"),
        ({"threshold": torch.zeros(1, 1).double()}, "`routing.threshold` must be torch.float32"),
        ({"sinks": 2}, "`routing.positions` must be a tensor with `sinks` 2, got None"),
        ({"sinks": -1}, "`routing.sinks` must be an int of at least 0, got -1"),
        ({"positions": torch.zeros(2).int()}, r"`routing.positions` must be \[2\] of torch.int64"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(make("cpu", rope=False) | changes)


# --- in the model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(choose_kernels, device):
    """Makes the model decode with kernels, on a CPU too, and lists the calls."""
    names = []

    def kernel(op, *tensors):
        if op not in ("decode_update", "decode_mix_append", "ragged_decode_attention", "slab_table"):
            return None
        names.append(op)
        return getattr(ham_kernels, op)

    choose_kernels(kernel)
    return names


PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GROUPED = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}


def decoded(model, ids, prompt, **options):
    """Logits of a prompt in one call and the rest token by token, and the cache."""
    cache = HAMCache(model.config)
    pieces = [ids[:, :prompt], *(ids[:, t : t + 1] for t in range(prompt, ids.shape[1]))]
    with torch.no_grad():
        logits = [model(x, cache=cache, **options).logits for x in pieces]
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({}, {}),
        ({"router": "l2", "qk_norm": False}, {"threshold": 0.3}),
        ({"router": "residual", "rope_parameters": None}, {"threshold": torch.tensor([0.2, 0.4])}),
        pytest.param({"router": "learned"}, {"threshold": 0.5}, marks=pytest.mark.slow),
        ({"router": "learned_error", "output_gate": False}, {"threshold": torch.tensor([0.615, 0.62])}),
        pytest.param(
            {"router": "random", "rnn_output_norm": False, "kv_output_norm": False},
            {"threshold": 0.3},
            marks=pytest.mark.slow,
        ),
        ({"router": "recency", "rope_parameters": None}, {"threshold": 20.5 / 2**24}),
        pytest.param({"router": "recency"}, {"kv_budget": 17}, marks=pytest.mark.slow),
        ({"attention_conv": False, "num_key_value_heads": 4}, {"kv_budget": 17}),
        pytest.param({"router": "residual", "allow_neg_eigval": True}, {"threshold": 0.5}, marks=pytest.mark.slow),
        pytest.param({"output_gate": "sigmoid", "output_norm_eps": 0.1}, {}, marks=pytest.mark.slow),
        ({"attention_post_norm": True, "zero_centered_norms": True, "rope_parameters": PARTIAL_ROPE}, {}),
    ],
    ids=str,
)
def test_a_model_decodes_the_same(overrides, options, device, tiny_config, calls, choose_kernels):
    model = HAMForCausalLM(tiny_config(**overrides)).eval().to(device)
    # Some streams fill a page with the first token, and read it with the second.
    ids = torch.randint(1, 97, (2, 26), device=device)
    logits, cache = decoded(model, ids, 24, **options)
    assert calls.count("decode_update") == calls.count("ragged_decode_attention") == 2 * 2
    assert calls.count("decode_mix_append") == (0 if "kv_budget" in options else 2 * 2)
    choose_kernels(lambda op, *tensors: None)
    expected, expected_cache = decoded(model, ids, 24, **options)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    for layer in range(2):
        found, wanted = cache.kept_positions(layer), expected_cache.kept_positions(layer)
        assert all(torch.equal(x, y) for a, b in zip(found, wanted, strict=True) for x, y in zip(a, b, strict=True))
    assert 0 < cache.kv_usage().mean() < 1
    states = [(layer.conv_state, layer.recurrent_state) for x in (cache, expected_cache) for layer in x.layers]
    for found, wanted in zip(states[:2], states[2:], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "updates"),
    [
        (GROUPED, 1),
        (GROUPED | {"linear_num_key_heads": 4}, 2),
        ({"qk_norm": "projection"}, 1),
        (GROUPED | {"qk_norm": "projection"}, 0),
        ({"linear_output_gate": "sigmoid", "allow_neg_eigval": True, "output_norm_eps": 0.1}, 2),
    ],
    ids=str,
)
def test_layers_that_the_kernels_do_not_know_are_pytorch_s(
    overrides, updates, device, tiny_config, calls, choose_kernels
):
    """With value heads that share a key, or a norm over all heads, only the other layer uses the kernels."""
    config = tiny_config(layer_types=["hybrid", "linear_attention"], **overrides)
    model = HAMForCausalLM(config).eval().to(device)
    ids = torch.randint(1, 97, (2, 14), device=device)
    logits, cache = decoded(model, ids, 12)
    assert calls.count("decode_update") == calls.count("decode_mix_append") == updates * 2
    choose_kernels(lambda op, *tensors: None)
    expected, expected_cache = decoded(model, ids, 12)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert torch.equal(cache.kept_tokens(), expected_cache.kept_tokens())
    for found, wanted in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(found.recurrent_state, wanted.recurrent_state, atol=1e-5, rtol=0)
        assert torch.equal(found.real_tokens, wanted.real_tokens)


def test_padding_among_decoded_tokens(device, tiny_config, calls, choose_kernels):
    """A finished row gets padding while the other continues, as in `generate`."""
    model = HAMForCausalLM(tiny_config()).eval().to(device)
    ids = torch.randint(1, 97, (2, 12), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 9:11] = 0, 0

    def run():
        cache, logits = HAMCache(model.config), []
        with torch.inference_mode():
            for begin, end in ((0, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
                out = model(ids[:, begin:end], attention_mask=mask[:, :end], cache=cache)
                logits.append(out.logits)
        return torch.cat(logits, 1), cache

    logits, cache = run()
    assert calls.count("decode_update") == 2 * 4
    choose_kernels(lambda op, *tensors: None)
    expected, expected_cache = run()
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    assert torch.equal(cache.kept_tokens(), expected_cache.kept_tokens())
    torch.testing.assert_close(cache.layers[1].conv_state, expected_cache.layers[1].conv_state, atol=1e-5, rtol=0)


def test_a_step_that_the_kernel_cannot_take_is_left_to_pytorch(device, tiny_config, calls):
    """Steps with gradients, with a cache that records its past, and with attention weights."""
    model = HAMForCausalLM(tiny_config(num_hidden_layers=1)).eval().to(device)
    ids = torch.randint(1, 97, (2, 9), device=device)

    def step(**options):
        _, cache = decoded(model, ids[:, :8], 8)
        if options.pop("roll_back", False):
            cache.layers[0].activate_past_recording()
        with torch.set_grad_enabled(options.pop("grad", False)):
            model(ids[:, 8:], cache=cache, **options)
        return calls.count("decode_update")

    assert step() == 1
    for options in ({"grad": True}, {"roll_back": True}, {"output_attentions": True}):
        assert step(**options) == 1, options


def test_a_step_back_equals_never_having_gone(device, tiny_config, calls):
    """A rollback of drafts is exact, although earlier steps updated the states in place."""
    model = HAMForCausalLM(tiny_config()).eval().to(device)
    ids = torch.randint(1, 97, (1, 20), device=device)
    _, cache = decoded(model, ids[:, :14], 11)
    expected = copy.deepcopy(cache)
    cache.activate_past_recording()
    with torch.inference_mode():
        for t in range(14, 17):
            model(ids[:, t : t + 1], cache=cache)
        cache.crop(-3)
        found, wanted = (model(ids[:, 17:], cache=x).logits for x in (cache, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
