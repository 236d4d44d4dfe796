# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Layers of other families are configurations of HAM: Qwen3-Next, Qwen3.5, OLMo-Hybrid, and what follows from them."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding, apply_rotary_pos_emb

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM
from ham_hf.mixer_ham import HAMRotaryEmbedding, partial_rotary_order

THEIR_LAYERS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
HYBRID_LAYERS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PARTIAL_ROPE = ROPE | {"partial_rotary_factor": 0.25}
# What all of these families have in common.
COMMON = SHAPE | LINEAR | {"attention_conv": False, "kv_output_norm": False}
# Measured: 7e-7 to 9e-6, of logits up to 2.6.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def without_fla(monkeypatch):
    """Transformers binds flash-linear-attention's kernels where it is installed, and those crash on CPU tensors."""
    for module in (modeling_qwen3_5, modeling_qwen3_next, modeling_olmo_hybrid):
        for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


# --------------------------------------------------------------------------- weights of other families


def common_name(name):
    """The name in HAM of what every family has, with as many tensors."""
    for old, new in (
        ("linear_attn.conv1d", "mixer.conv"),
        ("linear_attn.out_proj", "mixer.o_proj"),
        ("linear_attn.in_proj_", "mixer."),
        ("linear_attn.g_proj", "mixer.z_proj"),
        ("linear_attn.norm", "mixer.rnn_norm"),
        ("linear_attn.o_norm", "mixer.rnn_norm"),
        ("linear_attn", "mixer"),
        ("self_attn", "mixer"),
    ):
        name = name.replace(old, new)
    return re.sub(r"mixer\.([zab])\.weight", r"mixer.\1_proj.weight", name)


def qwen_weights(model):
    """The weights of Qwen3-Next or Qwen3.5 under HAM's names."""
    c = model.config
    key_heads, groups = c.linear_num_key_heads, c.linear_num_value_heads // c.linear_num_key_heads
    keys, values = key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    order = partial_rotary_order(c.head_dim, int(c.head_dim * c.rope_parameters["partial_rotary_factor"]))
    weights = {}
    for name, x in model.state_dict().items():
        new = common_name(name)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[new] = x[order]
        elif name.endswith("self_attn.q_proj.weight"):
            query, gate = x.unflatten(0, (-1, 2, c.head_dim)).unbind(1)
            weights[new] = query[:, order].flatten(0, 1)
            weights[new.replace("q_proj", "z_proj")] = gate.flatten(0, 1)
        elif name.endswith("self_attn.k_proj.weight"):
            weights[new] = x.unflatten(0, (-1, c.head_dim))[:, order].flatten(0, 1)
        elif name.endswith("in_proj_qkv.weight"):
            parts = x.split([keys, keys, values])
            weights |= {new.replace("qkv", f"{part}_proj"): y for part, y in zip("qkv", parts, strict=True)}
        elif name.endswith("in_proj_qkvz.weight"):
            per_head = [c.linear_key_head_dim] * 2 + [groups * c.linear_value_head_dim] * 2
            parts = x.unflatten(0, (key_heads, -1)).split(per_head, dim=1)
            weights |= {
                new.replace("qkvz", f"{part}_proj"): y.flatten(0, 1) for part, y in zip("qkvz", parts, strict=True)
            }
        elif name.endswith("in_proj_ba.weight"):
            parts = x.unflatten(0, (key_heads, -1)).split([groups, groups], dim=1)
            weights |= {
                new.replace("ba", f"{part}_proj"): y.flatten(0, 1) for part, y in zip("ba", parts, strict=True)
            }
        else:
            weights[new] = x.squeeze(1) if "conv1d" in name else x
    return weights


def olmo_weights(model):
    """The weights of OLMo-Hybrid under HAM's names; where attention has biases, zeros for those of linear layers."""
    weights = {common_name(name): x.squeeze(1) if "conv1d" in name else x for name, x in model.state_dict().items()}
    if model.config.attention_bias:
        for name in [name for name in weights if re.search(r"mixer\.[qkvo]_proj\.weight", name)]:
            weights.setdefault(name.replace("weight", "bias"), torch.zeros(len(weights[name])))
    return weights


def qwen_pair(kind, layer_types):
    shape = SHAPE | LINEAR | {"head_dim": 16, "rope_parameters": dict(PARTIAL_ROPE), "layer_types": THEIR_LAYERS}
    if kind == "qwen3_5":
        theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape))
    else:
        theirs = Qwen3NextForCausalLM(Qwen3NextConfig(**shape, mlp_only_layers=[0, 1, 2, 3]))
    config = HAMConfig(
        **COMMON,
        head_dim=16,
        rope_parameters=dict(PARTIAL_ROPE),
        layer_types=layer_types,
        zero_centered_norms=True,
        output_gate="sigmoid",
        linear_output_gate="silu",
    )
    return theirs, config, qwen_weights


