# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The RNN's part of one token in one launch: convolution, gates, state, prediction, score and keep-decision.

A program has one stream, a row's key/value head with the query heads that share it: their channels of the convolution
and their float32 state belong to no other program, so both are updated where they lie. At head dimension 128 the
launch reads and writes 64 KiB of state a stream, beside which everything else is small. It does not append the token:
attention, which reads the store next, would see it twice. `decode_mix_append` does so afterwards.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tuning import check_platform

# Sources of a token's routing score: the state's prediction, the caller, or both.
SCORES = ("cosine", "l2", "residual", "given", "learned_error")
# Elements of the state that a program of 8 warps holds at once: 32 per thread.
STATE_TILE = 8192
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
L2_EPS = tl.constexpr(1e-6)
COSINE_EPS = tl.constexpr(1e-8)


@triton.jit
def _convolved(raw, conv_state, conv_weight, channel, mask, C: tl.constexpr, W: tl.constexpr):
    """Causal convolution and SiLU of some channels of a row, rounded to the dtype of `raw`."""
    x = tl.load(raw + channel, mask=mask, other=0.0).to(tl.float32)
    x *= tl.load(conv_weight + channel * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(W - 1):
        tap = tl.load(conv_state + i * C + channel, mask=mask, other=0.0).to(tl.float32)
        x += tap * tl.load(conv_weight + channel * W + i, mask=mask, other=0.0).to(tl.float32)
    return (x * tl.sigmoid(x)).to(raw.dtype.element_ty).to(tl.float32)


@triton.jit
def _roll(raw, conv_state, channel, mask, C: tl.constexpr, W: tl.constexpr):
    """Shifts some channels of the convolution's state by one token."""
    for i in tl.static_range(W - 2):
        tl.store(conv_state + i * C + channel, tl.load(conv_state + (i + 1) * C + channel, mask=mask), mask=mask)
    if W > 1:
        tl.store(conv_state + (W - 2) * C + channel, tl.load(raw + channel, mask=mask), mask=mask)


@triton.jit
def _attention_view(
    x, partner, weight, cos, sin, dim, mask, eps, K: tl.constexpr, QK_NORM: tl.constexpr, ROPE: tl.constexpr
):
    """RMSNorm and rotation of `[rows, K]`; `partner` holds the entry with which each entry is rotated."""
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
    """Routing score of a token, from sums over its value's dimensions and the caller's tensors."""
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
    # NaN counts as 1, so that no threshold drops it unseen.
    return tl.where(score == score, score, 1.0)


@triton.jit
def _store_queries_and_key(
    q, k, raw, conv_state, conv_weight, q_channel, k_channel, q_weight, k_weight, cos, sin, q_out, k_out, eps, stream,
    C: tl.constexpr, W: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
    QK_NORM: tl.constexpr, ROPE: tl.constexpr, ATTENTION_CONV: tl.constexpr,
):  # fmt: skip
    """Stores the query heads and, as one more row of the same, the key that attention sees; `q`, `k` are convolved."""
    o_g, o_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    in_k = o_k < K
    in_q = (o_g < G)[:, None] & in_k[None, :]
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
    q_seen = _attention_view(q_seen, q_partner, q_weight, cos, sin, o_k, in_k, eps, K, QK_NORM, ROPE)
    k_seen = _attention_view(k_seen[None, :], k_partner[None, :], k_weight, cos, sin, o_k, in_k, eps, K, QK_NORM, ROPE)
    q_place = (stream * G + o_g[:, None]) * K + o_k[None, :]
    tl.store(q_out + q_place, q_seen.to(q_out.dtype.element_ty), mask=in_q)
    tl.store(k_out + stream * K + o_k[None, :], k_seen.to(k_out.dtype.element_ty), mask=in_k[None, :])


@triton.jit
def _beta_and_decay(b, a, A_log, dt_bias, stream, head, ALLOW_NEG_EIGVAL: tl.constexpr):
    """Write strength and decay of a stream."""
    beta = tl.sigmoid(tl.load(b + stream).to(tl.float32))
    if ALLOW_NEG_EIGVAL:
        beta *= 2.0
    step = tl.load(a + stream).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    return beta, tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)


