# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The exactness that the design promises: HAM's limits are known models; no cut, batch or padding changes a result."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM, mixer_ham
from ham_hf.configuration_ham import LAYER_TYPES, LEARNED_ROUTERS, ROUTERS
from ham_hf.reference import naive_sparse_attention, naive_surviving_tokens
from ham_hf.routing_ham import random_score

MIXED = ["hybrid", "linear_attention", "full_attention", "hybrid"]
# Weights far larger than a fresh model's, so that every part of a layer matters to the logits. A usual epsilon would
# blow the rounding errors of a memory that answers next to nothing up to 1e-3; with this one, results agree to 1e-5.
WIDE = {"initializer_range": 0.25, "rms_norm_eps": 1e-2}


def make_model(config, seed=0) -> HAMForCausalLM:
    """A model with random weights everywhere, also where a fresh model has ones and zeros."""
    torch.manual_seed(seed)
    model = HAMForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("bias") and "dt_bias" not in name:
                parameter.normal_(std=0.5)
            elif "error_weight" in name:
                parameter.normal_()
    return model


def set_gate(model, name, value):
    """Fixes a mixing gate of every hybrid layer to exactly 1 or 0."""
    for layer in model.model.layers:
        if layer.mixer.layer_type == "hybrid":
            gate = getattr(layer.mixer, name)
            torch.nn.init.zeros_(gate.weight)
            torch.nn.init.constant_(gate.bias, 1e4 if value else -1e4)


def kept_lists(cache, layer):
    """`{(row, head): positions}` that one layer keeps."""
    rows = cache.kept_positions(layer)
    return {(b, h): x.tolist() for b, heads in enumerate(rows) for h, x in enumerate(heads)}


# --------------------------------------------------------------------------- an independent implementation