def olmo_pair(kind, layer_types):
    shape = SHAPE | LINEAR | {"layer_types": THEIR_LAYERS, "attention_bias": "bias" in kind}
    # Without positions Transformers wants a theta of None: of no parameters at all it makes those of RoPE.
    rope = ROPE if "rope" in kind else {"rope_type": "default", "rope_theta": None}
    theirs = OlmoHybridForCausalLM(OlmoHybridConfig(**shape, rope_parameters=dict(rope)))
    config = HAMConfig(
        **COMMON,
        rope_parameters=dict(ROPE) if "rope" in kind else None,
        layer_types=layer_types,
        attention_bias="bias" in kind,
        output_gate=False,
        linear_output_gate="silu",
        output_norm_eps=1e-5,
        qk_norm="projection",
        allow_neg_eigval=True,
        attention_post_norm=True,
    )
    return theirs, config, olmo_weights


KINDS = {
    "qwen3_5": qwen_pair,
    "qwen3_next": qwen_pair,
    "olmo_hybrid": olmo_pair,
    "olmo_hybrid, rope": olmo_pair,
    "olmo_hybrid, bias": olmo_pair,
}


def pair(kind, layer_types):
    """A model of Transformers with random weights, and a HAM model with the same; hybrid layers have a shut RNN."""
    torch.manual_seed(0)
    theirs, config, converted = KINDS[kind](kind, list(layer_types))
    assert (getattr(theirs.model, "rotary_emb", None) is None) == (config.rope_parameters is None)
    theirs.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.add_(0.5 * torch.rand_like(parameter) - 0.25)
            elif name.endswith(("dt_bias", "A_log")) or "bias" in name:
                parameter.normal_(std=0.5)
    ours = HAMForCausalLM(config).eval()
    missing, unexpected = ours.load_state_dict(converted(theirs), strict=False)
    assert not unexpected
    own = ("conv", "a_proj", "b_proj", "A_log", "dt_bias", "rnn_norm", "gate_proj", "threshold", "quantiles")
    hybrid = [f"layers.{i}.mixer" for i, layer_type in enumerate(layer_types) if layer_type == "hybrid"]
    for name in missing:
        assert any(layer in name for layer in hybrid), name
        assert any(part in name for part in own), name
    with torch.no_grad():
        for layer in ours.model.layers:
            if layer.mixer.layer_type == "hybrid":
                layer.mixer.rnn_gate_proj.weight.zero_()
                layer.mixer.rnn_gate_proj.bias.fill_(-20)
                layer.mixer.kv_gate_proj.weight.zero_()
                layer.mixer.kv_gate_proj.bias.zero_()
                layer.mixer.o_proj.weight.mul_(2)
    return theirs, ours


def assert_close(found, expected):
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1, "logits next to zero would all be close"


