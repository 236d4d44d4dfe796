# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The limits of HAM are known models: Gated DeltaNet, a Transformer, dense masked attention."""

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ham_hf import HAMConfig, HAMForCausalLM, mixer_ham
from ham_hf.configuration_ham import ROUTERS
from ham_hf.reference import naive_sparse_attention
from tests.model.exactness.token_loop import TokenLoop
from tests.model.exactness.wide_models import MIXED, WIDE, make_model, median_thresholds, set_gate

# --------------------------------------------------------------------------- the limit of Gated DeltaNet


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


# --------------------------------------------------------------------------- the limit of a Transformer


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


# --------------------------------------------------------------------------- sparse and dense attention in a model


@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("router", "window"), [("random", 0), ("learned", 6), ("cosine", 0), ("cosine", 6)])
def test_sparse_attention_is_dense_masked_attention_also_in_training(router, window, rows, tiny_config, monkeypatch):
    # In float64: through four layers the rounding of float32 grows to what a wrong token could hide in.
    settings = {"router": router, "attention_window": window, "attention_sinks": window // 2}
    model = make_model(tiny_config(num_hidden_layers=4, layer_types=MIXED, **settings, **WIDE)).train().double()
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

    def dense(q, k, v, keep, scores, budget, *, seq_idx, window, real):
        assert budget is None
        used["window"] += window == settings["attention_window"] > 0
        used["packed" if seq_idx is not None else "row"] += 1
        used["kept"] += int(keep.sum())
        used["seen"] += keep.numel()
        return naive_sparse_attention(q, k, v, keep, seq_idx=seq_idx, window=window, real=real)[0]

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
    assert used["window"] == (2 if window else 0)
    (logits, grads), (expected, expected_grads) = results
    real = arguments.get("attention_mask", torch.ones_like(ids)).bool()
    assert (logits - expected)[real].abs().max() < 1e-6
    assert grads.keys() == expected_grads.keys()
    assert any("mixer.k_proj" in name for name in grads)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).abs().max() < 1e-6 * max(1, grad.abs().max()), name


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_a_window_from_the_first_token_on_keeps_everything(router, tiny_config):
    """At any threshold; a window of one token is none, bit for bit."""
    ids = torch.randint(1, 97, (2, 30))

    def run(threshold, **settings):
        model = make_model(tiny_config(router=router, num_hidden_layers=4, layer_types=MIXED, **settings, **WIDE))
        prompt = model(ids[:, :20], threshold=threshold)
        steps = [model(ids[:, t : t + 1], cache=prompt.cache, threshold=threshold).logits for t in range(20, 30)]
        return torch.cat([prompt.logits, *steps], 1)

    everything = run(0.0)
    for window in (30, 31, 1000):
        torch.testing.assert_close(run(2.0, attention_window=window), everything, atol=1e-5, rtol=0)
    assert (run(2.0, attention_window=29) - everything)[:, 29].abs().max() > 1e-4
    torch.testing.assert_close(run(2.0, attention_sinks=30), everything, atol=1e-5, rtol=0)
    assert torch.equal(run(0.5, attention_window=1), run(0.5))


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
