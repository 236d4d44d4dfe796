# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Tokens seen and kept are two numbers; rows are selected, repeated and taken back with all that they hold."""

import copy

import pytest
import torch

from ham_hf import HAMCache
from ham_hf.reference import naive_gated_delta_rule_with_prediction as naive_delta_rule
from ham_hf.reference import naive_short_convolution, naive_sparse_attention
from ham_hf.routing_ham import cosine_score
from tests.cache.caches import assert_continues, assert_same, contents, feed, filled

# --- seen and kept ---------------------------------------------------------------------------------------------------


def rotated(x, theta=10000.0):
    """RoPE of `[1, T, H, K]` at positions 0 to T - 1, as a rotation of complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None].double() * theta ** (-torch.arange(half).double() / half)
    turned = (
        torch.complex(x[..., :half].double(), x[..., half:].double())
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat([turned.real, turned.imag], -1).float()


def test_positions_after_thousands_of_dropped_tokens(make_model):
    """3,000 tokens of which hardly any is kept: the logits are those of dense attention at absolute positions."""
    model = make_model(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    ids = torch.randint(1, 97, (1, 3000))
    layer = model.model.layers[0]
    mixer, x = layer.mixer, model.model.embed_tokens(ids)
    h = layer.input_layernorm(x)
    raw = torch.cat([mixer.q_proj(h), mixer.k_proj(h), mixer.v_proj(h)], -1)
    q, k, v = naive_short_convolution(raw, mixer.conv.weight)[0].unsqueeze(2).chunk(3, -1)
    unit_q, unit_k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    g = -mixer.A_log.exp() * torch.nn.functional.softplus(mixer.a_proj(h) + mixer.dt_bias)
    o_rnn, prediction, _ = naive_delta_rule(unit_q, unit_k, v, g, mixer.b_proj(h).sigmoid())
    scores = cosine_score(v, prediction)
    order = scores.flatten().sort().values
    threshold = float(order[-13:-11].mean())
    keep = scores >= threshold
    o_kv, weights = naive_sparse_attention(rotated(mixer.q_norm(q)), rotated(mixer.k_norm(k)), v, keep)
    mixed = mixer.rnn_gate_proj(h).sigmoid() * mixer.rnn_norm(o_rnn)[:, :, 0]
    mixed = mixed + mixer.kv_gate_proj(h).sigmoid() * mixer.kv_norm(o_kv)[:, :, 0]
    x = x + mixer.o_proj(mixed * torch.nn.functional.silu(mixer.z_proj(h)))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    expected = model.lm_head(model.model.norm(x))

    cache = HAMCache(model.config)
    logits = feed(model, cache, ids, (1000, 2500, *range(2980, 3000)), threshold=threshold)
    torch.testing.assert_close(logits[:, -600:], expected[:, -600:], rtol=0, atol=2e-5)
    assert cache.get_seq_length() == 3000
    assert cache.kept_positions(0)[0][0].tolist() == keep[0, :, 0].nonzero()[:, 0].tolist()
    assert int(cache.kept_tokens()) == 12
    assert weights[0, 0, -1, :-1].max() > 0.02, "the kept tokens must matter for this to show anything"


def test_tokens_seen_and_kept_are_two_numbers(model, ids, mask):
    cache = filled(model, ids, (20, 21, 22), mask, threshold=0.51)
    batch, heads, config = 3, 2, model.config
    assert cache.get_seq_length() == 60
    assert all(cache.get_seq_length(i) == 60 for i in range(4))
    assert cache.get_mask_sizes(5, 0) == (65, 0)
    assert cache.batch_size == batch
    assert cache.real_tokens.tolist() == [60, 53, 53] == mask.sum(1).tolist()

    kept = cache.kept_tokens()
    assert kept.shape == (4, batch, heads)
    assert kept.dtype == torch.int64
    assert kept[1].tolist() == [[60, 60], [53, 53], [53, 53]], "full attention keeps every real token"
    assert (kept[3] == 0).all(), "a linear layer keeps none"
    assert (kept[[0, 2]] > 0).all()
    assert (kept[[0, 2]] < cache.real_tokens[:, None]).all()
    usage = cache.kv_usage()
    assert usage.dtype == torch.float32
    torch.testing.assert_close(usage, kept / torch.tensor([60.0, 53, 53])[:, None])
    for layer in (0, 1, 2):
        positions = cache.kept_positions(layer)
        assert [[len(p) for p in row] for row in positions] == kept[layer].tolist()
        for row, real in zip(positions, cache.real_tokens.tolist(), strict=True):
            assert all((p.diff() > 0).all() and p.dtype == torch.int32 and p[0] >= 0 and p[-1] < real for p in row)
    per_token = heads * (config.head_dim + config.value_head_dim) * 4
    assert cache.full_kv_bytes() == 3 * batch * 60 * per_token, "three layers have attention"
    assert cache.state_bytes() == sum(
        x.nbytes for layer in cache.layers for x in (layer.conv_state, layer.recurrent_state) if x is not None
    )
    assert cache.state_bytes() < cache.memory_bytes()


def test_a_model_without_attention_holds_states_only(make_model, ids):
    cache = filled(make_model(layer_types=["linear_attention"] * 2), ids, threshold=None)
    assert (cache.kept_tokens() == 0).all()
    assert cache.full_kv_bytes() == 0
    assert cache.memory_bytes() <= cache.state_bytes() + 8 * 3 * 2
    with pytest.raises(ValueError, match=r"`layer_idx` 0 is a linear layer"):
        cache.kept_positions(0)


def test_the_cache_holds_no_graph(make_model, ids):
    model = make_model(router="learned").requires_grad_(True)
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, ids, (40, 41, 42))
    tensors = [x for layer in cache.layers for x in layer.tensors()]
    assert len(tensors) > 20
    assert not any(x.requires_grad for x in tensors)


def test_a_cache_filled_in_inference_mode_goes_on_outside(model, ids):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    with torch.inference_mode():
        feed(model, cache, ids[:, :20], (17, 18))
        cache.crop(-2)
    feed(model, cache, ids[:, :30], (1, 2))
    with torch.inference_mode():
        feed(model, cache, ids[:, :40], (1, 2))
    assert_same(cache, filled(model, ids[:, :40], (18,)), 1e-5)


@pytest.mark.parametrize("attention_conv", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cache_is_filled_under_autocast(make_model, ids, qk_norm, attention_conv):
    """There projections are in bfloat16, while norms, rotation and the convolution's weights widen what they touch."""
    model = make_model(qk_norm=qk_norm, attention_conv=attention_conv, layer_types=["hybrid", "full_attention"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, cache = feed(model, HAMCache(model.config), ids, threshold=0.0), HAMCache(model.config)
        parts = feed(model, cache, ids, cuts=(17, 18, 20), threshold=0.0)
    assert {store.dtype for store in cache._stores()} == {torch.float32 if attention_conv else torch.bfloat16}
    assert (parts - whole).abs().max() < 0.006  # measured: 0.002, two units of a logit near 0.5


# --- operations on rows ----------------------------------------------------------------------------------------------


ROWS = {
    "reversed": [2, 1, 0],
    "one": [1],
    "repeats": [1, 1, 0, 2, 1],
    "mask": [True, False, True],
    "same": [0, 1, 2],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
def test_selected_rows(model, ids, mask, rows, operation):
    """Selecting rows gives the cache that these rows alone would have filled."""
    rows = torch.tensor(rows)
    cache = filled(model, ids[:, :40], (30, 31), mask)
    getattr(cache, operation)(rows)
    expected = filled(model, ids[rows, :40], (30, 31), mask[rows])
    assert cache.batch_size == len(ids[rows])
    assert_continues(model, cache, expected, ids[rows], mask[rows])


def test_repeated_rows(model, ids, mask):
    cache = filled(model, ids[:, :40], mask=mask)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    assert_continues(model, cache, filled(model, ids[rows, :40], mask=mask[rows]), ids[rows], mask[rows])


def test_copies_part_ways(model, ids):
    """Repeated rows and deep copies share no memory: what one takes in afterwards the other does not see."""
    cache = filled(model, ids[:1, :40])
    other = copy.deepcopy(cache)
    before = contents(other)
    feed(model, cache, ids[:1], (1, 2))
    assert_same(other, before)
    other.batch_repeat_interleave(2)
    feed(model, other, ids[:2], range(1, 20))
    assert_same(
        other, filled(model, torch.cat([ids[:1, :40].expand(2, -1), ids[:2, 40:]], 1), (40, *range(41, 60))), 1e-5
    )


# --- taking tokens back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, pytest.param(2, marks=pytest.mark.slow), 5, 14, 15, 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("offloading", [False, True])
def test_cropped_cache_never_saw_the_tokens(model, ids, mask, removed, padded, offloading):
    """Forwards of 1, 14 and 5 tokens are recorded; any number of those tokens can be taken back."""
    mask = mask if padded else None
    if padded:
        mask[0, 30:33] = 0
    cache = HAMCache(model.config, offloading=offloading)
    feed(model, cache, ids[:, :20], mask=mask)
    cache.activate_past_recording()
    assert cache.is_croppable
    assert all(layer.record_past for layer in cache.layers)
    feed(model, cache, ids[:, :40], (1, 15), mask)
    cache.crop(-removed)

    end = 40 - removed
    expected = filled(model, ids[:, :end], (20,), mask)
    assert cache.memory_bytes() == expected.memory_bytes()
    assert cache.state_bytes() == expected.state_bytes()
    with pytest.raises(ValueError, match="recorded"):
        cache.crop(-1)
    later = ids[:, torch.cat([torch.arange(end), torch.arange(40, 60)])]
    mask = None if mask is None else mask[:, torch.cat([torch.arange(end), torch.arange(40, 60)])]
    assert_continues(model, cache, expected, later, mask)


def test_everything_can_be_taken_back(model, ids):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, ids[:, :30], (10, 11))
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    assert cache.real_tokens.tolist() == [0, 0, 0]
    assert (cache.kept_tokens() == 0).all()
    other = HAMCache(model.config)
    logits, expected = feed(model, cache, ids, (40, 41)), feed(model, other, ids, (40, 41))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert_same(cache, other, 1e-5)


def test_rounds_of_guesses_leave_no_trace(model, ids):
    """As in assisted generation: guess a few tokens, take them back, over pages and slabs; kept sets stay exact."""
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, ids[:1, :10])
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        good = 10 + i
        guess = torch.cat([ids[:1, : good + 1], torch.randint(1, 97, (1, 4), generator=generator)], 1)
        feed(model, cache, guess)
        cache.crop(-4)
    expected = HAMCache(model.config)
    feed(model, expected, ids[:1, :10])
    feed(model, expected, ids[:1, :50], range(1, 40))
    assert_continues(model, cache, expected, ids[:1])


def test_crop_makes_final(model, ids):
    cache = filled(model, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids[:, :30], (1, 2))
    before = contents(cache)
    recording = cache.memory_bytes()
    cache.crop(0)
    assert_same(cache, before)
    assert cache.memory_bytes() < recording, "what was remembered for a crop is given back"
    for removed in (-1, -10):
        with pytest.raises(ValueError, match=r"reaches past the 0 tokens recorded"):
            cache.crop(removed)
    feed(model, cache, ids[:, :32])
    cache.crop(-2)
    assert_same(cache, before, 1e-5)


def test_crop_takes_the_number_as_a_tensor_too(model, ids):
    """Transformers 5.17 gives it so in assisted generation."""
    cache = filled(model, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids[:, :25])
    cache.crop(torch.tensor(-3))
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize(
    ("removed", "error", "message"),
    [
        (-11, ValueError, r"past the 10 tokens recorded"),
        (1, ValueError, r"`tokens_to_remove` must be 0 or negative"),
        (-1.0, TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
        (True, TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
        (None, TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
        (torch.tensor([-1]), TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
    ],
)
def test_refused_crop_changes_nothing(model, ids, removed, error, message):
    cache = filled(model, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids[:, :30], (3,))
    before, size = contents(cache), cache.memory_bytes()
    with pytest.raises(error, match=message):
        cache.crop(removed)
    assert_same(cache, before)
    assert cache.memory_bytes() == size
    cache.crop(-10)
    assert_same(cache, filled(model, ids[:, :20]))


def test_reset_forgets_everything(model, ids):
    cache = filled(model, ids, (40, 41))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes() == 0
    assert not cache.is_initialized
    assert_continues(model, cache_after(model, cache, ids[:2, :40]), filled(model, ids[:2, :40]), ids[:2])


def cache_after(model, cache, ids):
    feed(model, cache, ids)
    return cache


# --- before the first token ------------------------------------------------------------------------------------------


def test_an_empty_cache(model, tmp_path):
    cache = HAMCache(model.config)
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes() == cache.state_bytes() == 0
    assert not cache.is_initialized
    assert cache.real_tokens is None
    assert cache.batch_size == -1
    assert len(cache) == 4
    for ask in (
        cache.kept_tokens,
        cache.kv_usage,
        cache.full_kv_bytes,
        lambda: cache.kept_positions(0),
        lambda: cache.prune(0.5),
        lambda: cache.save(tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match="seen no tokens yet"):
            ask()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="reaches past the 0 tokens"):
        cache.crop(-1)
    for harmless in (
        cache.reset,
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        harmless()
    assert not cache.is_initialized