@pytest.mark.parametrize("layer_types", [THEIR_LAYERS, HYBRID_LAYERS], ids=["full", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_model_of_transformers(kind, layer_types):
    """At once, in pieces, token by token, and in a batch padded on the left."""
    theirs, ours = pair(kind, layer_types)
    ids = torch.randint(1, 97, (2, 41))
    expected = theirs(ids).logits
    assert_close(ours(ids, threshold=0.0).logits, expected)

    cache = HAMCache(ours.config)
    pieces = [slice(0, 17), slice(17, 30), *(slice(t, t + 1) for t in range(30, 41))]
    in_pieces = [ours(ids[:, piece], cache=cache, threshold=0.0).logits for piece in pieces]
    assert_close(torch.cat(in_pieces, 1), expected)

    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = theirs(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert_close(ours(ids, attention_mask=mask, threshold=0.0).logits[real], padded[real])
    assert not torch.equal(padded[1, 9:], expected[1, 9:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_5", "olmo_hybrid"])
def test_writes_the_same_text(kind):
    theirs, ours = pair(kind, HYBRID_LAYERS)
    ids = torch.randint(1, 97, (2, 12))
    arguments = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(ids, threshold=0.0, **arguments), theirs.generate(ids, **arguments))


# --------------------------------------------------------------------------- partial RoPE


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=["default", "yarn", "linear"],
)
def test_partial_rope_is_that_of_transformers_in_another_order(factor, scaling):
    """yarn also scales cosines and sines, which must leave alone what does not rotate."""
    rope = ROPE | scaling | {"partial_rotary_factor": factor}
    config = HAMConfig(**SHAPE, head_dim=16, rope_parameters=dict(rope))
    q, k = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    positions = torch.arange(7)[None] * 5
    angles = Qwen3NextRotaryEmbedding(config)(q, positions)
    expected = apply_rotary_pos_emb(q, k, *angles, unsqueeze_dim=2)
    order = partial_rotary_order(16, int(16 * factor))
    cos, sin = HAMRotaryEmbedding(config)(q, positions)
    assert cos.shape == sin.shape == (1, 7, 16)
    found = apply_rotary_pos_emb(q[..., order], k[..., order], cos, sin, unsqueeze_dim=2)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b[..., order])
    assert sorted(order.tolist()) == list(range(16))


def test_proportional_rope_is_that_of_transformers():
    """It spreads the part over whole heads by itself, so nothing is reordered."""
    rope = ROPE | {"rope_type": "proportional", "partial_rotary_factor": 0.3}
    config = HAMConfig(**SHAPE, head_dim=16, rope_parameters=rope)
    x, positions = torch.randn(1), torch.arange(9)[None]
    found, expected = (kind(config)(x, positions) for kind in (HAMRotaryEmbedding, Qwen3NextRotaryEmbedding))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[0] == 1).all(-2)[0].tolist() == ([False] * 2 + [True] * 6) * 2


# --------------------------------------------------------------------------- linear layers by themselves


def linear_layer_loop(mixer, x):
    """A `"linear_attention"` mixer on `[T, D]`, one token and one value head at a time, in float64."""
    config, weights = mixer.config, {name: w.double() for name, w in mixer.state_dict().items()}
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    raw = torch.cat([x @ weights[f"{part}_proj.weight"].T for part in "qkv"], -1)
    taps = weights["conv.weight"]
    window = F.pad(raw, (0, 0, taps.shape[1] - 1, 0)).unfold(0, taps.shape[1], 1)
    q, k, v = F.silu((window * taps).sum(-1)).split([key_heads * key_dim] * 2 + [value_heads * value_dim], -1)
    states, out = torch.zeros(value_heads, key_dim, value_dim).double(), []
    for t in range(len(x)):
        heads = []
        for h in range(value_heads):
            key_head = h * key_heads // value_heads
            query, key = (y[t].view(key_heads, key_dim)[key_head] for y in (q, k))
            query, key = (y / (y.square().sum() + 1e-6).sqrt() for y in (query, key))
            beta = (weights["b_proj.weight"][h] @ x[t]).sigmoid() * (2 if config.allow_neg_eigval else 1)
            step = F.softplus(weights["a_proj.weight"][h] @ x[t] + weights["dt_bias"][h])
            state = states[h] * (-weights["A_log"][h].exp() * step).exp()
            value = v[t].view(value_heads, value_dim)[h]
            states[h] = state + beta * torch.outer(key, value - state.T @ key)
            read = states[h].T @ query / key_dim**0.5
            read = read / (read.square().mean() + config.output_norm_eps).sqrt() * weights["rnn_norm.weight"]
            heads.append(read)
        z = weights["z_proj.weight"] @ x[t]
        gate = z.sigmoid() if config.linear_output_gate == "sigmoid" else z * z.sigmoid()
        out.append(weights["o_proj.weight"] @ (torch.cat(heads) * gate))
    return torch.stack(out), states


@pytest.mark.parametrize("value_heads", [2, 6])
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@torch.no_grad()
def test_linear_layers_are_the_token_loop(gate, allow_neg_eigval, value_heads, tiny_config):
    shape = LINEAR | {"linear_num_value_heads": value_heads}
    config = tiny_config(
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_output_gate=gate,
        allow_neg_eigval=allow_neg_eigval,
        output_norm_eps=1e-3,
        initializer_range=0.3,
        **shape,
    )
    model = HAMForCausalLM(config).eval().double()
    mixer, seen = model.model.layers[0].mixer, {}
    mixer.rnn_norm.weight.uniform_(0.5, 1.5)
    mixer.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out[0]))
    ids = torch.randint(1, 97, (1, 75))
    cache = model(ids).cache
    expected, states = linear_layer_loop(mixer, seen["x"][0])
    # Write strengths and decays are float32 in every model. Measured: 4e-7 of up to 4.
    torch.testing.assert_close(seen["out"][0], expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(cache.layers[0].recurrent_state[0], states, atol=5e-6, rtol=0)
    if allow_neg_eigval:
        config.allow_neg_eigval = False
        model(ids)
        assert (seen["out"][0] - expected).abs().max() > 0.1, "write strengths above 1 must matter to this test"


def test_scores_stay_in_range_with_negative_eigenvalues(tiny_config):
    """A write strength of up to 2 doubles the residual, which is bounded after that."""
    for router in ("cosine", "l2", "residual", "learned_error"):
        config = tiny_config(router=router, allow_neg_eigval=True, initializer_range=0.5)
        model, ids = HAMForCausalLM(config).requires_grad_(False), torch.randint(1, 97, (2, 50))
        scores = model(ids, output_routing_scores=True).routing_scores
        assert all(((x >= 0) & (x <= 1)).all() for x in scores)
    assert max(float(x.max()) for x in scores) > 0.5


# --------------------------------------------------------------------------- caches and checkpoints


VARIANT = LINEAR | {
    "num_hidden_layers": 3,
    "layer_types": ["hybrid", "linear_attention", "full_attention"],
    "rope_parameters": PARTIAL_ROPE,
    "allow_neg_eigval": True,
    "output_gate": "sigmoid",
    "linear_output_gate": "silu",
    "zero_centered_norms": True,
    "output_norm_eps": 1e-4,
    "qk_norm": "projection",
    "attention_post_norm": True,
    "initializer_range": 0.2,
}


@pytest.fixture
def variant(tiny_config):
    return HAMForCausalLM(tiny_config(**VARIANT)).eval().requires_grad_(False)


def test_a_cache_of_these_shapes_moves_whole(variant, tmp_path):
    ids = torch.randint(1, 97, (2, 24))
    arguments = {"threshold": 0.5}
    expected = variant(ids, **arguments).logits[:, 18:]
    cache = HAMCache(variant.config)
    variant(ids[:, :18], cache=cache, **arguments)
    linear = cache.layers[1]
    channels = 2 * 2 * 8 + 6 * 12
    assert linear.conv_state.shape == (2, 3, channels)
    assert linear.recurrent_state.shape == (2, 6, 8, 12)
    assert linear.state_bytes() == 4 * 2 * (3 * channels + 6 * 8 * 12)
    assert cache.memory_bytes() >= cache.state_bytes() > linear.state_bytes()
    assert (cache.kv_usage()[1] == 0).all()
    assert 0 < cache.kv_usage()[0].mean() < 1

    cache.save(tmp_path / "cache")
    loaded = HAMCache.load(tmp_path / "cache", variant.config)
    loaded.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(
        variant(ids[:, 18:].flip(0), cache=loaded, **arguments).logits.flip(0), expected, atol=1e-4, rtol=0
    )
    # Six tokens in one piece that are taken back, then one by one.
    cache.activate_past_recording()
    variant(ids[:, :6], cache=cache, **arguments)
    cache.crop(-6)
    one_by_one = [variant(ids[:, t : t + 1], cache=cache, **arguments).logits for t in range(18, 24)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), expected, atol=1e-4, rtol=0)


