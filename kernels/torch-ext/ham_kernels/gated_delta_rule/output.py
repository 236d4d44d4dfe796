# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Outputs, predictions and scores: for the tokens of a chunk, and for a single token in one step."""

import torch
import triton
import triton.language as tl

from ..tuning import next_bucket, tuned
from .chunks import (
    LOG2E,
    MAX_HEAD_DIM,
    NO_WIDER,
    Chunks,
    chunk_bounds,
    chunk_constants,
    decay_between,
    load_sums,
    tile_configs,
    tile_width,
)

# Value columns per partial sum of a score, in chunks and in a step; they do not depend on the tile.
CHUNK_COLUMNS, STEP_COLUMNS = 32, 8
# Below this product of norms the direction is rounding noise, so the cosine counts as 0.
COSINE_EPS: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def _read(
    x, k, u, states, b_g, b_rest, real, o_v,
    HK: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OF_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads state and updates with `x`, `STEP` heads apart: up to its own update, or with `OF_KEYS` before it."""
    row, in_v = tl.arange(0, BT), o_v < V
    b_o = tl.zeros([BT, BV], dtype=tl.float32)
    b_A = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        in_k = o_k < K
        mask = real[:, None] & in_k[None, :]
        b_k = tl.load(k + row[:, None] * (HK * K) + o_k[None, :], mask=mask, other=0.0)
        b_S = tl.load(states + o_k[:, None] * V + o_v[None, :], mask=in_k[:, None] & in_v[None, :], other=0.0)
        if OF_KEYS:
            b_x = b_k
        else:
            b_x = tl.load(x + row[:, None] * (STEP * K) + o_k[None, :], mask=mask, other=0.0)
        b_o = tl.dot(b_x, b_S, b_o, input_precision=PRECISION)
        b_A = tl.dot(b_x, tl.trans(b_k), b_A, input_precision=PRECISION)
    if OF_KEYS:
        lower = row[:, None] > row[None, :]
    else:
        lower = row[:, None] >= row[None, :]
    b_u = tl.load(u + row[:, None] * (HK * V) + o_v[None, :], mask=real[:, None] & in_v[None, :], other=0.0)
    b_A = (b_A * decay_between(b_g, b_rest, lower)).to(b_u.dtype)
    return tl.dot(b_A, b_u, b_o * tl.exp2(b_g)[:, None], input_precision=PRECISION)


@triton.jit
def _store_moments(moments, token, i_v, b_v, b_p, real, V: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr):
    """Stores a score's sums over `WIDTH` columns of values and predictions `[N, BV]`: `[tokens, V / WIDTH, 4]`."""
    rows: tl.constexpr = b_v.shape[0]
    parts: tl.constexpr = BV // WIDTH
    b_v = tl.reshape(b_v.to(tl.float32), [rows, parts, WIDTH])
    b_p = tl.reshape(b_p, [rows, parts, WIDTH])
    part = i_v * parts + tl.arange(0, parts)
    p_m = moments + (token[:, None] * tl.cdiv(V, WIDTH) + part[None, :]) * 4
    mask = real[:, None] & (part < tl.cdiv(V, WIDTH))[None, :]
    b_d = b_v - b_p
    tl.store(p_m, tl.sum(b_v * b_p, 2), mask=mask)
    tl.store(p_m + 1, tl.sum(b_v * b_v, 2), mask=mask)
    tl.store(p_m + 2, tl.sum(b_p * b_p, 2), mask=mask)
    tl.store(p_m + 3, tl.sum(b_d * b_d, 2), mask=mask)


@triton.jit(do_not_specialize=["count"])
def score_fwd_kernel(moments, beta, scores, count, PARTS: tl.constexpr, SCORE: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of `count` tokens and heads. Adds the partial sums in order, so that every run keeps the same tokens."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    v_square, p_square, d_square = dot, dot, dot
    for part in tl.static_range(PARTS):
        p_m = moments + (i * PARTS + part) * 4
        dot += tl.load(p_m, mask=mask, other=0.0)
        v_square += tl.load(p_m + 1, mask=mask, other=0.0)
        p_square += tl.load(p_m + 2, mask=mask, other=0.0)
        d_square += tl.load(p_m + 3, mask=mask, other=0.0)
    v_norm, p_norm, d_norm = tl.sqrt(v_square), tl.sqrt(p_square), tl.sqrt(d_square)
    if SCORE == "cosine":
        score = (1.0 - dot / tl.maximum(v_norm * p_norm, COSINE_EPS)) / 2.0
    elif SCORE == "l2":
        score = d_norm / tl.maximum(v_norm + p_norm, COSINE_EPS)
        score = score * score
    else:
        residual = tl.load(beta + i, mask=mask, other=0.0) * d_norm
        score = residual / (residual + tl.maximum(v_norm, COSINE_EPS))
    # NaN counts as 1, so that no threshold drops it unseen.
    score = tl.where(score == score, tl.minimum(tl.maximum(score, 0.0), 1.0), 1.0)
    tl.store(scores + i, score, mask=mask)


@tuned(
    tile_configs(warps=(4,), stages=(2, 3), BV=(32, 64, 128)),
    key=["HK", "GROUP", "K", "V", "BT"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT"])
def output_fwd_kernel(
    q, k, v, u, gc, states, o, prediction, moments, borders, scale, T, NT,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BV` columns of one chunk: the prediction, its moments or neither, and the outputs of a group of query heads."""
    i_v, i_c = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_h = tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
    row, o_v = tl.arange(0, BT), i_v * BV + tl.arange(0, BV)
    real = row < end - start
    mask = real[:, None] & (o_v < V)[None, :]
    head = start * HK + i_h
    b_g, b_rest = load_sums(gc, head + row * HK, real)
    k += head * K
    u += head * V
    states += (i_c.to(tl.int64) * HK + i_h) * (K * V)

    if prediction is not None or moments is not None:
        b_p = _read(k, k, u, states, b_g, b_rest, real, o_v, HK, HK, K, V, BT, BK, BV, True, PRECISION)
        offsets = row[:, None] * (HK * V) + o_v[None, :]
        if moments is None:
            tl.store(prediction + head * V + offsets, b_p.to(prediction.dtype.element_ty), mask=mask)
        else:
            b_v = tl.load(v + head * V + offsets, mask=mask, other=0.0)
            _store_moments(moments, head + row * HK, i_v, b_v, b_p, real, V, BV, WIDTH)
    for i_q in range(GROUP):
        query = head * GROUP + i_q
        b_o = _read(
            q + query * K, k, u, states, b_g, b_rest, real, o_v, HK, HK * GROUP, K, V, BT, BK, BV, False, PRECISION
        )
        p_o = o + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :]
        tl.store(p_o, (b_o * scale).to(o.dtype.element_ty), mask=mask)


@tuned(tile_configs(warps=(4, 1), stages=(1,), BV=(32, 16, 8)), key=["HK", "GROUP", "K", "V", "bucket"])
@triton.jit(do_not_specialize=["bucket"])
def step_fwd_kernel(
    q, k, v, g, beta, initial_state, o, prediction, moments, final_state, scale, bucket,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One token: applies the recurrence to `BV` columns of the state, which it reads and writes once."""
    i_v, i_bh = tl.program_id(0) % tl.cdiv(V, BV), (tl.program_id(0) // tl.cdiv(V, BV)).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    square, in_square = o_k[:, None] * V + o_v[None, :], in_k[:, None] & in_v[None, :]
    b_k = tl.load(k + i_bh * K + o_k, mask=in_k, other=0.0).to(tl.float32)[:, None]
    b_v = tl.load(v + i_bh * V + o_v, mask=in_v, other=0.0).to(tl.float32)
    b_S = tl.zeros([BK, BV], dtype=tl.float32)
    if initial_state is not None:
        b_S += tl.load(initial_state + i_bh * (K * V) + square, mask=in_square, other=0.0)
        b_S *= tl.exp2(tl.load(g + i_bh) * LOG2E)
    b_p = tl.sum(b_S * b_k, 0)
    b_S += b_k * (tl.load(beta + i_bh) * (b_v - b_p))[None, :]
    if prediction is not None:
        tl.store(prediction + i_bh * V + o_v, b_p.to(prediction.dtype.element_ty), mask=in_v)
    if moments is not None:
        one = tl.arange(0, 1)
        _store_moments(moments, i_bh + one, i_v, b_v[None, :], b_p[None, :], one == 0, V, BV, WIDTH)
    tl.store(final_state + i_bh * (K * V) + square, b_S, mask=in_square)
    for i_q in tl.static_range(GROUP):
        query = i_bh * GROUP + i_q
        b_q = tl.load(q + query * K + o_k, mask=in_k, other=0.0).to(tl.float32)[:, None] * scale
        tl.store(o + query * V + o_v, tl.sum(b_S * b_q, 0).to(o.dtype.element_ty), mask=in_v)


def read_tile_width(dim: int) -> int:
    """Key columns that the output stage multiplies at once: half of the tile for all, see `SMALLEST_TILE`."""
    return max(16, min(64, tile_width(dim, MAX_HEAD_DIM) // 2))


def _prediction_and_moments(
    v: torch.Tensor, score: str | None, predict: bool, columns: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Allocates the kernel's output: the prediction, or the sums that a score needs, or neither."""
    if not predict:
        return None, None
    if score is None:
        return torch.empty_like(v, dtype=torch.float32), None
    return None, v.new_empty(*v.shape[:3], triton.cdiv(v.shape[3], columns), 4, dtype=torch.float32)


def score_fwd(moments: torch.Tensor, beta: torch.Tensor, score: str) -> torch.Tensor:
    """Computes scores `[B, T, Hk]` float32 from the partial sums `[B, T, Hk, parts, 4]`."""
    scores, block = torch.empty_like(beta), 256
    score_fwd_kernel[(triton.cdiv(beta.numel(), block),)](
        moments, beta, scores, beta.numel(), PARTS=moments.shape[3], SCORE=score, BLOCK=block
    )
    return scores


def output_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    u: torch.Tensor,
    gc: torch.Tensor,
    states: torch.Tensor,
    scale: float,
    chunks: Chunks,
    score: str | None,
    predict: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes outputs `[B, T, H, V]`, and predictions `[B, T, Hk, V]` float32, their scores or `None`."""
    o = u.new_empty(*q.shape[:3], u.shape[3])
    prediction, moments = _prediction_and_moments(v, score, predict, CHUNK_COLUMNS)
    output_fwd_kernel[lambda meta: (chunks.total * triton.cdiv(u.shape[3], meta["BV"]), k.shape[2])](
        q, k, v, u, gc, states, o, prediction, moments, chunks.borders, scale,
        GROUP=q.shape[2] // k.shape[2], V=u.shape[3], BK=read_tile_width(k.shape[3]), WIDTH=CHUNK_COLUMNS,
        **chunk_constants(k, u, chunks),
    )  # fmt: skip
    if score is not None and moments is not None:
        return o, score_fwd(moments, beta, score)
    return o, prediction


def step_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    scale: float,
    score: str | None,
    predict: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One token per row: output `[B, 1, H, V]`; prediction `[B, 1, Hk, V]`, its score or `None`; final state."""
    batch, _, kv_heads, key_dim = k.shape
    value_dim = v.shape[3]
    o = v.new_empty(*q.shape[:3], value_dim)
    prediction, moments = _prediction_and_moments(v, score, predict, STEP_COLUMNS)
    final_state = k.new_empty(batch, kv_heads, key_dim, value_dim, dtype=torch.float32)
    step_fwd_kernel[lambda meta: (batch * kv_heads * triton.cdiv(value_dim, meta["BV"]),)](
        q, k, v, g, beta, initial_state, o, prediction, moments, final_state, scale,
        bucket=next_bucket(batch * kv_heads), HK=kv_heads, GROUP=q.shape[2] // kv_heads, K=key_dim, V=value_dim,
        BK=tile_width(key_dim, MAX_HEAD_DIM), WIDTH=STEP_COLUMNS,
    )  # fmt: skip
    if score is not None and moments is not None:
        return o, score_fwd(moments, beta, score), final_state
    return o, prediction, final_state