class TokenLoop:
    """The design's table of formulas, one token and one head at a time, in float64; only the hash is the package's."""

    def __init__(self, model, thresholds=None):
        self.config = model.config
        self.weights = {name: x.double() for name, x in model.state_dict().items()}
        self.thresholds = thresholds
        layers, kv_heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        self.time = 0
        self.inputs = [[] for _ in range(layers)]
        self.states = [[0.0] * max(kv_heads, self.config.linear_num_value_heads or 0) for _ in range(layers)]
        self.kept = [[[] for _ in range(kv_heads)] for _ in range(layers)]
        self.kept_positions = [[[] for _ in range(kv_heads)] for _ in range(layers)]

    def norm(self, x, name):
        weight, eps = self.weights.get(f"{name}.weight"), self.config.rms_norm_eps
        if self.config.zero_centered_norms and not name.endswith(("rnn_norm", "kv_norm")):
            weight = None if weight is None else 1 + weight
        if name.endswith(("rnn_norm", "kv_norm")) and self.config.output_norm_eps is not None:
            eps = self.config.output_norm_eps
        return x if weight is None else weight * x / (x.square().mean() + eps).sqrt()

    def linear(self, x, name):
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def rotate(self, x):
        if self.config.rope_parameters is None:
            return x
        half = len(x) // 2
        turning = int(half * self.config.rope_parameters.get("partial_rotary_factor", 1.0))
        angle = torch.zeros(half).double()
        frequency = self.config.rope_parameters["rope_theta"] ** (-torch.arange(turning).double() / turning)
        angle[:turning] = self.time * frequency
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    def shape(self, kind):
        """Numbers of queries, keys and values, and the sizes of a key and a value."""
        c = self.config
        if kind == "linear_attention" and c.linear_num_key_heads is not None:
            numbers = (c.linear_num_key_heads, c.linear_num_key_heads, c.linear_num_value_heads)
            return *numbers, c.linear_key_head_dim, c.linear_value_head_dim
        numbers = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        return *numbers, c.head_dim, c.value_head_dim

    def heads(self, x, kind):
        queries, keys, values, key_dim, value_dim = self.shape(kind)
        parts = x.split([key_dim] * (queries + keys) + [value_dim] * values)
        return parts[:queries], parts[queries : queries + keys], parts[queries + keys :]

    def normed(self, heads, name):
        """Queries or keys through the norm of each, or of all together."""
        if self.config.qk_norm == "projection":
            return self.norm(torch.cat(heads), name).split(len(heads[0]))
        return [self.norm(head, name) for head in heads]

    def score(self, name, layer, h, x, v, prediction, beta):
        router, error = self.config.router, v - prediction
        if router == "random":
            return random_score(torch.tensor([[self.time]]), layer, self.config.num_key_value_heads)[0, 0, h].double()
        # A prediction of which decay has left next to nothing has no direction.
        cosine = (1 - v @ prediction / (v.norm() * prediction.norm()).clamp(min=1e-8)) / 2
        if router == "cosine":
            return cosine
        if router == "l2":
            return error.norm() ** 2 / (v.norm() + prediction.norm()) ** 2
        if router == "residual":
            r = beta * error.norm() / v.norm()
            return r / (1 + r)
        up = self.linear(x, f"{name}.router.up_proj")
        logit = self.linear(up * up.sigmoid(), f"{name}.router.down_proj")[h]
        if router == "learned_error":
            logit = logit + self.weights[f"{name}.router.error_weight"][h] * cosine
        return logit.sigmoid()

    def mixer(self, layer, x):
        c, name, kind = self.config, f"model.layers.{layer}.mixer", self.config.layer_types[layer]
        raw = torch.cat([self.linear(x, f"{name}.{part}_proj") for part in "qkv"])
        convolved = raw
        if kind != "full_attention" or c.attention_conv:
            self.inputs[layer].append(raw)
            weight = self.weights[f"{name}.conv.weight"]
            window = self.inputs[layer][::-1][: weight.shape[1]]
            total = sum(weight[:, -1 - age] * past for age, past in enumerate(window))
            convolved = total * total.sigmoid()
        q, k, v = self.heads(convolved, kind)
        q_kv, k_kv, v_kv = self.heads(convolved if c.attention_conv else raw, kind)
        if kind != "linear_attention":
            q_kv, k_kv = self.normed(q_kv, f"{name}.q_norm"), self.normed(k_kv, f"{name}.k_norm")
        outs = max(len(q), len(v))
        outputs = []
        for h in range(len(v)):
            score = 1.0
            if kind != "full_attention":
                key = k[h * len(k) // len(v)]
                key = key / (key.square().sum() + 1e-6).sqrt()
                beta = self.linear(x, f"{name}.b_proj")[h].sigmoid() * (2 if c.allow_neg_eigval else 1)
                step = torch.log1p(torch.exp(self.linear(x, f"{name}.a_proj")[h] + self.weights[f"{name}.dt_bias"][h]))
                alpha = torch.exp(-torch.exp(self.weights[f"{name}.A_log"][h]) * step)
                state = self.states[layer][h] + torch.zeros(len(key), len(v[h])).double()
                prediction = alpha * (state.T @ key)
                self.states[layer][h] = alpha * state + beta * torch.outer(key, v[h] - prediction)
                if kind == "hybrid":
                    score = self.score(name, layer, h, x, v[h], prediction, beta)
            if kind != "linear_attention":
                value = v_kv[h] * score if kind == "hybrid" and c.router in LEARNED_ROUTERS else v_kv[h]
                own = (self.rotate(k_kv[h]), value)
                visible = [*self.kept[layer][h], own]
                if kind == "full_attention" or score >= self.thresholds[layer][h]:
                    self.kept[layer][h].append(own)
                    self.kept_positions[layer][h].append(self.time)
            for head in range(h * outs // len(v), (h + 1) * outs // len(v)):
                o_rnn = o_kv = None
                if kind != "full_attention":
                    query = q[head * len(q) // outs]
                    query = query / (query.square().sum() + 1e-6).sqrt()
                    o_rnn = self.norm(self.states[layer][h].T @ query / math.sqrt(len(query)), f"{name}.rnn_norm")
                if kind != "linear_attention":
                    query = self.rotate(q_kv[head])
                    logits = torch.stack([query @ key for key, _ in visible]) / math.sqrt(c.head_dim)
                    o_kv = sum(w * value for w, (_, value) in zip(logits.softmax(0), visible, strict=True))
                    o_kv = self.norm(o_kv, f"{name}.kv_norm")
                if kind == "hybrid":
                    g_rnn = self.linear(x, f"{name}.rnn_gate_proj")[head].sigmoid()
                    g_kv = self.linear(x, f"{name}.kv_gate_proj")[head].sigmoid()
                    outputs.append(g_rnn * o_rnn + g_kv * o_kv)
                else:
                    outputs.append(o_kv if o_rnn is None else o_rnn)
        y = torch.cat(outputs)
        gate = c.output_gate
        if kind == "linear_attention" and c.linear_output_gate is not None:
            gate = c.linear_output_gate
        if gate:
            z = self.linear(x, f"{name}.z_proj")
            y = y * z.sigmoid() * (1 if gate == "sigmoid" else z)
        return self.linear(y, f"{name}.o_proj")

    def mlp(self, x, name):
        gate = self.linear(x, f"{name}.mlp.gate_proj")
        return self.linear(gate * gate.sigmoid() * self.linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def step(self, token):
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            if self.config.attention_post_norm and self.config.layer_types[layer] != "linear_attention":
                x = x + self.norm(self.mixer(layer, x), f"{name}.post_attention_layernorm")
                x = x + self.norm(self.mlp(x, name), f"{name}.post_feedforward_layernorm")
                continue
            x = x + self.mixer(layer, self.norm(x, f"{name}.input_layernorm"))
            x = x + self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), name)
        self.time += 1
        return self.weights["lm_head.weight"] @ self.norm(x, "model.norm")

    def run(self, tokens):
        with torch.no_grad():
            return torch.stack([self.step(token) for token in tokens])


def median_thresholds(model, ids):
    """`[layers, heads]` thresholds that divide the scores of every head, none of them close to one."""
    scores = model(ids, output_routing_scores=True, threshold=0.5).routing_scores
    scores = torch.stack([x.flatten(0, 1).sort(0).values for x in scores])
    gaps = scores.diff(dim=1)[:, len(scores[0]) // 4 : -len(scores[0]) // 4]
    at = gaps.argmax(1, keepdim=True) + len(scores[0]) // 4
    return (scores.gather(1, at) + scores.gather(1, at + 1))[:, 0] / 2


@pytest.mark.parametrize("switches", ["default", "bare", "biased", "borrowed"])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_model_is_the_design(router, switches, tiny_config):
    overrides = {
        "default": {},
        "bare": {
            "attention_conv": False,
            "qk_norm": False,
            "rnn_output_norm": False,
            "kv_output_norm": False,
            "output_gate": False,
            "rope_parameters": None,
        },
        "biased": {"attention_bias": True, "mlp_bias": True, "value_head_dim": 6, "conv_kernel_size": 2},
        "borrowed": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 7,
            "allow_neg_eigval": True,
            "output_gate": "sigmoid",
            "linear_output_gate": "silu",
            "zero_centered_norms": True,
            "output_norm_eps": 5e-2,
            "qk_norm": "projection",
            "attention_post_norm": True,
        },
    }[switches]
    config = tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED, **WIDE, **overrides)
    model = make_model(config)
    ids = torch.randint(1, 97, (1, 40))
    limits = median_thresholds(model, ids)
    loop = TokenLoop(model, {0: limits[0], 3: limits[1]})
    expected = loop.run(ids[0])
    output = model(ids, threshold=limits[:, None])
    assert (output.logits[0] - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
    for layer in (0, 2, 3):
        kept = [x.tolist() for x in output.cache.kept_positions(layer)[0]]
        assert kept == loop.kept_positions[layer]
    usage = output.cache.kv_usage()
    assert (usage[2] == 1).all()
    assert ((usage[[0, 3]] > 0.05) & (usage[[0, 3]] < 0.95)).all(), "the thresholds must divide the tokens"


# --------------------------------------------------------------------------- 1. the limit of Gated DeltaNet


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("gate", [True, False], ids=["open RNN gate", "learned RNN gate"])
def test_nothing_kept_and_a_shut_kv_gate_is_gated_deltanet(gate, heads, tiny_config):
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 8, **WIDE}
    model = make_model(tiny_config(**shape))
    set_gate(model, "kv_gate_proj", 0)
    if gate:
        set_gate(model, "rnn_gate_proj", 1)
    ids = torch.randint(1, 97, (2, 70))
    output = model(ids, threshold=2.0)
    assert output.cache.kept_tokens().sum() == 0
    if not gate:
        # The loop knows the gate, but its KV memory is switched off as well: it must not matter what it would hold.
        expected = torch.stack([TokenLoop(model, torch.full((2, heads[1]), 2.0)).run(row) for row in ids])
        assert (output.logits - expected).abs().max() < 1e-4
        return
    gdn = HAMForCausalLM(tiny_config(layer_types=["linear_attention"] * 2, **shape)).eval()
    missing, unexpected = gdn.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(
        any(x in name for x in ("router", "gate_proj", "threshold", "q_norm", "k_norm", "kv_norm", "quantiles"))
        for name in unexpected
    )
    expected = torch.stack([TokenLoop(gdn).run(row) for row in ids])
    assert (output.logits - expected).abs().max() < 1e-4
    assert torch.equal(gdn(ids).logits, output.logits)
    # What the KV gate shuts out may be anything, also everything.
    assert torch.equal(model(ids, threshold=0.0).logits, output.logits)


# --------------------------------------------------------------------------- 2. the limit of a Transformer

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def transformer_pair(kind, rope, layer_types=None, **overrides):
    """A model of Transformers and a HAM model with its weights."""
    shape = {
        **WIDE,
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32 if rope == "dynamic" else 256,
        "rope_parameters": ROPES[rope],
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **overrides,
    }
    if kind == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    switches = dict.fromkeys(("rnn_output_norm", "kv_output_norm", "output_gate", "attention_conv"), False)
    config = HAMConfig(**shape, qk_norm=kind == "qwen3", layer_types=layer_types, **switches)
    ours = HAMForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_()
    weights = {name.replace("self_attn", "mixer"): x for name, x in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    rnn = ("conv", "a_proj", "b_proj", "A_log", "dt_bias", "gate_proj", "router", "threshold", "quantiles")
    assert all(any(part in name for part in rnn) for name in missing)
    set_gate(ours, "rnn_gate_proj", 0)
    set_gate(ours, "kv_gate_proj", 1)
    return theirs, ours


LAYERS = pytest.mark.parametrize(
    "layer_types",
    [["hybrid"] * 2, ["full_attention"] * 2, ["full_attention", "hybrid"]],
    ids=["hybrid", "full", "mixed"],
)


@LAYERS
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_everything_kept_and_a_shut_rnn_gate_is_a_transformer(kind, rope, layer_types):
    theirs, ours = transformer_pair(kind, rope, layer_types)
    ids = torch.randint(1, 97, (2, 60))
    expected = theirs(ids).logits
    output = ours(ids, threshold=0.0)
    assert (output.logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert (output.cache.kv_usage() == 1).all()
    if rope == "default" and "hybrid" in layer_types:
        assert (ours(ids, threshold=2.0).logits - expected).abs().max() > 0.1, "the threshold must matter to this test"


@pytest.mark.parametrize(
    "overrides", [{"attention_bias": True}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_variants_of_a_transformer(kind, overrides):
    theirs, ours = transformer_pair(kind, "default", **overrides)
    ids = torch.randint(1, 97, (2, 30))
    expected = theirs(ids).logits
    assert (ours(ids, threshold=-1.0).logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@LAYERS
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_transformer_limit_writes_the_same_text(kind, layer_types):
    theirs, ours = transformer_pair(kind, "llama3", layer_types)
    ids = torch.randint(2, 97, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[1, :5] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = theirs.generate(ids, **arguments)
    assert expected.shape == (3, 32)
    assert torch.equal(ours.generate(ids, threshold=0.0, **arguments), expected)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        ours.generate(ids, threshold=0.0, **arguments, **beams), theirs.generate(ids, **arguments, **beams)
    )


# --------------------------------------------------------------------------- 3. sparse and dense attention in a model


@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
@pytest.mark.parametrize("router", ["random", "learned", "cosine"])
def test_sparse_attention_is_dense_masked_attention_also_in_training(router, rows, tiny_config, monkeypatch):
    # In float64: through four layers the rounding of float32 grows to what a wrong token could hide in.
    model = make_model(tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED, **WIDE)).train().double()
    ids = torch.randint(1, 97, (3, 50))
    threshold = median_thresholds(model, ids)[:, None]
    arguments = {"threshold": threshold, "use_cache": False}
    labels = ids.clone()
    if rows == "padded":
        arguments["attention_mask"] = torch.rand(3, 50).ge(0.3).long()
        labels = labels.masked_fill(arguments["attention_mask"] == 0, -100)
    if rows == "packed":
        arguments["position_ids"] = torch.cat([torch.arange(n) for n in (20, 1, 29)]).expand(3, -1)
    used = Counter()
    sparse = mixer_ham.attend_new

    def dense(q, k, v, keep, scores, budget=None, cached=None, seq_idx=None):
        assert budget is None
        assert cached is None
        used["packed" if seq_idx is not None else "row"] += 1
        used["kept"] += int(keep.sum())
        used["seen"] += keep.numel()
        return naive_sparse_attention(q, k, v, keep, seq_idx=seq_idx)[0]

    results = []
    for attention in (sparse, dense):
        monkeypatch.setattr(mixer_ham, "attend_new", attention)
        model.zero_grad()
        output = model(ids, labels=labels, **arguments)
        output.loss.backward()
        results.append(
            (output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    assert used["packed" if rows == "packed" else "row"] == 3
    assert 0.3 < used["kept"] / used["seen"] < 0.9
    (logits, grads), (expected, expected_grads) = results
    real = arguments.get("attention_mask", torch.ones_like(ids)).bool()
    assert (logits - expected)[real].abs().max() < 1e-6
    assert grads.keys() == expected_grads.keys()
    assert any("mixer.k_proj" in name for name in grads)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() < 1e-6 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_those_of_llama_also_under_autocast(dtype):
    norm, llama = mixer_ham.HAMRMSNorm(24, 1e-6), LlamaRMSNorm(24, 1e-6)
    llama.weight = norm.weight = torch.nn.Parameter(torch.randn(24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, 5, 24).to(dtype)
        found, expected = norm(x), llama(x)
    assert found.dtype == expected.dtype == torch.float32
    # The one rounds the normalised input to its dtype, the other only what it gives.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# --------------------------------------------------------------------------- 4. no cut, batch or padding matters

# Reproducible: the same examples on every machine, none remembered.
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
MARGIN = (
    5e-5  # what rounding may do to a score or a logit; a score this close to its threshold may fall on either side
)


def exact(scores):
    """Scores that no rounding touches: those of tokens of which nothing was predicted."""
    return (scores == 0.5) | (scores == 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@dataclass
class Case:
    """A model, rows of tokens of different lengths, and how they are thresholded."""

    model: HAMForCausalLM
    rows: list[torch.Tensor]
    thresholds: torch.Tensor  # [hybrid layers, rows, heads]
    argument: object  # the same as given to the model

    def _repr_pretty_(self, printer, cycle):
        """What Hypothesis prints of a failing example."""
        lengths = [len(x) for x in self.rows]
        printer.text(f"Case({lengths=}, threshold={self.argument}, config={self.model.config.to_diff_dict()})")

    @property
    def hybrid(self):
        return [i for i, kind in enumerate(self.model.config.layer_types) if kind == "hybrid"]

    @property
    def keeping(self):
        return [i for i, kind in enumerate(self.model.config.layer_types) if kind != "linear_attention"]

    def alone(self, row, **arguments):
        """The row in one unpadded call, which every other way must agree with; unsure decisions end the example."""
        limit = self.thresholds[:, row : row + 1]
        argument = {"threshold": limit} if self.argument is not None else {}
        output = self.model(self.rows[row][None], output_routing_scores=True, **argument, **arguments)
        if self.model.config.router != "random":
            for scores, tau in zip(output.routing_scores or (), limit, strict=True):
                assume(not (((scores - tau).abs() < MARGIN) & ~exact(scores)).any())
        return output


MIXES = [
    ["hybrid"],
    ["hybrid", "hybrid"],
    ["linear_attention", "hybrid"],
    ["full_attention", "hybrid"],
    ["hybrid", "linear_attention", "hybrid"],
    ["hybrid", "hybrid", "full_attention"],
    ["full_attention", "linear_attention"],
]
# Parts of layers that other families have; heads of linear layers must fit those of no other layer.
BORROWED = {
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "shapes": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "linear_output_gate": "silu",
    },
    "eigenvalues": {"allow_neg_eigval": True},
    "gates": {"output_gate": "sigmoid", "output_norm_eps": 5e-2},
    "norms": {"qk_norm": "projection", "zero_centered_norms": True, "attention_post_norm": True},
}
# Drawn from lists rather than ranges: Hypothesis would try the ends of a range, one token, most of the time.
LENGTHS = [1, 2, 3, 5, 8, 13, 17, 21, 30]
THRESHOLD_FORMS = ("number", "list", "rows", "everything", "learned")


@st.composite
def cases(draw, min_rows=1, max_rows=3, forms=THRESHOLD_FORMS):
    layers = draw(st.sampled_from(MIXES))
    kv_heads, groups = draw(st.sampled_from([(2, 2), (1, 1), (2, 1), (1, 3)]))
    switches = ("attention_conv", "qk_norm", "kv_output_norm", "output_gate")
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "value_head_dim": draw(st.sampled_from([8, 5])),
        "layer_types": layers,
        "router": draw(st.sampled_from(ROUTERS)),
        "conv_kernel_size": draw(st.sampled_from([4, 1, 2])),
        "rope_parameters": draw(st.sampled_from([{"rope_type": "default", "rope_theta": 100.0}, None])),
        "pad_token_id": 0,
        **dict.fromkeys(draw(st.lists(st.sampled_from(switches), max_size=2)), False),
        **WIDE,
    }
    for part in draw(st.lists(st.sampled_from(sorted(BORROWED)), max_size=2)):
        settings |= BORROWED[part]
    config = HAMConfig(**settings)
    model = make_model(config, seed=draw(st.integers(0, 1000)))
    seed = draw(st.integers(0, 1000))
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=min_rows, max_size=max_rows))
    lengths[0] += draw(st.sampled_from([0, 0, 66]))  # 66: beyond one chunk of the RNN
    rows = [torch.randint(1, 97, (n,), generator=generator(seed + i)) for i, n in enumerate(lengths)]

    # Thresholds at a quantile of the scores, with some that keep everything or nothing.
    shape = (config.num_hybrid_layers, len(rows), kv_heads)
    quantile, spread = draw(st.floats(0.1, 0.9)), draw(st.sampled_from([0.0, 0.3]))
    with torch.no_grad():
        scores = model(
            torch.cat(rows)[None], threshold=0.5, output_routing_scores=True, use_cache=False
        ).routing_scores
    limits = torch.zeros(shape)
    for n, x in enumerate(scores or ()):
        level = (quantile + spread * (torch.rand(shape[1:], generator=generator(seed)) - 0.5)).clamp(0, 1)
        limits[n] = torch.quantile(x.flatten(), level.flatten()).view(shape[1:]) + 1e-4
    extreme = draw(st.sampled_from([None, None, None, -1.0, 0.0, 0.5, 1.5]))
    if extreme is not None:
        limits[:, 0] = extreme
    form = draw(st.sampled_from(forms)) if config.num_hybrid_layers else "number"
    argument = {
        "number": lambda: float(limits.mean()) if limits.numel() else 0.5,
        "list": lambda: limits.mean((1, 2)).tolist(),
        "rows": lambda: limits.mean((0, 2)),
        "everything": lambda: limits,
        "learned": lambda: None,
    }[form]()
    if form == "number":
        limits = torch.full(shape, argument)
    elif form == "list":
        limits = torch.tensor(argument)[:, None, None].expand(shape)
    elif form == "rows":
        limits = argument[None, :, None].expand(shape)
    elif form == "learned":
        limits = limits[:, :1].expand(shape)
        hybrid = (layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid")
        for mixer, limit in zip(hybrid, limits, strict=True):
            mixer.threshold.data.copy_(limit[0])
    event(f"{form} {config.router}")
    return Case(model, rows, limits, argument)


@dataclass
class Call:
    """One forward: which columns hold a real token, `[B, T]`."""

    real: torch.Tensor


@st.composite
def calls(draw, lengths):
    """Cuts rows of the given lengths into calls: whole, chunks, single steps or turns, each with its own padding."""
    style = draw(st.sampled_from(["whole", "steps", "chunks", "turns", "prompt and steps"]))
    longest = max(lengths)
    if style == "whole":
        counts = [lengths]
    elif style == "steps":
        counts = [[int(t < n) for n in lengths] for t in range(longest)]
    elif style == "prompt and steps":
        prompt = draw(st.integers(1, longest))
        counts = [[min(n, prompt) for n in lengths]]
        counts += [[int(t < n) for n in lengths] for t in range(prompt, longest)]
    else:
        # Chunks cut all rows at the same token; in turns every row says as much as it likes, or nothing.
        pieces = draw(st.integers(2, 4))
        cuts = [sorted(draw(st.lists(st.integers(0, n), min_size=pieces, max_size=pieces))) for n in lengths]
        if style == "chunks":
            cuts = [[min(cut, n) for cut in cuts[0]] for n in lengths]
        edges = [[0, *cut, n] for cut, n in zip(cuts, lengths, strict=True)]
        counts = [[row[i + 1] - row[i] for row in edges] for i in range(pieces + 1)]
    counts = [x for x in counts if max(x)]
    placement = draw(st.sampled_from(["left", "right", "anywhere"]))
    extra = draw(st.integers(0, 2)) if style != "steps" else 0
    result = []
    for i, numbers in enumerate(counts):
        width = max(numbers) + (extra if i == 0 else 0)
        real = torch.zeros(len(lengths), width, dtype=torch.bool)
        for row, n in enumerate(numbers):
            columns = (
                torch.randperm(width, generator=generator(draw(st.integers(0, 99))))
                if placement == "anywhere"
                else None
            )
            if placement == "left":
                real[row, width - n :] = True
            elif placement == "right":
                real[row, :n] = True
            else:
                real[row, columns[:n]] = True
        result.append(Call(real))
    return result


def run_calls(case, plan, give_positions, **arguments):
    """Feeds the rows through a cache call by call; returns the cache, and per row its real logits and scores."""
    cache, done = HAMCache(case.model.config), [0] * len(case.rows)
    logits = [[] for _ in case.rows]
    scores = [[] for _ in case.rows]
    masks = torch.cat([call.real for call in plan], 1)
    seen = 0
    for call in plan:
        width = call.real.shape[1]
        ids = torch.zeros(call.real.shape, dtype=torch.long)
        for row, tokens in enumerate(case.rows):
            n = int(call.real[row].sum())
            ids[row, call.real[row]] = tokens[done[row] : done[row] + n]
            done[row] += n
        inputs = {"attention_mask": masks[:, : seen + width].long()}
        if bool(masks[:, : seen + width].all()) and not give_positions:
            inputs = {}  # no mask at all, as users who pad nothing do
        if give_positions:
            inputs["position_ids"] = (masks.cumsum(1) - 1).clamp(min=0)[:, seen : seen + width]
        output = case.model(
            ids, cache=cache, output_routing_scores=True, threshold=case.argument, **inputs, **arguments
        )
        for row in range(len(case.rows)):
            logits[row].append(output.logits[row, call.real[row]])
            if output.routing_scores:
                scores[row].append(torch.stack(output.routing_scores)[:, row, call.real[row]])
        seen += width
    assert done == [len(x) for x in case.rows]
    assert cache.get_seq_length() == seen
    assert cache.real_tokens.tolist() == done
    return cache, [torch.cat(x) for x in logits], [torch.cat(x, 1) if x else None for x in scores]


def contiguous(masks):
    """Whether each row's real tokens are neighbours: padding then only shifts positions, which RoPE does not see."""
    return all(bool((row.nonzero()[:, 0].diff() == 1).all()) for row in masks)


@torch.no_grad()
def assert_as_alone(case, plan, give_positions, **arguments):
    cache, logits, scores = run_calls(case, plan, give_positions, **arguments)
    for row in range(len(case.rows)):
        expected = case.alone(row, **arguments)
        scale = max(1, expected.logits.abs().max())
        assert (logits[row] - expected.logits[0]).abs().max() < MARGIN * scale, f"logits of row {row}"
        if scores[row] is not None:
            assert (scores[row] - torch.stack(expected.routing_scores)[:, 0]).abs().max() < MARGIN
        for layer in case.keeping:
            kept = kept_lists(cache, layer)
            for (_, head), positions in kept_lists(expected.cache, layer).items():
                assert kept[row, head] == positions, f"layer {layer}, row {row}, head {head}"
    return cache


def borrowed(config):
    """Which of `BORROWED` a configuration has, where a layer has a use for it."""
    return {
        part
        for part, settings in BORROWED.items()
        if all(getattr(config, name) == value for name, value in settings.items())
        and (part != "shapes" or "linear_attention" in config.layer_types)
    }


def test_rows_do_not_depend_on_their_batch_padding_thresholds_or_cuts():
    taken = Counter()

    @settings(PROPERTY, max_examples=300)
    @given(st.data())
    def check(data):
        case = data.draw(cases())
        plan = data.draw(calls([len(x) for x in case.rows]))
        masks = torch.cat([call.real for call in plan], 1)
        positions = not contiguous(masks) or data.draw(st.booleans())
        cache = assert_as_alone(case, plan, positions)
        taken[case.model.config.router] += 1
        taken.update(set(case.model.config.layer_types))
        taken["step"] += any(call.real.shape[1] == 1 for call in plan[1:])
        taken["step of a padded row"] += any(call.real.shape[1] == 1 and not call.real.all() for call in plan[1:])
        taken["chunk onto a cache"] += any(call.real.shape[1] > 1 for call in plan[1:])
        taken["padding inside"] += not contiguous(masks)
        taken["padding outside"] += contiguous(masks) and not bool(masks.all())
        taken["no padding"] += bool(masks.all())
        taken["no positions"] += not positions
        taken["several rows"] += len(case.rows) > 1
        taken["several chunks"] += max(call.real.shape[1] for call in plan) > 64
        taken[f"{type(case.argument).__name__} threshold"] += 1
        taken.update(borrowed(case.model.config))
        usage = cache.kv_usage()[case.hybrid]
        taken["some kept"] += bool(((usage > 0) & (usage < 1)).any())

    check()
    wanted = {*ROUTERS, *LAYER_TYPES, "step", "step of a padded row", "chunk onto a cache", "padding inside"}
    wanted |= {"padding outside", "no padding", "no positions", "several rows", "several chunks"}
    wanted |= {f"{x} threshold" for x in ("float", "list", "Tensor", "NoneType")} | BORROWED.keys()
    assert all(taken[x] >= 3 for x in wanted), taken
    assert taken["some kept"] >= 60, taken


def test_packed_documents_equal_documents_alone():
    taken = Counter()

    @settings(PROPERTY, max_examples=60)
    @given(st.data())
    @torch.no_grad()
    def check(data):
        case = data.draw(cases(min_rows=2, max_rows=4, forms=("number", "list", "learned")))
        way = data.draw(st.sampled_from(["position_ids", "cu_seq_lens_q", "seq_idx", "padded position_ids"]))
        copies = 1 if way == "cu_seq_lens_q" else data.draw(st.integers(1, 2))
        orders = [list(range(len(case.rows)))[:: 1 if b == 0 else -1] for b in range(copies)]
        ids = torch.stack([torch.cat([case.rows[i] for i in order]) for order in orders])
        lengths = [torch.tensor([len(case.rows[i]) for i in order]) for order in orders]
        positions = torch.stack([torch.cat([torch.arange(n) for n in x.tolist()]) for x in lengths])
        documents = torch.stack([torch.arange(len(x)).repeat_interleave(x) for x in lengths])
        arguments = {"position_ids": positions}
        if way == "cu_seq_lens_q":
            # As Transformers' collator gives them: with position ids.
            arguments["cu_seq_lens_q"] = torch.cat([torch.zeros(1, dtype=torch.long), lengths[0].cumsum(0)])
        elif way == "seq_idx":
            arguments["seq_idx"] = documents
        elif way == "padded position_ids":
            pad = torch.zeros(copies, 3, dtype=torch.long)
            ids = torch.cat([pad, ids, pad], 1)
            arguments = {
                "position_ids": torch.cat([pad, positions, positions[:, -1:] + 1 + torch.arange(3)], 1),
                "attention_mask": torch.cat([pad, torch.ones_like(positions), pad], 1),
            }
        threshold = case.argument
        output = case.model(ids, threshold=threshold, output_routing_scores=True, **arguments)
        assert output.cache is None
        offset = 3 if way == "padded position_ids" else 0
        for b, order in enumerate(orders):
            start = offset
            for row in order:
                expected = case.alone(row)
                part = slice(start, start + len(case.rows[row]))
                scale = max(1, expected.logits.abs().max())
                assert (output.logits[b, part] - expected.logits[0]).abs().max() < MARGIN * scale
                for x, y in zip(output.routing_scores or (), expected.routing_scores or (), strict=True):
                    assert (x[b, part] - y[0]).abs().max() < MARGIN
                start = part.stop
        taken[way] += 1
        taken["hybrid"] += bool(case.hybrid)
        taken["several chunks"] += ids.shape[1] > 64

    check()
    assert all(taken[x] >= 2 for x in ("position_ids", "cu_seq_lens_q", "seq_idx", "padded position_ids")), taken
    assert taken["hybrid"] >= 5, taken
    assert taken["several chunks"] >= 2, taken


def test_a_budget_keeps_the_same_tokens_however_they_arrive():
    taken = Counter()

    @settings(PROPERTY, max_examples=60)
    @given(st.data())
    @torch.no_grad()
    def check(data):
        case = data.draw(cases(max_rows=2))
        budget = data.draw(st.integers(1, 12))
        plan = data.draw(calls([len(x) for x in case.rows]))
        masks = torch.cat([call.real for call in plan], 1)
        references = [case.alone(row, kv_budget=budget) for row in range(len(case.rows))]
        for row, reference in enumerate(references):
            for n, layer in enumerate(case.hybrid):
                scores = reference.routing_scores[n][0]
                if case.model.config.router != "random":  # near ties may fall either way; exact ones may not
                    gaps = scores.sort(0).values.diff(dim=0)
                    assume(not ((gaps < MARGIN / 10) & ~exact(scores.sort(0).values[1:])).any())
                for (_, head), positions in kept_lists(reference.cache, layer).items():
                    admitted = scores[:, head] >= case.thresholds[n, row, head]
                    survivors = naive_surviving_tokens(scores[:, head], admitted, budget)[-1].nonzero()[:, 0]
                    assert positions == survivors.tolist()
                    taken["evicted"] += int(admitted.sum()) > budget
        cache = assert_as_alone(case, plan, not contiguous(masks) or data.draw(st.booleans()), kv_budget=budget)
        for layer in case.hybrid:
            assert cache.kept_tokens()[layer].max() <= budget
        for name, wanted in (("steps", lambda n: n == 1), ("chunks", lambda n: n > 1)):
            taken[name] += bool(case.hybrid) and any(wanted(call.real.shape[1]) for call in plan[1:])
        taken["full attention"] += "full_attention" in case.model.config.layer_types

    check()
    assert taken["evicted"] >= 20, taken
    assert all(taken[x] >= 2 for x in ("steps", "chunks", "full attention")), taken


@pytest.mark.parametrize("length", [5, 40])
def test_rows_at_different_thresholds_write_what_they_write_alone(length, tiny_config):
    model = make_model(tiny_config(num_hidden_layers=3, layer_types=["hybrid", "linear_attention", "hybrid"], **WIDE))
    ids = torch.randint(1, 97, (4, length))
    thresholds = torch.tensor([-1.0, 0.45, 0.55, 2.0])
    cache = HAMCache(model.config)
    arguments = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, threshold=thresholds, cache=cache, **arguments)
    for row in range(4):
        own = HAMCache(model.config)
        alone = model.generate(ids[row : row + 1], threshold=float(thresholds[row]), cache=own, **arguments)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(own.kept_tokens()[:, 0], cache.kept_tokens()[:, row])
    usage = cache.kv_usage()[[0, 2]].mean((0, 2))
    assert usage[0] == 1
    assert usage[3] == 0
    assert 0 < usage[2] < usage[1] < 1


# --------------------------------------------------------------------------- 5. saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_model_comes_back_bit_equal(router, dtype, tiny_config, tmp_path):
    config = tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED, attention_bias=True, **WIDE)
    model = make_model(config)
    for layer in model.model.layers:
        mixer = layer.mixer
        if mixer.layer_type == "hybrid":
            mixer.threshold.data.uniform_(0.3, 0.7)
            mixer.score_quantiles.copy_(torch.rand_like(mixer.score_quantiles).sort(-1).values)
    model.save_pretrained(tmp_path / "first")
    model = HAMForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype).eval()
    model.save_pretrained(tmp_path / "second")
    loaded = HAMForCausalLM.from_pretrained(tmp_path / "second", dtype=dtype).eval()

    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, x in expected.items():
        assert state[name].dtype == x.dtype, name
        assert torch.equal(state[name], x), name
    single = ("threshold", "A_log", "dt_bias", "score_quantiles")
    assert all(state[name].dtype == torch.float32 for name in state if name.endswith(single))
    assert {name.rsplit(".", 1)[-1] for name in state if name.endswith(single)} == set(single)
    assert state["lm_head.weight"].dtype == dtype
    different = {"_name_or_path"}
    mine, theirs = loaded.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in mine.items() if k not in different} == {
        k: v for k, v in theirs.items() if k not in different
    }

    ids = torch.randint(1, 97, (2, 30))
    for arguments in ({}, {"threshold": 0.4}, {"kv_usage": 0.3}, {"kv_budget": 3}):
        actual, wanted = (m(ids, output_routing_scores=True, **arguments) for m in (loaded, model))
        assert torch.equal(actual.logits, wanted.logits)
        assert all(torch.equal(x, y) for x, y in zip(actual.routing_scores, wanted.routing_scores, strict=True))
        for layer, (row, head) in itertools.product((0, 2, 3), itertools.product(range(2), range(2))):
            kept = [m.cache.kept_positions(layer)[row][head] for m in (actual, wanted)]
            assert torch.equal(*kept)


def test_padding_between_packed_documents_hides_no_border(tiny_config):
    model = make_model(tiny_config(**WIDE))
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 0, 0, 1, 2]])
    ids = torch.randint(1, 97, (1, 8))
    packed = model(ids, attention_mask=mask, position_ids=positions, threshold=0.4, use_cache=False).logits
    alone = model(ids[:, 5:], threshold=0.4, use_cache=False).logits
    assert torch.allclose(packed[:, 5:], alone, atol=1e-5)


def test_padding_moves_no_position_when_none_are_given(tiny_config):
    """A right-padded prompt that goes on through the cache, without `position_ids`."""
    model = make_model(tiny_config(**WIDE))
    ids = torch.randint(1, 97, (1, 14))
    padded = torch.cat([ids[:, :8], torch.zeros(1, 3, dtype=torch.long), ids[:, 8:]], 1)
    mask = (padded != 0).long()
    cache = HAMCache(model.config)
    model(padded[:, :11], attention_mask=mask[:, :11], cache=cache, threshold=0.4)
    later = model(padded[:, 11:], attention_mask=mask, cache=cache, threshold=0.4).logits
    assert torch.allclose(later, model(ids, threshold=0.4, use_cache=False).logits[:, 8:], atol=1e-5)