@triton.jit
def _update_state(
    q, k, raw, conv_state, conv_weight, v_channel, beta, decay, state, o, stream, is_real,
    C: tl.constexpr, W: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """Updates the state, a tile of value columns at a time, and stores the outputs.

    Returns the squared lengths of value, prediction and their difference, and the product of the two, each as
    `[TILE_V]` partial sums.
    """
    o_g, o_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    v_square = tl.zeros([TILE_V], dtype=tl.float32)
    p_square = tl.zeros([TILE_V], dtype=tl.float32)
    d_square = tl.zeros([TILE_V], dtype=tl.float32)
    product = tl.zeros([TILE_V], dtype=tl.float32)
    for begin in tl.static_range(0, BLOCK_V, TILE_V):
        o_v = begin + tl.arange(0, TILE_V)
        in_v = o_v < V
        v = _convolved(raw, conv_state, conv_weight, v_channel + o_v, in_v, C, W)
        cells = state + (stream * K + o_k[:, None]) * V + o_v[None, :]
        in_state = (o_k < K)[:, None] & in_v[None, :]
        S = tl.load(cells, mask=in_state, other=0.0) * decay
        prediction = tl.sum(k[:, None] * S, 0)
        S += k[:, None] * (beta * (v - prediction))[None, :]
        # Several threads load the same small block; all must have read it before one writes.
        tl.debug_barrier()
        # Padding leaves the state as it is, even padding that is NaN.
        tl.store(cells, S, mask=in_state & is_real)
        for g in tl.static_range(G):
            query = tl.sum(tl.where((o_g == g)[:, None], q, 0.0), 0)
            read = tl.sum(query[:, None] * S, 0)
            tl.store(o + (stream * G + g) * V + o_v, read.to(o.dtype.element_ty), mask=in_v)
        v_square += v * v
        p_square += prediction * prediction
        d_square += (v - prediction) * (v - prediction)
        product += v * prediction
    return v_square, p_square, d_square, product


@triton.jit
def _store_value(
    raw, conv_state, conv_weight, v_channel, v_out, score, stream, o_v,
    C: tl.constexpr, W: tl.constexpr, V: tl.constexpr, SCALE_VALUES: tl.constexpr, ATTENTION_CONV: tl.constexpr,
):  # fmt: skip
    """Stores the value that attention sees; loads it again, because the score that may scale it depends on it."""
    in_v = o_v < V
    if ATTENTION_CONV:
        v_seen = _convolved(raw, conv_state, conv_weight, v_channel + o_v, in_v, C, W)
    else:
        v_seen = tl.load(raw + v_channel + o_v, mask=in_v, other=0.0).to(tl.float32)
    if SCALE_VALUES:
        v_seen = v_seen * score.to(v_out.dtype.element_ty).to(tl.float32)
    tl.store(v_out + stream * V + o_v, v_seen.to(v_out.dtype.element_ty), mask=in_v)


@triton.jit
def decode_update_fwd_kernel(
    raw, conv_state, conv_weight, b, a, A_log, dt_bias, state, q_weight, k_weight, cos, sin, given, error_weight,
    threshold, positions, real, o, q_out, k_out, v_out, scores, keep, eps, stride_rope, stride_threshold_row,
    stride_threshold_head,
    HK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, SCORE: tl.constexpr,
    SCALE_VALUES: tl.constexpr, QK_NORM: tl.constexpr, ROPE: tl.constexpr, ATTENTION_CONV: tl.constexpr,
    ALLOW_NEG_EIGVAL: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """One token of one stream: convolution, state, prediction and, with a SCORE, the inputs of attention."""
    stream = tl.program_id(0).to(tl.int64)
    row, head = stream // HK, (stream % HK).to(tl.int32)
    C: tl.constexpr = HK * G * K + HK * K + HK * V
    raw += row * C
    conv_state += row * (W - 1) * C
    o_g, o_k, o_v = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_k = o_k < K
    in_q = (o_g < G)[:, None] & in_k[None, :]
    q_channel = (head * G + o_g[:, None]) * K + o_k[None, :]
    k_channel = HK * G * K + head * K + o_k
    v_channel = HK * (G + 1) * K + head * V
    q = _convolved(raw, conv_state, conv_weight, q_channel, in_q, C, W)
    k = _convolved(raw, conv_state, conv_weight, k_channel, in_k, C, W)
    if SCORE is not None:
        if ROPE:
            cos += row * stride_rope
            sin += row * stride_rope
        _store_queries_and_key(
            q, k, raw, conv_state, conv_weight, q_channel, k_channel, q_weight, k_weight, cos, sin, q_out, k_out,
            eps, stream, C, W, G, K, BLOCK_G, BLOCK_K, QK_NORM, ROPE, ATTENTION_CONV,
        )  # fmt: skip

    beta, decay = _beta_and_decay(b, a, A_log, dt_bias, stream, head, ALLOW_NEG_EIGVAL)
    is_real = tl.full([], 1, dtype=tl.int1)
    if real is not None:
        is_real = tl.load(real + row) != 0
    q = q * tl.rsqrt(tl.sum(q * q, 1) + L2_EPS)[:, None] * (K**-0.5)
    k = k * tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
    v_square, p_square, d_square, product = _update_state(
        q, k, raw, conv_state, conv_weight, v_channel, beta, decay, state, o, stream, is_real,
        C, W, G, K, V, BLOCK_G, BLOCK_K, BLOCK_V, TILE_V,
    )  # fmt: skip
    if SCORE is not None:
        score = _score(v_square, p_square, d_square, product, beta, given, error_weight, stream, head, SCORE)
        limit = tl.load(threshold + row * stride_threshold_row + head * stride_threshold_head)
        tl.store(scores + stream, score)
        kept = score >= limit
        if SINKS:
            kept |= tl.load(positions + row) < SINKS
        tl.store(keep + stream, kept & is_real)
        _store_value(
            raw, conv_state, conv_weight, v_channel, v_out, score, stream, o_v, C, W, V, SCALE_VALUES, ATTENTION_CONV
        )

    tl.debug_barrier()
    _roll(raw, conv_state, q_channel, in_q & is_real, C, W)
    _roll(raw, conv_state, k_channel, in_k & is_real, C, W)
    _roll(raw, conv_state, v_channel + o_v, (o_v < V) & is_real, C, W)


class DecodeUpdate(NamedTuple):
    """Results of one token, for attention and for the mix of the two memories.

    Attributes:
        o: `[B, H, V]` output of the RNN. The other fields are `None` in a layer without attention.
        q, k, v: `[B, H, K]`, `[B, Hk, K]` and `[B, Hk, V]` of the attention view.
        scores: `[B, Hk]` float32 routing scores.
        keep: `[B, Hk]` bool, true if the score reaches the threshold or the token is a sink.
    """

    o: torch.Tensor
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    keep: torch.Tensor | None = None


class Convolution(NamedTuple):
    """The causal convolution of `C` channels.

    Attributes:
        state: `[B, W - 1, C]` last inputs, oldest first; updated in place.
        weight: `[C, W]`; `weight[:, W - 1]` multiplies the current token.
    """

    state: torch.Tensor
    weight: torch.Tensor


class Gates(NamedTuple):
    """Decay `exp(-exp(A_log) softplus(a + dt_bias))` and write strength `sigmoid(b)`.

    Attributes:
        a, b: `[B, Hk]` projections of the token.
        A_log, dt_bias: `[Hk]` float32.
    """

    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor


class Routing(NamedTuple):
    """The routing score of a token, and the threshold that it must reach to be kept.

    Attributes:
        threshold: `[B or 1, Hk or 1]` float32.
        score: `"cosine"`, `"l2"` or `"residual"`, the prediction's error; `"given"`; `"learned_error"`, the sigmoid of
            given logits and the weighted cosine error.
        given: `[B, Hk]` float32 scores for `"given"`, logits for `"learned_error"`.
        error_weight: `[Hk]` float32 for `"learned_error"`.
        positions: `[B]` int64 index of each token among its row's real ones; unused without sinks.
        sinks: number of the first tokens of a row that are kept whatever their score.
    """

    threshold: torch.Tensor
    score: str = "cosine"
    given: torch.Tensor | None = None
    error_weight: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    sinks: int = 0


class AttentionView(NamedTuple):
    """Queries, keys and values as attention sees them.

    Attributes:
        norm_weights: `[K]` each, of the RMSNorm of queries and of keys, also in float32; `None` for no norm.
        rope: cosines and sines `[B or 1, K]`, or `None` for no rotation.
        convolved: True for the convolved projections, False for `qkv` itself.
        scale_values: True to multiply the values by their scores.
        eps: of the RMSNorms.
    """

    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    convolved: bool = True
    scale_values: bool = False
    eps: float = 1e-6


def decode_update_fwd(
    qkv: torch.Tensor,
    convolution: Convolution,
    gates: Gates,
    state: torch.Tensor,
    routing: Routing | None,
    view: AttentionView,
    real: torch.Tensor | None,
    allow_neg_eigval: bool,
) -> DecodeUpdate:
    """Launches the kernel on arguments that `decode_update` has checked."""
    batch, kv_heads, key_dim, value_dim = state.shape
    heads = query_heads(qkv, state)
    out = DecodeUpdate(o=qkv.new_empty(batch, heads, value_dim))
    threshold, score, given, error_weight, positions, sinks = routing or (None, None, None, None, None, 0)
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
    q_weight, k_weight = view.norm_weights or (None, None)
    cos, sin = view.rope or (None, None)
    decode_update_fwd_kernel[(batch * kv_heads,)](
        qkv, *convolution, gates.b, gates.a, gates.A_log, gates.dt_bias, state, q_weight, k_weight, cos, sin, given,
        error_weight, threshold, positions if sinks else None, real, *out, view.eps,
        0 if cos is None or len(cos) == 1 else key_dim, *threshold_strides,
        HK=kv_heads, G=heads // kv_heads, K=key_dim, V=value_dim, W=convolution.weight.shape[1], SCORE=score,
        SCALE_VALUES=view.scale_values, QK_NORM=view.norm_weights is not None, ROPE=view.rope is not None,
        ATTENTION_CONV=view.convolved, ALLOW_NEG_EIGVAL=allow_neg_eigval, SINKS=sinks,
        **block_sizes(heads // kv_heads, key_dim, value_dim), num_warps=8,
    )  # fmt: skip
    return out


def query_heads(qkv: torch.Tensor, state: torch.Tensor) -> int:
    """Number of query heads in `qkv` `[B, C]`, which also has a key and a value for each head of `state`."""
    _, kv_heads, key_dim, value_dim = state.shape
    return (qkv.shape[1] - kv_heads * (key_dim + value_dim)) // key_dim


def block_sizes(groups: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """The kernel's blocks: powers of two that hold the sizes, and the state columns of a tile."""
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    tile_v = min(block_v, max(1, STATE_TILE // block_k))
    return {"BLOCK_G": triton.next_power_of_2(groups), "BLOCK_K": block_k, "BLOCK_V": block_v, "TILE_V": tile_v}


def decode_update(
    qkv: torch.Tensor,
    convolution: Convolution,
    gates: Gates,
    state: torch.Tensor,
    routing: Routing | None = None,
    view: AttentionView | None = None,
    real: torch.Tensor | None = None,
    allow_neg_eigval: bool = False,
) -> DecodeUpdate:
    """One token, from its projections to what attention reads; the convolution's and `state` are updated in place.

    Causal convolution and SiLU; the gated delta rule (arXiv 2412.06464) on L2-normalised queries and keys, with the
    prediction of the value; the routing score and its comparison with the threshold; RMSNorm and rotation of the
    queries and keys that attention sees. One launch, no backward; the host never waits.

    Each of the four groups may be a plain tuple.

    Args:
        qkv: `[B, C]` bfloat16, float16 or float32 projections: `H` queries and `Hk` keys of size `K`, then `Hk` values
            of size `V`; `H` is a multiple of `Hk`. A tensor without a dtype, here or in the groups, has this one.
        convolution: state and weight.
        gates: projections and parameters of decay and write strength.
        state: `[B, Hk, K, V]` float32.
        routing: score and threshold; `None` in a layer without attention, which has neither.
        view: queries, keys and values as attention sees them; `AttentionView()` if `None`, unused without `routing`.
        real: `[B]` bool, false for padding, which changes no state, is not kept and has undefined outputs; `None` if
            every row has a token.
        allow_neg_eigval: True for a write strength of `2 sigmoid(b)` instead of `sigmoid(b)`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an argument that requires a gradient.
    """
    convolution, gates, view = Convolution(*convolution), Gates(*gates), AttentionView(*(view or ()))
    routing = None if routing is None else Routing(*routing)
    _check_sizes(qkv, state)
    _check_groups(qkv, convolution, gates, state, routing, view, real)
    check_platform(qkv.device)
    with torch.cuda.device_of(qkv):
        return decode_update_fwd(qkv, convolution, gates, state, routing, view, real, allow_neg_eigval)


def _check_sizes(qkv: torch.Tensor, state: torch.Tensor) -> None:
    if qkv.ndim != 2 or qkv.dtype not in DTYPES:
        raise ValueError(
            f"`qkv` must be [B, C] of bfloat16, float16 or float32, got {list(qkv.shape)} of {qkv.dtype}."
        )
    if state.ndim != 4:
        raise ValueError(f"`state` must be [B, Hk, K, V], got {list(state.shape)}.")
    _, kv_heads, key_dim, value_dim = state.shape
    heads = query_heads(qkv, state)
    if heads < 1 or heads % kv_heads or heads * key_dim + kv_heads * (key_dim + value_dim) != qkv.shape[1]:
        raise ValueError(
            f"`qkv` must have the channels of {kv_heads} keys of {key_dim}, {kv_heads} values of {value_dim} and a "
            f"multiple of {kv_heads} queries, as `state` does; got {qkv.shape[1]}."
        )


def _check_groups(
    qkv: torch.Tensor,
    convolution: Convolution,
    gates: Gates,
    state: torch.Tensor,
    routing: Routing | None,
    view: AttentionView,
    real: torch.Tensor | None,
) -> None:
    (batch, kv_heads, key_dim, value_dim), (_, channels) = state.shape, qkv.shape
    own, wide, width = qkv.dtype, torch.float32, convolution.weight.shape[-1]
    expected = {
        "qkv": (qkv, (batch, channels), own),
        "convolution.state": (convolution.state, (batch, width - 1, channels), own),
        "convolution.weight": (convolution.weight, (channels, width), own),
        "gates.a": (gates.a, (batch, kv_heads), own),
        "gates.b": (gates.b, (batch, kv_heads), own),
        "gates.A_log": (gates.A_log, (kv_heads,), wide),
        "gates.dt_bias": (gates.dt_bias, (kv_heads,), wide),
        "state": (state, (batch, kv_heads, key_dim, value_dim), wide),
    }
    if routing is not None:
        _check_routing(routing, batch, kv_heads, qkv.device)
        if routing.given is not None:
            expected["routing.given"] = (routing.given, (batch, kv_heads), wide)
        if routing.error_weight is not None:
            expected["routing.error_weight"] = (routing.error_weight, (kv_heads,), wide)
        if routing.positions is not None:
            expected["routing.positions"] = (routing.positions, (batch,), torch.int64)
    if real is not None:
        expected["real"] = (real, (batch,), torch.bool)
    for i, weight in enumerate(view.norm_weights or ()):
        expected[f"view.norm_weights[{i}]"] = (weight, (key_dim,), wide if weight.dtype == wide else own)
    for i, angle in enumerate(view.rope or ()):
        expected[f"view.rope[{i}]"] = (angle, (1 if len(angle) == 1 else batch, key_dim), own)
    check_tensors(expected, qkv.device)
    if view.rope is not None and key_dim % 2:
        raise ValueError(f"`view.rope` turns pairs, so `K` must be even, got {key_dim}.")


def _check_routing(routing: Routing, batch: int, kv_heads: int, device: torch.device) -> None:
    threshold, score = routing[:2]
    check_sinks("routing.sinks", routing.sinks)
    if routing.sinks and routing.positions is None:
        raise ValueError(f"`routing.positions` must be a tensor with `sinks` {routing.sinks}, got None.")
    if score not in SCORES:
        raise ValueError(f"`routing.score` must be one of {', '.join(map(repr, SCORES))}, got {score!r}.")
    wanted_by = {"given": score in ("given", "learned_error"), "error_weight": score == "learned_error"}
    for name, wanted in ({"threshold": True} | wanted_by).items():
        x = getattr(routing, name)
        if (x is not None) != wanted:
            raise ValueError(
                f"`routing.{name}` must be {'a tensor' if wanted else 'None'} with `score` {score!r}, got {x!r}."
            )
    if threshold.ndim != 2 or threshold.shape[0] not in (1, batch) or threshold.shape[1] not in (1, kv_heads):
        raise ValueError(f"`routing.threshold` must be [{batch} or 1, {kv_heads} or 1], got {list(threshold.shape)}.")
    if threshold.dtype != torch.float32 or threshold.device != device:
        raise ValueError(
            f"`routing.threshold` must be torch.float32 on {device}, got {threshold.dtype} on {threshold.device}."
        )


def check_sinks(name: str, sinks: int) -> None:
    """Raises `ValueError` unless `sinks` is a number of tokens."""
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"`{name}` must be an int of at least 0, got {sinks!r}.")


def check_tensors(expected: dict, device: torch.device) -> None:
    """Raises `ValueError` unless each tensor has its shape and dtype, is contiguous, on `device`, without gradient."""
    for name, (x, shape, dtype) in expected.items():
        if x.shape != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
            raise ValueError(
                f"`{name}` must be {list(shape)} of {dtype} on {device}, contiguous; got {list(x.shape)} of "
                f"{x.dtype} on {x.device}, strides {x.stride()}."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"`{name}` requires a gradient, got grad mode on; the op has no backward.")