def test_a_part_of_what_was_recorded_is_taken_back(variant):
    """The remaining tokens are replayed, by the keys of every value head."""
    ids = torch.randint(1, 97, (2, 24))
    cache, expected = HAMCache(variant.config), HAMCache(variant.config)
    variant(ids[:, :10], cache=cache, threshold=0.5)
    cache.activate_past_recording()
    variant(ids[:, 10:20], cache=cache, threshold=0.5)
    cache.crop(-4)
    variant(ids[:, :16], cache=expected, threshold=0.5)
    found, wanted = (variant(ids[:, 16:], cache=x, threshold=0.5).logits for x in (cache, expected))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_cache_of_other_linear_shapes_is_refused(variant, tiny_config, tmp_path):
    cache = variant(torch.randint(1, 97, (1, 9))).cache
    cache.save(tmp_path / "cache")
    other = tiny_config(**VARIANT | {"linear_num_value_heads": 2})
    with pytest.raises(ValueError, match="another configuration: `linear_num_value_heads` 6 instead of 2"):
        HAMCache.load(tmp_path / "cache", other)
    with pytest.raises(ValueError, match="`linear_num_value_heads` 6 instead of 2"):
        HAMForCausalLM(other)(torch.ones(1, 1, dtype=torch.long), cache=cache)


def test_a_checkpoint_is_bit_equal(variant, tmp_path):
    ids = torch.randint(1, 97, (2, 15))
    variant.save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_dict() == variant.config.to_dict() | {"_name_or_path": str(tmp_path)}
    weights = loaded.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in variant.state_dict().items())
    assert torch.equal(loaded(ids).logits, variant(ids).logits)


def test_every_parameter_of_these_layers_learns(variant):
    variant.requires_grad_(True).train()
    ids = torch.randint(1, 97, (2, 40))
    variant(ids, labels=ids).loss.backward()
    assert [name for name, x in variant.named_parameters() if x.grad is None or not x.grad.any()] == []
    names = {name.split(".", 3)[3] for name, _ in variant.named_parameters() if ".layers.0." in name}
    assert "input_layernorm.weight" not in names
    assert "post_feedforward_layernorm.weight" in names
    assert variant.model.layers[0].mixer.q_norm.weight.shape == (32,)
