# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""All that one token does to a layer before and after it reads the kept keys, a launch each, in place.

A program has one stream, a row's key/value head with the query heads that share it: their channels of the convolution,
their float32 state and their open page belong to no other program, so all are updated where they lie. At head
dimension 128 the first launch reads and writes 64 KiB of state a stream, beside which everything else is small. The
second one appends the token: attention, which reads the store in between, must not see it twice. All that streams
share is the number of full pages, which each adds 1 to when its page is full; in which order they do so shows nowhere,
because pages are found by owner and rank.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .ragged_decode_attention import SLAB_FIELDS
from .tuning import check_platform

# How a token's routing score comes about: from the state's prediction, as it is handed in, or from both.
SCORES = ("cosine", "l2", "residual", "given", "learned_error")
GATE_ACTIVATIONS = ("silu", "sigmoid")
# Elements of the state that a program of 8 warps holds at once, 32 a thread.
STATE_TILE = 8192
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What the append knows of a slab: where its scores and positions lie, too.
APPEND_FIELDS = SLAB_FIELDS + 2
# Slabs that a program looks through at once for the one of a free page.
SLAB_BLOCK = 64
L2_EPS = tl.constexpr(1e-6)
COSINE_EPS = tl.constexpr(1e-8)


@triton.jit
def _convolved(raw, conv_state, conv_weight, channel, mask, C: tl.constexpr, W: tl.constexpr):
    """Causal convolution and SiLU of some channels of a row, rounded as a tensor of its own would be."""
    x = tl.load(raw + channel, mask=mask, other=0.0).to(tl.float32)
    x *= tl.load(conv_weight + channel * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        tap = tl.load(conv_state + i * C + channel, mask=mask, other=0.0).to(tl.float32)
        x += tap * tl.load(conv_weight + channel * W + i, mask=mask, other=0.0).to(tl.float32)
    return (x * tl.sigmoid(x)).to(raw.dtype.element_ty).to(tl.float32)


@triton.jit
def _roll(raw, conv_state, channel, mask, C: tl.constexpr, W: tl.constexpr):
    """Moves some channels of the convolution's state on by one token."""
    for i in tl.static_range(W - 2):
        tl.store(conv_state + i * C + channel, tl.load(conv_state + (i + 1) * C + channel, mask=mask), mask=mask)
    if W > 1:
        tl.store(conv_state + (W - 2) * C + channel, tl.load(raw + channel, mask=mask), mask=mask)


@triton.jit
def _attention_view(
    x, partner, weight, cos, sin, dim, mask, eps, K: tl.constexpr, QK_NORM: tl.constexpr, ROPE: tl.constexpr
):
    """RMSNorm and rotation of `[rows, K]`; `partner` has, for every entry, the one that it is rotated with."""
    other = (dim + K // 2) % K
    if QK_NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
        x = x * factor * tl.load(weight + dim, mask=mask, other=0.0).to(tl.float32)[None, :]
        partner = partner * factor * tl.load(weight + other, mask=mask, other=0.0).to(tl.float32)[None, :]
    if ROPE:
        turned = tl.where((dim < K // 2)[None, :], -partner, partner)
        x = x * tl.load(cos + dim, mask=mask, other=0.0).to(tl.float32)[None, :]
        x += turned * tl.load(sin + dim, mask=mask, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _score(
    v_square, p_square, d_square, product, beta, given, error_weight, stream, head, SCORE: tl.constexpr
):  # fmt: skip
    """Routing score of a token, from sums over its value's dimensions and from what is handed in."""
    v_norm, p_norm, d_norm = tl.sqrt(tl.sum(v_square, 0)), tl.sqrt(tl.sum(p_square, 0)), tl.sqrt(tl.sum(d_square, 0))
    if SCORE == "given":
        score = tl.load(given + stream)
    elif SCORE == "l2":
        score = d_norm / tl.maximum(v_norm + p_norm, COSINE_EPS)
        score = tl.where(score == score, tl.minimum(score * score, 1.0), score)
    elif SCORE == "residual":
        score = beta * d_norm / (beta * d_norm + tl.maximum(v_norm, COSINE_EPS))
    else:
        score = (1.0 - tl.sum(product, 0) / tl.maximum(v_norm * p_norm, COSINE_EPS)) / 2.0
        score = tl.where(score == score, tl.minimum(tl.maximum(score, 0.0), 1.0), score)
        if SCORE == "learned_error":
            score = tl.sigmoid(tl.load(given + stream) + tl.load(error_weight + head) * score)
    # What is not a number counts as 1, so that no threshold drops it unseen.
    return tl.where(score == score, score, 1.0)


@triton.jit
def decode_update_fwd_kernel(
    raw, conv_state, conv_weight, b, a, A_log, dt_bias, state, q_weight, k_weight, cos, sin, given, error_weight,
    threshold, real, o, q_out, k_out, v_out, scores, keep, eps, stride_rope, stride_threshold_row,
    stride_threshold_head,
    HK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, SCORE: tl.constexpr,
    SCALE_VALUES: tl.constexpr, QK_NORM: tl.constexpr, ROPE: tl.constexpr, ATTENTION_CONV: tl.constexpr,
    ALLOW_NEG_EIGVAL: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One token of one stream: convolution, state, prediction and, if there is a SCORE, what attention takes."""
    stream = tl.program_id(0).to(tl.int64)
    row, head = stream // HK, (stream % HK).to(tl.int32)
    C: tl.constexpr = HK * G * K + HK * K + HK * V
    raw += row * C
    conv_state += row * (W - 1) * C
    o_g, o_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    in_k = o_k < K
    in_q = (o_g < G)[:, None] & in_k[None, :]
    q_channel = (head * G + o_g[:, None]) * K + o_k[None, :]
    k_channel = HK * G * K + head * K + o_k
    v_channel = HK * (G + 1) * K + head * V
    q = _convolved(raw, conv_state, conv_weight, q_channel, in_q, C, W)
    k = _convolved(raw, conv_state, conv_weight, k_channel, in_k, C, W)

    if SCORE is not None:
        # What attention sees of the query heads and, as one more row of the same, of the key.
        other = (o_k + K // 2) % K - o_k
        if ATTENTION_CONV:
            q_seen, k_seen = q, k
            q_partner = _convolved(raw, conv_state, conv_weight, q_channel + other[None, :], in_q, C, W)
            k_partner = _convolved(raw, conv_state, conv_weight, k_channel + other, in_k, C, W)
        else:
            q_seen = tl.load(raw + q_channel, mask=in_q, other=0.0).to(tl.float32)
            k_seen = tl.load(raw + k_channel, mask=in_k, other=0.0).to(tl.float32)
            q_partner = tl.load(raw + q_channel + other[None, :], mask=in_q, other=0.0).to(tl.float32)
            k_partner = tl.load(raw + k_channel + other, mask=in_k, other=0.0).to(tl.float32)
        if ROPE:
            cos += row * stride_rope
            sin += row * stride_rope
        q_seen = _attention_view(q_seen, q_partner, q_weight, cos, sin, o_k, in_k, eps, K, QK_NORM, ROPE)
        k_seen = _attention_view(
            k_seen[None, :], k_partner[None, :], k_weight, cos, sin, o_k, in_k, eps, K, QK_NORM, ROPE
        )
        q_place = (stream * G + o_g[:, None]) * K + o_k[None, :]
        tl.store(q_out + q_place, q_seen.to(q_out.dtype.element_ty), mask=in_q)
        tl.store(k_out + stream * K + o_k[None, :], k_seen.to(k_out.dtype.element_ty), mask=in_k[None, :])

    beta = tl.sigmoid(tl.load(b + stream).to(tl.float32))
    if ALLOW_NEG_EIGVAL:
        beta *= 2.0
    step = tl.load(a + stream).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    decay = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
    is_real = tl.full([], 1, dtype=tl.int1)
    if real is not None:
        is_real = tl.load(real + row) != 0
    q = q * tl.rsqrt(tl.sum(q * q, 1) + L2_EPS)[:, None] * (K**-0.5)
    k = k * tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    # Squared lengths of value, prediction and their difference, and the product of the two.
    v_square = tl.zeros([TILE_V], dtype=tl.float32)
    p_square = tl.zeros([TILE_V], dtype=tl.float32)
    d_square = tl.zeros([TILE_V], dtype=tl.float32)
    product = tl.zeros([TILE_V], dtype=tl.float32)
    for begin in tl.static_range(0, BLOCK_V, TILE_V):
        o_v = begin + tl.arange(0, TILE_V)
        in_v = o_v < V
        v = _convolved(raw, conv_state, conv_weight, v_channel + o_v, in_v, C, W)
        cells = state + (stream * K + o_k[:, None]) * V + o_v[None, :]
        in_state = in_k[:, None] & in_v[None, :]
        S = tl.load(cells, mask=in_state, other=0.0) * decay
        prediction = tl.sum(k[:, None] * S, 0)
        S += k[:, None] * (beta * (v - prediction))[None, :]
        # Small blocks are loaded by several threads at once, and none may find what another has written.
        tl.debug_barrier()
        # Padding neither decays nor writes the state, were it NaN.
        tl.store(cells, S, mask=in_state & is_real)
        for g in tl.static_range(G):
            query = tl.sum(tl.where((o_g == g)[:, None], q, 0.0), 0)
            read = tl.sum(query[:, None] * S, 0)
            tl.store(o + (stream * G + g) * V + o_v, read.to(o.dtype.element_ty), mask=in_v)
        v_square += v * v
        p_square += prediction * prediction
        d_square += (v - prediction) * (v - prediction)
        product += v * prediction

    o_v = tl.arange(0, BLOCK_V)
    in_v = o_v < V
    if SCORE is not None:
        score = _score(v_square, p_square, d_square, product, beta, given, error_weight, stream, head, SCORE)
        limit = tl.load(threshold + row * stride_threshold_row + head * stride_threshold_head)
        tl.store(scores + stream, score)
        tl.store(keep + stream, (score >= limit) & is_real)
        # Once more, because the score that scales a value may come of it.
        if ATTENTION_CONV:
            v_seen = _convolved(raw, conv_state, conv_weight, v_channel + o_v, in_v, C, W)
        else:
            v_seen = tl.load(raw + v_channel + o_v, mask=in_v, other=0.0).to(tl.float32)
        if SCALE_VALUES:
            v_seen = v_seen * score.to(v_out.dtype.element_ty).to(tl.float32)
        tl.store(v_out + stream * V + o_v, v_seen.to(v_out.dtype.element_ty), mask=in_v)

    tl.debug_barrier()
    _roll(raw, conv_state, q_channel, in_q & is_real, C, W)
    _roll(raw, conv_state, k_channel, in_k & is_real, C, W)
    _roll(raw, conv_state, v_channel + o_v, in_v & is_real, C, W)


@triton.jit
def _mixed(o, weight, place, o_v, mask, eps, V: tl.constexpr):
    """The outputs `[heads, V]` of a memory, through their RMSNorm if there is one."""
    x = tl.load(o + place, mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        x *= tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
        x *= tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _gate(logits, head, mask):
    return tl.sigmoid(tl.load(logits + head, mask=mask, other=0.0).to(tl.float32))[:, None]


@triton.jit(do_not_specialize=["num_slabs"])
def decode_mix_append_fwd_kernel(
    o_rnn, o_kv, rnn_gate, kv_gate, z, rnn_weight, kv_weight, out, positions, real, real_tokens, k, v, scores, keep,
    tail_k, tail_v, tail_scores, tail_positions, counts, full_pages, slabs, num_slabs, eps,
    HK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, FIELDS: tl.constexpr,
    SILU: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One token of one stream: the mix of its memories' outputs, and its place in the pages if it is kept."""
    stream = tl.program_id(0).to(tl.int64)
    row = stream // HK
    o_g, o_v = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    in_g = o_g < G
    mask = in_g[:, None] & (o_v < V)[None, :]
    place = (stream * G + o_g[:, None]) * V + o_v[None, :]
    mixed = _mixed(o_rnn, rnn_weight, place, o_v, mask, eps, V)
    if o_kv is not None:
        mixed *= _gate(rnn_gate, stream * G + o_g, in_g)
        mixed += _gate(kv_gate, stream * G + o_g, in_g) * _mixed(o_kv, kv_weight, place, o_v, mask, eps, V)
    if z is not None:
        gate = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
        activation = tl.sigmoid(gate)
        if SILU:
            activation *= gate
        mixed *= activation
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=mask)

    position = tl.load(positions + row)
    is_real = tl.full([], 1, dtype=tl.int1)
    if real is not None:
        is_real = tl.load(real + row) != 0
    tl.store(real_tokens + row, position + 1, mask=(stream % HK == 0) & is_real)
    if o_kv is not None:  # noqa: SIM102  # a constant: Triton evaluates it by itself only
        if tl.load(keep + stream) != 0:
            _append(
                k, v, scores, position, tail_k, tail_v, tail_scores, tail_positions, counts, full_pages, slabs,
                num_slabs, stream, K, V, PAGE, FIELDS, BLOCK_K, BLOCK_V, BLOCK_S,
            )  # fmt: skip


@triton.jit
def _append(
    k, v, scores, position, tail_k, tail_v, tail_scores, tail_positions, counts, full_pages, slabs, num_slabs, stream,
    K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A token behind what its stream holds; one that fills the open page takes it to the next free page of a slab."""
    o_k, o_v, o_p, o_s = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, PAGE), tl.arange(0, BLOCK_S)
    in_k, in_v = o_k < K, o_v < V
    key = tl.load(k + stream * K + o_k, mask=in_k)
    value = tl.load(v + stream * V + o_v, mask=in_v)
    score, position = tl.load(scores + stream), position.to(tl.int32)
    count = tl.load(counts + stream)
    slot = stream * PAGE + count % PAGE
    tl.store(counts + stream, count + 1)
    if count % PAGE < PAGE - 1:
        tl.store(tail_k + slot * K + o_k, key, mask=in_k)
        tl.store(tail_v + slot * V + o_v, value, mask=in_v)
        tl.store(tail_scores + slot, score)
        tl.store(tail_positions + slot, position)
    else:
        page = tl.atomic_add(full_pages, 1)
        index = 0
        for begin in range(0, num_slabs, BLOCK_S):
            slab = slabs + (begin + o_s) * FIELDS
            in_use = begin + o_s < num_slabs
            end = tl.load(slab + 4, mask=in_use, other=0) + tl.load(slab + 5, mask=in_use, other=0)
            index += tl.sum((in_use & (end <= page)).to(tl.int32), 0)
        slab = slabs + index * FIELDS
        page -= tl.load(slab + 4)
        # The last slot comes from the registers, not by way of the open page, whose writes others would have to see.
        last = o_p == PAGE - 1
        slots = stream * PAGE + o_p
        target = page * PAGE + o_p
        keys = tl.load(tail_k + slots[:, None] * K + o_k[None, :], mask=in_k[None, :])
        values = tl.load(tail_v + slots[:, None] * V + o_v[None, :], mask=in_v[None, :])
        element = tl.pointer_type(k.dtype.element_ty)
        slab_k, slab_v = tl.load(slab).to(element), tl.load(slab + 1).to(element)
        tl.store(
            slab_k + target[:, None] * K + o_k[None, :],
            tl.where(last[:, None], key[None, :], keys),
            mask=in_k[None, :],
        )
        tl.store(
            slab_v + target[:, None] * V + o_v[None, :],
            tl.where(last[:, None], value[None, :], values),
            mask=in_v[None, :],
        )
        slab_scores = tl.load(slab + 6).to(tl.pointer_type(tl.float32))
        slab_positions = tl.load(slab + 7).to(tl.pointer_type(tl.int32))
        tl.store(slab_scores + target, tl.where(last, score, tl.load(tail_scores + slots)))
        tl.store(slab_positions + target, tl.where(last, position, tl.load(tail_positions + slots)))
        tl.store(tl.load(slab + 2).to(tl.pointer_type(tl.int32)) + page, stream.to(tl.int32))
        tl.store(tl.load(slab + 3).to(tl.pointer_type(tl.int32)) + page, (count // PAGE).to(tl.int32))


class DecodeUpdate(NamedTuple):
    """What one token leaves for attention and for the mix of the two memories.

    Attributes:
        o: `[B, H, V]` output of the RNN. All that follows is `None` in a layer without attention.
        q, k, v: `[B, H, K]`, `[B, Hk, K]` and `[B, Hk, V]` of the attention view.
        scores: `[B, Hk]` float32 routing scores.
        keep: `[B, Hk]` bool, whether the score reaches the threshold.
    """

    o: torch.Tensor
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    keep: torch.Tensor | None = None


def decode_update_fwd(
    qkv: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    threshold: torch.Tensor | None,
    score: str | None,
    given: torch.Tensor | None,
    error_weight: torch.Tensor | None,
    real: torch.Tensor | None,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    attention_conv: bool,
    scale_values: bool,
    eps: float,
    allow_neg_eigval: bool,
) -> DecodeUpdate:
    """Launches the kernel on arguments that `decode_update` has checked."""
    batch, kv_heads, key_dim, value_dim = state.shape
    heads = query_heads(qkv, state)
    out = DecodeUpdate(o=qkv.new_empty(batch, heads, value_dim))
    threshold_strides: tuple[int, ...] = (0, 0)
    if threshold is not None:
        out = out._replace(
            q=qkv.new_empty(batch, heads, key_dim),
            k=qkv.new_empty(batch, kv_heads, key_dim),
            v=qkv.new_empty(batch, kv_heads, value_dim),
            scores=qkv.new_empty(batch, kv_heads, dtype=torch.float32),
            keep=qkv.new_empty(batch, kv_heads, dtype=torch.bool),
        )
        threshold_strides = threshold.expand(batch, kv_heads).stride()
    q_weight, k_weight = norm_weights or (None, None)
    cos, sin = rope or (None, None)
    decode_update_fwd_kernel[(batch * kv_heads,)](
        qkv, conv_state, conv_weight, b, a, A_log, dt_bias, state, q_weight, k_weight, cos, sin, given,
        error_weight, threshold, real, *out, eps, 0 if cos is None or len(cos) == 1 else key_dim, *threshold_strides,
        HK=kv_heads, G=heads // kv_heads, K=key_dim, V=value_dim, W=conv_weight.shape[1], SCORE=score,
        SCALE_VALUES=scale_values, QK_NORM=norm_weights is not None, ROPE=rope is not None,
        ATTENTION_CONV=attention_conv, ALLOW_NEG_EIGVAL=allow_neg_eigval,
        **block_sizes(heads // kv_heads, key_dim, value_dim), num_warps=8,
    )  # fmt: skip
    return out


def query_heads(qkv: torch.Tensor, state: torch.Tensor) -> int:
    """Query heads among the channels of `qkv` `[B, C]`, beside a key and a value for each head of `state`."""
    _, kv_heads, key_dim, value_dim = state.shape
    return (qkv.shape[1] - kv_heads * (key_dim + value_dim)) // key_dim


def block_sizes(groups: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """The kernel's blocks: powers of two that hold the sizes, and as many columns of the state as a tile has."""
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    tile_v = min(block_v, max(1, STATE_TILE // block_k))
    return {"BLOCK_G": triton.next_power_of_2(groups), "BLOCK_K": block_k, "BLOCK_V": block_v, "TILE_V": tile_v}


def decode_update(
    qkv: torch.Tensor,
    conv_state: torch.Tensor,
    conv_weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    threshold: torch.Tensor | None,
    score: str | None = "cosine",
    given: torch.Tensor | None = None,
    error_weight: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_conv: bool = True,
    scale_values: bool = False,
    eps: float = 1e-6,
    allow_neg_eigval: bool = False,
) -> DecodeUpdate:
    """One token, from its projections to what attention reads; `conv_state` and `state` are updated in place.

    Causal convolution and SiLU; the gated delta rule (arXiv 2412.06464) on L2-normalised queries and keys, with the
    prediction of the value; the routing score and whether it reaches the threshold; RMSNorm and rotation of the
    queries and keys that attention sees. One launch, no backward, no waiting for the host.

    Args:
        qkv: `[B, C]` bfloat16, float16 or float32 projections: `H` queries and `Hk` keys of size `K`, then `Hk` values
            of size `V`; `H` is a multiple of `Hk`. What has no dtype below has this one.
        conv_state: `[B, W - 1, C]` last inputs of the convolution, oldest first.
        conv_weight: `[C, W]`; `conv_weight[:, W - 1]` multiplies the current token.
        a, b: `[B, Hk]` projections for the decay and the write strength.
        A_log, dt_bias: `[Hk]` float32: the decay is `exp(-exp(A_log) softplus(a + dt_bias))`.
        state: `[B, Hk, K, V]` float32.
        threshold: `[B or 1, Hk or 1]` float32; `None` without a score.
        score: `"cosine"`, `"l2"` or `"residual"`, the prediction's error; `"given"`; `"learned_error"`, the sigmoid of
            given logits and the weighted cosine error; `None` in a layer without attention, which has no score.
        given: `[B, Hk]` float32 scores for `"given"`, logits for `"learned_error"`.
        error_weight: `[Hk]` float32 for `"learned_error"`.
        real: `[B]` bool, false for padding, which changes no state, is not kept and has unspecified outputs; `None` if
            every row has a token.
        norm_weights: `[K]` each, of the RMSNorm of queries and of keys, also in float32; `None` for no norm.
        rope: cosines and sines `[B or 1, K]`, or `None` for no rotation.
        attention_conv: whether attention sees the convolved projections; otherwise `qkv` itself.
        scale_values: whether attention sees the values multiplied by their scores.
        eps: of the RMSNorms.
        allow_neg_eigval: whether the write strength is `2 sigmoid(b)` instead of `sigmoid(b)`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an argument that requires a gradient.
    """
    if score is not None and score not in SCORES:
        raise ValueError(f"`score` must be one of {', '.join(map(repr, SCORES))} or None, got {score!r}.")
    wanted_by = {
        "given": (given, score in ("given", "learned_error")),
        "error_weight": (error_weight, score == "learned_error"),
        "threshold": (threshold, score is not None),
    }
    for name, (x, wanted) in wanted_by.items():
        if (x is not None) != wanted:
            raise ValueError(f"`{name}` must be {'a tensor' if wanted else 'None'} with `score` {score!r}, got {x!r}.")
    if qkv.ndim != 2 or qkv.dtype not in DTYPES:
        raise ValueError(
            f"`qkv` must be [B, C] of bfloat16, float16 or float32, got {list(qkv.shape)} of {qkv.dtype}."
        )
    if state.ndim != 4:
        raise ValueError(f"`state` must be [B, Hk, K, V], got {list(state.shape)}.")
    batch, kv_heads, key_dim, value_dim = state.shape
    heads = query_heads(qkv, state)
    channels, width = heads * key_dim + kv_heads * (key_dim + value_dim), conv_weight.shape[-1]
    if heads < 1 or heads % kv_heads or channels != qkv.shape[1]:
        raise ValueError(
            f"`qkv` must have the channels of {kv_heads} keys of {key_dim}, {kv_heads} values of {value_dim} and a "
            f"multiple of {kv_heads} queries, as `state` does; got {qkv.shape[1]}."
        )
    own, wide = qkv.dtype, torch.float32
    expected = {
        "qkv": (qkv, (batch, channels), own),
        "conv_state": (conv_state, (batch, width - 1, channels), own),
        "conv_weight": (conv_weight, (channels, width), own),
        "a": (a, (batch, kv_heads), own),
        "b": (b, (batch, kv_heads), own),
        "A_log": (A_log, (kv_heads,), wide),
        "dt_bias": (dt_bias, (kv_heads,), wide),
        "state": (state, (batch, kv_heads, key_dim, value_dim), wide),
    }
    if given is not None:
        expected["given"] = (given, (batch, kv_heads), wide)
    if error_weight is not None:
        expected["error_weight"] = (error_weight, (kv_heads,), wide)
    if real is not None:
        expected["real"] = (real, (batch,), torch.bool)
    for i, weight in enumerate(norm_weights or ()):
        expected[f"norm_weights[{i}]"] = (weight, (key_dim,), wide if weight.dtype == wide else own)
    for i, angle in enumerate(rope or ()):
        expected[f"rope[{i}]"] = (angle, (1 if len(angle) == 1 else batch, key_dim), own)
    _check_tensors(expected, qkv.device)
    if threshold is not None:
        if threshold.ndim != 2 or threshold.shape[0] not in (1, batch) or threshold.shape[1] not in (1, kv_heads):
            raise ValueError(f"`threshold` must be [{batch} or 1, {kv_heads} or 1], got {list(threshold.shape)}.")
        if threshold.dtype != wide or threshold.device != qkv.device:
            raise ValueError(
                f"`threshold` must be {wide} on {qkv.device}, got {threshold.dtype} on {threshold.device}."
            )
    if rope is not None and key_dim % 2:
        raise ValueError(f"`rope` turns pairs, so `K` must be even, got {key_dim}.")
    check_platform(qkv.device)
    return decode_update_fwd(
        qkv, conv_state, conv_weight, a, b, A_log, dt_bias, state, threshold, score, given, error_weight, real,
        norm_weights, rope, attention_conv, scale_values, eps, allow_neg_eigval,
    )  # fmt: skip


class OpenPages(NamedTuple):
    """Where the device appends: the open pages of `N` streams, and what it must know of the full ones.

    Attributes:
        keys, values: `[N, p, K]` and `[N, p, V]`, contiguous, `p` a power of two.
        scores, positions: `[N, p]` float32 and int32.
        counts: `[N]` int64 tokens that each stream holds, those in full pages included.
        full_pages: int64 scalar, how many pages of the slabs are in use, all streams together.
        slabs: `slab_table` of slabs `(keys, values, owner, rank, scores, positions)`, with a free page for every
            stream whose open page lacks one token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    full_pages: torch.Tensor
    slabs: torch.Tensor


def decode_mix_append_fwd(
    update: DecodeUpdate,
    positions: torch.Tensor,
    real_tokens: torch.Tensor,
    real: torch.Tensor | None,
    norm_weights: tuple[torch.Tensor | None, torch.Tensor | None],
    output_gate: torch.Tensor | None,
    o_kv: torch.Tensor | None,
    gates: tuple[torch.Tensor, torch.Tensor] | None,
    pages: OpenPages | None,
    eps: float,
    gate_activation: str,
) -> torch.Tensor:
    """Launches the kernel on arguments that `decode_mix_append` has checked."""
    batch, heads, value_dim = update.o.shape
    kv_heads, key_dim, page, num_slabs = heads, 1, 1, 0
    if pages is not None and update.k is not None:
        _, kv_heads, key_dim = update.k.shape
        page, num_slabs = pages.keys.shape[1], len(pages.slabs)
    groups = heads // kv_heads
    blocks = block_sizes(groups, key_dim, value_dim)
    del blocks["TILE_V"]
    out = update.o.new_empty(batch, heads * value_dim)
    decode_mix_append_fwd_kernel[(batch * kv_heads,)](
        update.o, o_kv, *(gates or (None, None)), output_gate, *norm_weights, out, positions, real, real_tokens,
        *update[2:], *(pages or [None] * len(OpenPages._fields)), num_slabs, eps,
        HK=kv_heads, G=groups, K=key_dim, V=value_dim, PAGE=page, FIELDS=APPEND_FIELDS,
        SILU=gate_activation == "silu", **blocks, BLOCK_S=SLAB_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


def decode_mix_append(
    update: DecodeUpdate,
    positions: torch.Tensor,
    real_tokens: torch.Tensor,
    real: torch.Tensor | None = None,
    norm_weights: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    output_gate: torch.Tensor | None = None,
    o_kv: torch.Tensor | None = None,
    gates: tuple[torch.Tensor, torch.Tensor] | None = None,
    pages: OpenPages | None = None,
    eps: float = 1e-6,
    gate_activation: str = "silu",
) -> torch.Tensor:
    """Mixes what the two memories of a token put out, and appends the kept tokens to their streams' pages, in place.

    `(sigmoid(gates[0]) RMSNorm(o_rnn) + sigmoid(gates[1]) RMSNorm(o_kv)) * silu(output_gate)`; without attention
    `RMSNorm(o_rnn) * silu(output_gate)`; or with a sigmoid in place of the SiLU. A kept token goes to the next slot of
    its stream's open page; an open page that it fills is copied to the next free page of the slabs. One launch, no
    backward, no waiting for the host, which sees to it that there are free pages.

    Args:
        update: what `decode_update` returned, of `B` rows in bfloat16, float16 or float32. What has no dtype below has
            this one.
        positions: `[B]` int64 index of each token among its row's real ones.
        real_tokens: `[B]` int64 number of real tokens seen, which becomes `positions + 1`.
        real: `[B]` bool, false for padding, which changes nothing and has unspecified outputs; `None` if all are real.
        norm_weights: `[V]` each, of the RMSNorms of the two outputs; `None` for no norm.
        output_gate: `[B, H * V]` before its activation, or `None` for no gate.
        o_kv: `[B, H, V]` output of the attention; it, `gates` and `pages` are `None` in a layer without.
        gates: `[B, H]` each, of the RNN's and the attention's output, before the sigmoid.
        pages: where to append (a plain tuple will do), a stream for each row and head, ordered by row.
        eps: of the RMSNorms.
        gate_activation: `"silu"` or `"sigmoid"`, of the output gate.

    Returns:
        `[B, H * V]`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an argument that requires a gradient.
    """
    if gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(
            f"`gate_activation` must be one of {', '.join(map(repr, GATE_ACTIVATIONS))}, got {gate_activation!r}."
        )
    if update.o.ndim != 3 or update.o.dtype not in DTYPES:
        raise ValueError(
            f"`update.o` must be [B, H, V] of bfloat16, float16 or float32, got {list(update.o.shape)} of "
            f"{update.o.dtype}."
        )
    (batch, heads, value_dim), own, index = update.o.shape, update.o.dtype, torch.int64
    expected = {
        "update.o": (update.o, (batch, heads, value_dim), own),
        "positions": (positions, (batch,), index),
        "real_tokens": (real_tokens, (batch,), index),
    }
    if real is not None:
        expected["real"] = (real, (batch,), torch.bool)
    if output_gate is not None:
        expected["output_gate"] = (output_gate, (batch, heads * value_dim), own)
    for i, weight in enumerate(norm_weights):
        if weight is not None:
            expected[f"norm_weights[{i}]"] = (weight, (value_dim,), own)
    if pages is not None and o_kv is not None and gates is not None and update.k is not None:
        pages = OpenPages(*pages)
        expected["o_kv"] = (o_kv, (batch, heads, value_dim), own)
        expected |= {f"gates[{i}]": (gate, (batch, heads), own) for i, gate in enumerate(gates)}
        expected |= _expected_pages(update.k, value_dim, pages)
    elif any(x is not None for x in (update.k, o_kv, gates, pages)):
        found = {"update.k": update.k, "o_kv": o_kv, "gates": gates, "pages": pages}
        names = [name for name, x in found.items() if x is None]
        raise ValueError(f"`{'`, `'.join(found)}` must all be given, or none of them, got None for {names}.")
    _check_tensors(expected, update.o.device)
    check_platform(update.o.device)
    return decode_mix_append_fwd(
        update, positions, real_tokens, real, norm_weights, output_gate, o_kv, gates, pages, eps, gate_activation
    )


def _expected_pages(k: torch.Tensor, value_dim: int, pages: OpenPages) -> dict:
    """What `_check_tensors` checks of the places to append `k` `[B, Hk, K]` to."""
    batch, kv_heads, key_dim = k.shape
    own, index, streams, page = k.dtype, torch.int64, batch * kv_heads, pages.keys.shape[1]
    if page & (page - 1):
        raise ValueError(f"`pages.keys` must be [N, p, K], `p` a power of two, got {list(pages.keys.shape)}.")
    return {
        "pages.keys": (pages.keys, (streams, page, key_dim), own),
        "pages.values": (pages.values, (streams, page, value_dim), own),
        "pages.scores": (pages.scores, (streams, page), torch.float32),
        "pages.positions": (pages.positions, (streams, page), torch.int32),
        "pages.counts": (pages.counts, (streams,), index),
        "pages.full_pages": (pages.full_pages, (), index),
        "pages.slabs": (pages.slabs, (len(pages.slabs), APPEND_FIELDS), index),
    }


def _check_tensors(expected: dict, device: torch.device) -> None:
    """`ValueError` unless every `name: (tensor, shape, dtype)` is so, contiguous, on `device`, without gradient."""
    for name, (x, shape, dtype) in expected.items():
        if x.shape != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
            raise ValueError(
                f"`{name}` must be {list(shape)} of {dtype} on {device}, contiguous; got {list(x.shape)} of "
                f"{x.dtype} on {x.device}, strides {x.stride()}."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"`{name}` requires a gradient, got grad mode on; the op has no backward.")


# What the kernels are not given in a layer without attention.
ATTENTION_ARGUMENTS = ("q_weight", "k_weight", "cos", "sin", "threshold", "q_out", "k_out", "v_out", "scores", "keep")
APPEND_ARGUMENTS = (
    *("o_kv", "rnn_gate", "kv_gate", "kv_weight", "k", "v", "scores", "keep"),
    *("counts", "full_pages", "slabs", "tail_k", "tail_v", "tail_scores", "tail_positions"),
)


def _aot_case(key_dim: int, groups: int, score: str | None = "cosine", absent=("given", "error_weight")) -> dict:
    """The shipped blocks of a head dimension in bfloat16: one row of 16 query heads."""
    pointers = ("raw", "conv_state", "conv_weight", "b", "a", "q_weight", "k_weight", "cos", "sin", "o")
    signature = dict.fromkeys((*pointers, "q_out", "k_out", "v_out"), "*bf16") | {"eps": "fp32"}
    wide = ("A_log", "dt_bias", "state", "given", "error_weight", "threshold", "scores")
    signature |= dict.fromkeys(wide, "*fp32") | dict.fromkeys(("keep", "real"), "*i1")
    signature |= dict.fromkeys(("stride_rope", "stride_threshold_row", "stride_threshold_head"), "i32")
    sizes = {"HK": 16 // groups, "G": groups, "K": key_dim, "V": key_dim, "W": 4, "SCORE": score}
    switches = dict.fromkeys(("SCALE_VALUES", "ALLOW_NEG_EIGVAL"), not absent)
    switches |= dict.fromkeys(("QK_NORM", "ROPE", "ATTENTION_CONV"), True)
    return {
        "kernel": decode_update_fwd_kernel,
        "signature": {name: kind for name, kind in signature.items() if name not in absent},
        "constexprs": sizes | switches | block_sizes(groups, key_dim, key_dim) | dict.fromkeys(absent),
        "num_warps": 8,
        "num_stages": 3,
    }


def _aot_mix_case(key_dim: int, groups: int, absent=()) -> dict:
    """The same of the second launch, at 16 tokens a page."""
    pointers = ("o_rnn", "o_kv", "rnn_gate", "kv_gate", "z", "rnn_weight", "kv_weight", "out", "k", "v", "tail_k")
    signature = dict.fromkeys((*pointers, "tail_v"), "*bf16") | dict.fromkeys(("scores", "tail_scores"), "*fp32")
    signature |= dict.fromkeys(("positions", "real_tokens", "counts", "full_pages", "slabs"), "*i64")
    signature |= {"real": "*i1", "keep": "*i1", "tail_positions": "*i32", "num_slabs": "i32", "eps": "fp32"}
    sizes = {"HK": 16 // groups, "G": groups, "K": key_dim, "V": key_dim, "PAGE": 16, "FIELDS": APPEND_FIELDS}
    blocks = block_sizes(groups, key_dim, key_dim) | {"BLOCK_S": SLAB_BLOCK, "SILU": True}
    del blocks["TILE_V"]
    return {
        "kernel": decode_mix_append_fwd_kernel,
        "signature": {name: kind for name, kind in signature.items() if name not in absent},
        "constexprs": sizes | blocks | dict.fromkeys(absent),
        "num_warps": 4,
        "num_stages": 3,
    }


AOT_CASES = [
    *(_aot_case(*sizes) for sizes in ((128, 1), (64, 1), (128, 4), (256, 1))),
    _aot_case(128, 1, score="learned_error", absent=()),
    _aot_case(128, 1, score=None, absent=(*ATTENTION_ARGUMENTS, "given", "error_weight")),
    *(_aot_mix_case(*sizes) for sizes in ((128, 1), (64, 1), (128, 4), (256, 1))),
    _aot_mix_case(128, 1, absent=APPEND_ARGUMENTS),
]
