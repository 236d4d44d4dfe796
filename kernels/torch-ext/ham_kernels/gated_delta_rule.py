# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The gated delta rule with each token's prediction: forward and backward over chunks, and one step for decoding.

The stages are those of flash-linear-attention's `chunk_gated_delta_rule` (arXiv 2412.06464, section 3.3): the WY form
of a chunk, the state's recurrence over chunks, the output. They are written anew because the output stage also yields
the prediction and serves a group of query heads at once, because fla multiplies float32 in TF32, and because fla 0.6
refuses its gated backward on Hopper GPUs with Triton 3.4.0 to 3.7.0 (its issue 640): these miscompile a product whose
left operand is the transpose of a product. No kernel here has one: a transposed factor is computed as such.

Chunk of `BT` tokens, per key/value head, with `G` the running sum of `g` inside the chunk and `S` the state before it:

    A = strictly lower part of beta_i (k_i . k_j) exp(G_i - G_j),   M = (I + A)^-1
    w = M (beta exp(G) k),   u = M (beta v) - w S                   u_i = beta_i (v_i - prediction_i)
    prediction = (strictly lower part of k k^T exp(G_i - G_j)) u + exp(G) k S
    o = scale ((lower part of q k^T exp(G_i - G_j)) u + exp(G) q S)
    S' = exp(G_last) S + (exp(G_last - G) k)^T u
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .tuning import check_platform, next_bucket, tuned

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Rows solved one after another; blocks of them are merged by products.
BC: tl.constexpr = tl.constexpr(16)
CHUNK_SIZES = (16, 32, 64)
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCORES = ("cosine", "l2", "residual")
# Columns of the values that one partial sum of a score covers, whatever the tile: in chunks, and in a step.
CHUNK_COLUMNS, STEP_COLUMNS = 32, 8
# Below this product of norms a direction is rounding noise, so the cosine counts as 0.
COSINE_EPS: tl.constexpr = tl.constexpr(1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Arguments in capitals are constants of the compilation: `HK` key/value heads, `GROUP` query heads to each,
# `K` and `V` head dimensions, `BT` tokens of a chunk, `BK`, `BV` tile widths. `T` and `NT` are tokens and chunks of a
# row, `bucket` stands for the number of programs. Gates are float32; `gc` `[B, T, HK, 2]` holds the running sum of `g`
# in units of log 2, in float32, and what rounding it left out: decays are small differences of these large sums.
# A program's tokens are `start <= t < end`, and what lies past `end` is loaded as zero.
# ---------------------------------------------------------------------------------------------------------------------


def _configs(warps: tuple[int, ...], stages: tuple[int, ...], **tiles: tuple[int, ...]) -> list[triton.Config]:
    """Every combination; what stands first is taken where nothing is measured."""
    shapes = [dict(zip(tiles, sizes, strict=True)) for sizes in itertools.product(*tiles.values())]
    return [triton.Config(x, num_warps=w, num_stages=s) for x in shapes for w in warps for s in stages]


def _no_wider_than_a_head(
    configs: list[triton.Config], arguments: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """Those with tiles no wider than keys and values are: others are slower, or wrong, see `SMALLEST_TILE`."""
    widest = _tile(min(constants["K"], constants["V"]), MAX_HEAD_DIM)
    return [x for x in configs if x.kwargs["BV"] <= widest] or configs[:1]


NO_WIDER = {"early_config_prune": _no_wider_than_a_head}


@triton.jit
def _chunk(borders, i_c, T, NT, BT: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk `i_c` and the one past its last."""
    if PACKED:
        start = tl.load(borders + i_c)
        end = tl.load(borders + i_c + 1)
    else:
        i_b = i_c // NT
        start = i_b.to(tl.int64) * T + (i_c - i_b * NT) * BT
        end = tl.minimum(start + BT, (i_b + 1).to(tl.int64) * T)
    return start, end


@triton.jit
def _sequence(sequences, i_n, T, NT, PACKED: tl.constexpr):
    """First token of sequence `i_n` and the one past its last, its first chunk, the rows of its end states (or -1)."""
    if PACKED:
        begin = tl.load(sequences + i_n * 5)
        end = tl.load(sequences + i_n * 5 + 1)
        first = tl.load(sequences + i_n * 5 + 2)
        row_in = tl.load(sequences + i_n * 5 + 3)
        row_out = tl.load(sequences + i_n * 5 + 4)
    else:
        row_in = i_n.to(tl.int64)
        row_out = row_in
        begin = row_in * T
        end = begin + T
        first = row_in * NT
    return begin, end, first, row_in, row_out


@triton.jit
def _load_sums(gc, token, mask):
    """`G` of tokens (counted in heads): rounded, and the rest. Past the end nothing is left of what came before."""
    return tl.load(gc + 2 * token, mask=mask, other=-1e30), tl.load(gc + 2 * token + 1, mask=mask, other=0.0)


@triton.jit
def _decay(b_g, b_rest, lower):
    """`exp(G_i - G_j)` where `lower`, 0 elsewhere; masked first: above the diagonal it may overflow."""
    b_d = (b_g[:, None] - b_g[None, :]) + (b_rest[:, None] - b_rest[None, :])
    return tl.exp2(tl.where(lower, b_d, float("-inf")))


@triton.jit
def _to_end(gc, b_g, b_rest, last, real):
    """`exp(G_last - G)` of a chunk's tokens, and `exp(G_last)`; `last` is its last token (counted in heads)."""
    g_last, rest = tl.load(gc + 2 * last), tl.load(gc + 2 * last + 1)
    b_d = tl.where(real, (g_last - b_g) + (rest - b_rest), float("-inf"))
    return tl.exp2(b_d), tl.exp2(g_last)


# On an H200 4 warps were faster than 2 for every kernel of the forward; nobody has measured them elsewhere.
@tuned(_configs(warps=(4,), stages=(2, 3)), key=["HK", "K", "BT"])
@triton.jit(do_not_specialize=["T", "NT"])
def wy_inverse_fwd_kernel(
    k, g, beta, gc, inverse, diagonal, borders, T, NT,
    HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gc` and `M = (I + A)^-1` of one chunk: its diagonal blocks by substitution, the rest by products of blocks."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row = tl.arange(0, BT)
    real = row < end - start
    k += (start * HK + i_h) * K
    g += start * HK + i_h
    gc += 2 * (start * HK + i_h)
    beta += start * HK + i_h
    inverse += (start * HK + i_h) * BT
    diagonal += (i_c.to(tl.int64) * HK + i_h) * (BT * BC)

    b_sum = tl.cumsum(tl.load(g + row * HK, mask=real, other=0.0).to(tl.float64), 0) * LOG2E
    b_g = b_sum.to(tl.float32)
    b_rest = (b_sum - b_g.to(tl.float64)).to(tl.float32)
    tl.store(gc + 2 * row * HK, b_g, mask=real)
    tl.store(gc + 2 * row * HK + 1, b_rest, mask=real)
    b_beta = tl.load(beta + row * HK, mask=real, other=0.0)
    b_A = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = tl.load(k + row[:, None] * (HK * K) + o_k[None, :], mask=real[:, None] & (o_k < K)[None, :], other=0.0)
        b_A = tl.dot(b_k, tl.trans(b_k), b_A, input_precision=PRECISION)
    b_A *= _decay(b_g, b_rest, row[:, None] > row[None, :]) * b_beta[:, None]

    # The blocks lie side by side in `b_D` [BC, BT], so that one step solves a row of each.
    block, inner, o_i = row // BC, row % BC, tl.arange(0, BC)
    same = block[:, None] == block[None, :]
    tl.store(diagonal + row[:, None] * BC + inner[None, :], b_A, mask=same)
    tl.debug_barrier()
    b_D = tl.where(o_i[:, None] == inner[None, :], 1.0, 0.0)
    for i in range(1, BC):
        b_a = tl.load(diagonal + (block * BC + i)[None, :] * BC + o_i[:, None])
        b_D = tl.where(o_i[:, None] == i, b_D - tl.sum(b_a * b_D, 0)[None, :], b_D)
    tl.debug_barrier()
    tl.store(diagonal + (block * BC)[None, :] * BC + o_i[:, None] * BC + inner[None, :], b_D)
    tl.debug_barrier()
    b_M = tl.load(diagonal + row[:, None] * BC + inner[None, :], mask=same, other=0.0)
    if BT > BC:
        # I + A = (I + Ad)(I + N), Ad the block diagonal, N = (I + Ad)^-1 (A - Ad). With up to 4 blocks N^4 = 0.
        b_N = tl.dot(b_M, tl.where(same, 0.0, b_A), input_precision=PRECISION)
        b_N2 = tl.dot(b_N, b_N, input_precision=PRECISION)
        b_N = b_N2 - b_N - tl.dot(b_N2, b_N, input_precision=PRECISION)
        b_M += tl.dot(b_N, b_M, input_precision=PRECISION)
    tl.store(inverse + row[:, None] * (HK * BT) + row[None, :], b_M.to(inverse.dtype.element_ty), mask=real[:, None])


@tuned(_configs(warps=(4,), stages=(2, 3)), key=["HK", "K", "V", "BT"])
@triton.jit(do_not_specialize=["T", "NT"])
def wy_apply_fwd_kernel(
    k, v, beta, gc, inverse, w, u, borders, T, NT,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`w = M (beta exp(G) k)` and `M (beta v)` of one chunk."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row = tl.arange(0, BT)
    real = row < end - start
    head = start * HK + i_h
    k += head * K
    w += head * K
    v += head * V
    u += head * V
    inverse += head * BT
    b_beta = tl.load(beta + head + row * HK, mask=real, other=0.0)
    b_M = tl.load(inverse + row[:, None] * (HK * BT) + row[None, :], mask=real[:, None], other=0.0)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        offsets, mask = row[:, None] * (HK * V) + o_v[None, :], real[:, None] & (o_v < V)[None, :]
        b_v = tl.load(v + offsets, mask=mask, other=0.0)
        b_u = tl.dot(b_M, (b_v * b_beta[:, None]).to(b_v.dtype), input_precision=PRECISION)
        tl.store(u + offsets, b_u.to(u.dtype.element_ty), mask=mask)
    b_in = b_beta * tl.exp2(tl.load(gc + 2 * (head + row * HK), mask=real, other=0.0))
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        offsets, mask = row[:, None] * (HK * K) + o_k[None, :], real[:, None] & (o_k < K)[None, :]
        b_k = tl.load(k + offsets, mask=mask, other=0.0)
        b_w = tl.dot(b_M, (b_k * b_in[:, None]).to(b_k.dtype), input_precision=PRECISION)
        tl.store(w + offsets, b_w.to(w.dtype.element_ty), mask=mask)


@tuned(
    _configs(warps=(4,), stages=(2, 3), BV=(32, 64)),
    key=["HK", "K", "V", "BT", "PACKED", "bucket"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT", "bucket"])
def state_fwd_kernel(
    k, w, u, gc, u_out, states, initial_state, final_state, sequences, T, NT, bucket,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of a sequence with `BV` columns of the state; leaves the state before each chunk, and `u`."""
    i_v, i_nh = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_n, i_h = i_nh // HK, i_nh % HK
    begin, end, first, row_in, row_out = _sequence(sequences, i_n, T, NT, PACKED)
    row, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    square, in_square = o_k[:, None] * V + o_v[None, :], in_k[:, None] & in_v[None, :]
    b_S = tl.zeros([BK, BV], dtype=tl.float32)
    if initial_state is not None:
        p_S = initial_state + (row_in * HK + i_h) * (K * V) + square
        b_S += tl.load(p_S, mask=in_square & (row_in >= 0), other=0.0)
    for i_t in range(0, tl.cdiv(end - begin, BT).to(tl.int32)):
        p_state = states + ((first + i_t) * HK + i_h) * (K * V) + square
        tl.store(p_state, b_S.to(states.dtype.element_ty), mask=in_square)
        start = begin + i_t * BT
        head = start * HK + i_h
        real = row < end - start
        b_w = tl.load(
            w + head * K + row[:, None] * (HK * K) + o_k[None, :], mask=real[:, None] & in_k[None, :], other=0.0
        )
        offsets, mask = row[:, None] * (HK * V) + o_v[None, :], real[:, None] & in_v[None, :]
        b_u = tl.load(u + head * V + offsets, mask=mask, other=0.0)
        b_u = b_u - tl.dot(b_w, b_S.to(b_w.dtype), input_precision=PRECISION)
        tl.store(u_out + head * V + offsets, b_u.to(u_out.dtype.element_ty), mask=mask)
        b_g, b_rest = _load_sums(gc, head + row * HK, real)
        b_out, across = _to_end(gc, b_g, b_rest, head + (tl.minimum(end - start, BT) - 1) * HK, real)
        b_u = (b_u * b_out[:, None]).to(b_w.dtype)
        b_kT = tl.load(
            k + head * K + o_k[:, None] + row[None, :] * (HK * K), mask=in_k[:, None] & real[None, :], other=0.0
        )
        b_S = tl.dot(b_kT, b_u, b_S * across, input_precision=PRECISION)
    tl.store(final_state + (row_out * HK + i_h) * (K * V) + square, b_S, mask=in_square & (row_out >= 0))


@triton.jit
def _read(
    x, k, u, states, b_g, b_rest, real, o_v,
    HK: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OF_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What vectors `x`, `STEP` heads apart, read from the state and the updates up to their own; keys, before it."""
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
    b_A = (b_A * _decay(b_g, b_rest, lower)).to(b_u.dtype)
    return tl.dot(b_A, b_u, b_o * tl.exp2(b_g)[:, None], input_precision=PRECISION)


@triton.jit
def _store_moments(moments, token, i_v, b_v, b_p, real, V: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr):
    """What a score needs of values and predictions `[N, BV]`: sums over `WIDTH` columns, `[tokens, V / WIDTH, 4]`."""
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
    """The scores of `count` tokens and heads: adds the partial sums in order, so that every run keeps the same."""
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
    # What is not a number counts as 1, so that no threshold drops it unseen.
    score = tl.where(score == score, tl.minimum(tl.maximum(score, 0.0), 1.0), 1.0)
    tl.store(scores + i, score, mask=mask)


@tuned(
    _configs(warps=(4,), stages=(2, 3), BV=(32, 64, 128)),
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
    """The prediction, its moments or neither, and a group of query heads' outputs, in `BV` columns of one chunk."""
    i_v, i_c = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_h = tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row, o_v = tl.arange(0, BT), i_v * BV + tl.arange(0, BV)
    real = row < end - start
    mask = real[:, None] & (o_v < V)[None, :]
    head = start * HK + i_h
    b_g, b_rest = _load_sums(gc, head + row * HK, real)
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


@tuned(_configs(warps=(4, 1), stages=(1,), BV=(32, 16, 8)), key=["HK", "GROUP", "K", "V", "bucket"])
@triton.jit(do_not_specialize=["bucket"])
def step_fwd_kernel(
    q, k, v, g, beta, initial_state, o, prediction, moments, final_state, scale, bucket,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One token: the recurrence itself on `BV` columns of the state, which is read and written once."""
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


@tuned(
    _configs(warps=(4, 2), stages=(2,), BV=(64, 128, 32)),
    key=["HK", "GROUP", "K", "V", "BT"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT"])
def local_bwd_kernel(
    q, k, gc, do, du, borders, scale, T, NT,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of its own chunk send to `u`, summed over a group of query heads."""
    i_v, i_c = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_h = tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    real, in_k, in_v = row < end - start, o_k < K, o_v < V
    mask_k, mask_v = real[:, None] & in_k[None, :], real[:, None] & in_v[None, :]
    head = start * HK + i_h
    b_k = tl.load(k + head * K + row[:, None] * (HK * K) + o_k[None, :], mask=mask_k, other=0.0)
    b_g, b_rest = _load_sums(gc, head + row * HK, real)
    # Row j, column i: token i reads the update of token j <= i.
    b_decay = _decay(-b_g, -b_rest, row[:, None] <= row[None, :]) * scale
    b_du = tl.zeros([BT, BV], dtype=tl.float32)
    for i_q in range(GROUP):
        query = start * (HK * GROUP) + i_h * GROUP + i_q
        b_q = tl.load(q + query * K + row[:, None] * (HK * GROUP * K) + o_k[None, :], mask=mask_k, other=0.0)
        b_do = tl.load(do + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :], mask=mask_v, other=0.0)
        b_A = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_decay
        b_du = tl.dot(b_A.to(b_do.dtype), b_do, b_du, input_precision=PRECISION)
    tl.store(du + head * V + row[:, None] * (HK * V) + o_v[None, :], b_du.to(du.dtype.element_ty), mask=mask_v)


@tuned(
    _configs(warps=(4, 2), stages=(2, 3), BV=(32, 64)),
    key=["HK", "GROUP", "K", "V", "BT", "PACKED", "bucket"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT", "bucket"])
def state_bwd_kernel(
    q, k, w, gc, do, du, du_out, dstates, dfinal_state, dinitial_state, sequences, scale, T, NT, bucket,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks back over the chunks with `BV` columns of the state's gradient; leaves that after each chunk, and `du`."""
    i_v, i_nh = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_n, i_h = i_nh // HK, i_nh % HK
    begin, end, first, row_in, row_out = _sequence(sequences, i_n, T, NT, PACKED)
    row, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    square, in_square = o_k[:, None] * V + o_v[None, :], in_k[:, None] & in_v[None, :]
    b_dS = tl.zeros([BK, BV], dtype=tl.float32)
    if dfinal_state is not None:
        p_dS = dfinal_state + (row_out * HK + i_h) * (K * V) + square
        b_dS += tl.load(p_dS, mask=in_square & (row_out >= 0), other=0.0)
    count = tl.cdiv(end - begin, BT).to(tl.int32)
    for i in range(0, count):
        i_t = count - 1 - i
        p_dstate = dstates + ((first + i_t) * HK + i_h) * (K * V) + square
        tl.store(p_dstate, b_dS.to(dstates.dtype.element_ty), mask=in_square)
        start = begin + i_t * BT
        head = start * HK + i_h
        real = row < end - start
        mask_v = real[:, None] & in_v[None, :]
        p_k = k + head * K + row[:, None] * (HK * K) + o_k[None, :]
        b_k = tl.load(p_k, mask=real[:, None] & in_k[None, :], other=0.0)
        b_du = tl.dot(b_k, b_dS.to(b_k.dtype), input_precision=PRECISION)
        b_g, b_rest = _load_sums(gc, head + row * HK, real)
        b_out, across = _to_end(gc, b_g, b_rest, head + (tl.minimum(end - start, BT) - 1) * HK, real)
        b_du *= b_out[:, None]
        offsets = row[:, None] * (HK * V) + o_v[None, :]
        b_du += tl.load(du + head * V + offsets, mask=mask_v, other=0.0)
        tl.store(du_out + head * V + offsets, b_du.to(du_out.dtype.element_ty), mask=mask_v)

        b_dS *= across
        mask_kT = in_k[:, None] & real[None, :]
        b_wT = tl.load(w + head * K + o_k[:, None] + row[None, :] * (HK * K), mask=mask_kT, other=0.0)
        b_dS = tl.dot(b_wT, (-b_du).to(b_wT.dtype), b_dS, input_precision=PRECISION)
        b_in = (tl.exp2(b_g) * scale)[:, None]
        for i_q in range(GROUP):
            query = start * (HK * GROUP) + i_h * GROUP + i_q
            b_qT = tl.load(q + query * K + o_k[:, None] + row[None, :] * (HK * GROUP * K), mask=mask_kT, other=0.0)
            b_do = tl.load(do + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_dS = tl.dot(b_qT, (b_do * b_in).to(b_qT.dtype), b_dS, input_precision=PRECISION)
    if dinitial_state is not None:
        p_dS = dinitial_state + (row_in * HK + i_h) * (K * V) + square
        tl.store(p_dS, b_dS, mask=in_square & (row_in >= 0))


@tuned(
    _configs(warps=(4, 2), stages=(2, 3), BV=(32, 64)), key=["HK", "GROUP", "K", "V", "BT"], prune_configs_by=NO_WIDER
)
@triton.jit(do_not_specialize=["T", "NT", "tokens"])
def key_bwd_kernel(
    q, k, u, gc, states, do, du, dstates, dk, dw, dg, borders, scale, T, NT, tokens,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a chunk's `w` in `BK` columns; that of `k` but for its part by way of `w`, `M`; a part of `G`'s."""
    i_k, i_c = tl.program_id(0) % tl.cdiv(K, BK), tl.program_id(0) // tl.cdiv(K, BK)
    i_h = tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row, o_k = tl.arange(0, BT), i_k * BK + tl.arange(0, BK)
    real, in_k = row < end - start, o_k < K
    head = start * HK + i_h
    offsets_k, mask_k = row[:, None] * (HK * K) + o_k[None, :], real[:, None] & in_k[None, :]
    u += head * V
    du += head * V
    states += (i_c.to(tl.int64) * HK + i_h) * (K * V)
    dstates += (i_c.to(tl.int64) * HK + i_h) * (K * V)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_dw = tl.zeros([BT, BK], dtype=tl.float32)
    b_across = tl.zeros([BK], dtype=tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        in_v = o_v < V
        offsets_v, mask_v = row[:, None] * (HK * V) + o_v[None, :], real[:, None] & in_v[None, :]
        squareT, in_square = o_k[None, :] * V + o_v[:, None], in_k[None, :] & in_v[:, None]
        b_ST = tl.load(states + squareT, mask=in_square, other=0.0)
        b_dST = tl.load(dstates + squareT, mask=in_square, other=0.0)
        b_u = tl.load(u + offsets_v, mask=mask_v, other=0.0)
        b_du = tl.load(du + offsets_v, mask=mask_v, other=0.0)
        b_across += tl.sum(b_ST.to(tl.float32) * b_dST.to(tl.float32), 0)
        b_dk = tl.dot(b_u, b_dST, b_dk, input_precision=PRECISION)
        b_dw = tl.dot(b_du, b_ST, b_dw, input_precision=PRECISION)
    tl.store(dw + head * K + offsets_k, (-b_dw).to(dw.dtype.element_ty), mask=mask_k)

    b_g, b_rest = _load_sums(gc, head + row * HK, real)
    last = tl.minimum(end - start, BT) - 1
    b_out, across = _to_end(gc, b_g, b_rest, head + last * HK, real)
    b_dk *= b_out[:, None]
    b_share = tl.sum(b_dk * tl.load(k + head * K + offsets_k, mask=mask_k, other=0.0), 1)
    dg_last = tl.sum(b_across, 0) * across + tl.sum(b_share, 0)
    tl.store(
        dg + i_k.to(tl.int64) * tokens * HK + head + row * HK, tl.where(row == last, dg_last, 0.0) - b_share, mask=real
    )

    for i_q in range(GROUP):
        query = head * GROUP + i_q
        # Row j, column i: computed, not transposed (see the head of this file).
        b_dA = tl.zeros([BT, BT], dtype=tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            mask_v = real[:, None] & (o_v < V)[None, :]
            b_do = tl.load(do + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_u = tl.load(u + row[:, None] * (HK * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_dA = tl.dot(b_u, tl.trans(b_do), b_dA, input_precision=PRECISION)
        b_g, b_rest = _load_sums(gc, head + row * HK, real)
        b_dA *= _decay(-b_g, -b_rest, row[:, None] <= row[None, :]) * scale
        b_q = tl.load(q + query * K + row[:, None] * (HK * GROUP * K) + o_k[None, :], mask=mask_k, other=0.0)
        b_dk = tl.dot(b_dA.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    tl.store(dk + head * K + offsets_k, b_dk.to(dk.dtype.element_ty), mask=mask_k)


@tuned(
    _configs(warps=(4, 2), stages=(2, 3), BV=(32, 64)),
    key=["HK", "GROUP", "K", "V", "BT"],
    restore_value=["dg"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT", "tokens"])
def query_bwd_kernel(
    q, k, u, gc, states, do, dq, dg, borders, scale, T, NT, tokens,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a chunk's `q` in `BK` columns; adds the outputs' part of `G`'s to `dg`."""
    i_k, i_c = tl.program_id(0) % tl.cdiv(K, BK), tl.program_id(0) // tl.cdiv(K, BK)
    i_h = tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row, o_k = tl.arange(0, BT), i_k * BK + tl.arange(0, BK)
    real, in_k = row < end - start, o_k < K
    head = start * HK + i_h
    offsets_k, mask_k = row[:, None] * (HK * K) + o_k[None, :], real[:, None] & in_k[None, :]
    u += head * V
    states += (i_c.to(tl.int64) * HK + i_h) * (K * V)
    gates = i_k.to(tl.int64) * tokens * HK + head + row * HK
    b_g, b_rest = _load_sums(gc, head + row * HK, real)
    b_dg = tl.load(dg + gates, mask=real, other=0.0)
    for i_q in range(GROUP):
        query = head * GROUP + i_q
        b_dq = tl.zeros([BT, BK], dtype=tl.float32)
        b_dA = tl.zeros([BT, BT], dtype=tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            in_v = o_v < V
            mask_v = real[:, None] & in_v[None, :]
            squareT, in_square = o_k[None, :] * V + o_v[:, None], in_k[None, :] & in_v[:, None]
            b_do = tl.load(do + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_u = tl.load(u + row[:, None] * (HK * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_ST = tl.load(states + squareT, mask=in_square, other=0.0)
            b_dq = tl.dot(b_do, b_ST, b_dq, input_precision=PRECISION)
            b_dA = tl.dot(b_do, tl.trans(b_u), b_dA, input_precision=PRECISION)
        offsets_q = row[:, None] * (HK * GROUP * K) + o_k[None, :]
        b_q = tl.load(q + query * K + offsets_q, mask=mask_k, other=0.0)
        b_dq *= (tl.exp2(b_g) * scale)[:, None]
        b_dg += tl.sum(b_dq * b_q, 1)
        b_k = tl.load(k + head * K + offsets_k, mask=mask_k, other=0.0)
        b_dA *= _decay(b_g, b_rest, row[:, None] >= row[None, :]) * scale
        b_dq = tl.dot(b_dA.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        # Rows and columns must lose the same numbers, or what cancels in sums of `dg` would not.
        b_dA *= tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dg += tl.sum(b_dA, 1) - tl.sum(b_dA, 0)
        tl.store(dq + query * K + offsets_q, b_dq.to(dq.dtype.element_ty), mask=mask_k)
    tl.store(dg + gates, b_dg, mask=real)


@tuned(_configs(warps=(4, 2), stages=(2, 3)), key=["HK", "K", "V", "BT"], restore_value=["dk"])
@triton.jit(do_not_specialize=["T", "NT", "tokens"])
def wy_bwd_kernel(
    k, v, beta, gc, inverse, dw, du, dg_parts, dA, dk, dv, dg, dbeta, borders, T, NT, tokens,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk through its WY form; adds those of the output stage: `dk` is completed in place."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, end = _chunk(borders, i_c, T, NT, BT, PACKED)
    row = tl.arange(0, BT)
    real = row < end - start
    head = start * HK + i_h
    k += head * K
    dk += head * K
    dw += head * K
    v += head * V
    dv += head * V
    du += head * V
    b_beta = tl.load(beta + head + row * HK, mask=real, other=0.0)
    b_in = tl.exp2(tl.load(gc + 2 * (head + row * HK), mask=real, other=-1e30))
    p_MT = inverse + head * BT + row[:, None] + row[None, :] * (HK * BT)
    b_MT = tl.load(p_MT, mask=real[None, :], other=0.0)

    b_dM = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        offsets, mask = row[:, None] * (HK * K) + o_k[None, :], real[:, None] & (o_k < K)[None, :]
        b_k = tl.load(k + offsets, mask=mask, other=0.0)
        b_dw = tl.load(dw + offsets, mask=mask, other=0.0)
        b_dM = tl.dot(b_dw, tl.trans(b_k), b_dM, input_precision=PRECISION)
    b_dM *= (b_in * b_beta)[None, :]
    b_dMv = tl.zeros([BT, BT], dtype=tl.float32)
    b_dbeta = tl.zeros([BT], dtype=tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        offsets, mask = row[:, None] * (HK * V) + o_v[None, :], real[:, None] & (o_v < V)[None, :]
        b_v = tl.load(v + offsets, mask=mask, other=0.0)
        b_du = tl.load(du + offsets, mask=mask, other=0.0)
        b_dMv = tl.dot(b_du, tl.trans(b_v), b_dMv, input_precision=PRECISION)
        b_dv = tl.dot(b_MT, b_du, input_precision=PRECISION)
        b_dbeta += tl.sum(b_dv * b_v, 1)
        tl.store(dv + offsets, (b_dv * b_beta[:, None]).to(dv.dtype.element_ty), mask=mask)
    b_dM += b_dMv * b_beta[None, :]

    # Below the diagonal dA = -M^T dM M^T; times the decay it is the gradient of beta_i (k_i . k_j).
    lower = row[:, None] > row[None, :]
    b_dM = tl.where(lower, b_dM, 0.0).to(b_MT.dtype)
    b_dM = tl.dot(b_dM, b_MT, input_precision=PRECISION).to(b_MT.dtype)
    b_g, b_rest = _load_sums(gc, head + row * HK, real)
    b_dA = -tl.dot(b_MT, b_dM, input_precision=PRECISION) * _decay(b_g, b_rest, lower)
    # The transpose of beta_i dA_ij, for `k_j`, comes back from memory (see the head of this file).
    dA += head * BT
    tl.store(dA + row[:, None] * (HK * BT) + row[None, :], (b_dA * b_beta[:, None]).to(b_MT.dtype), mask=real[:, None])
    tl.debug_barrier()
    b_dAT = tl.load(dA + row[:, None] + row[None, :] * (HK * BT), mask=real[None, :], other=0.0)
    b_dA = b_dA.to(b_MT.dtype)

    b_dg = tl.zeros([BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        offsets, mask = row[:, None] * (HK * K) + o_k[None, :], real[:, None] & (o_k < K)[None, :]
        b_k = tl.load(k + offsets, mask=mask, other=0.0)
        b_dw = tl.load(dw + offsets, mask=mask, other=0.0)
        # By way of beta exp(G) k and of beta_i (k_i . k_j), before the factor beta_i; then as the k_j of later tokens.
        b_dk = tl.dot(b_MT, b_dw, input_precision=PRECISION) * b_in[:, None]
        b_dk = tl.dot(b_dA, b_k, b_dk, input_precision=PRECISION)
        b_share = tl.sum(b_dk * b_k, 1)
        b_dbeta += b_share
        b_later = tl.dot(b_dAT, b_k, input_precision=PRECISION)
        b_dg += b_share * b_beta - tl.sum(b_later * b_k, 1)
        b_dk = b_dk * b_beta[:, None] + b_later + tl.load(dk + offsets, mask=mask, other=0.0)
        tl.store(dk + offsets, b_dk.to(dk.dtype.element_ty), mask=mask)
    tl.store(dbeta + head + row * HK, b_dbeta, mask=real)

    for i in tl.static_range(PARTS):
        b_dg += tl.load(dg_parts + i * tokens.to(tl.int64) * HK + head + row * HK, mask=real, other=0.0)
    # `g_j` is part of every later sum `G_i`.
    b_dg = tl.sum(tl.where(row[:, None] >= row[None, :], b_dg[:, None], 0.0), 0)
    tl.store(dg + head + row * HK, b_dg, mask=real)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


class Chunks(NamedTuple):
    """How the tokens of `[B, T]` fall into chunks and sequences, as every kernel takes it.

    Without packing each row is one sequence and all is arithmetic. With it, chunk `c` is tokens `borders[c]` to
    `borders[c + 1]` of the flattened batch and `table` holds the five numbers of `_sequence` for each document.
    """

    size: int
    length: int
    per_row: int
    total: int
    sequences: int
    borders: torch.Tensor | None = None
    table: torch.Tensor | None = None


def split_rows(batch: int, length: int, size: int) -> Chunks:
    """Chunks of rows that are one sequence each."""
    per_row = triton.cdiv(length, size)
    return Chunks(size, length, per_row, batch * per_row, batch)


def split_documents(seq_idx: torch.Tensor, size: int) -> Chunks:
    """Chunks of documents: a border wherever `seq_idx` `[B, T]` changes. Waits for the device once, to count them."""
    batch, length = seq_idx.shape
    begins = torch.ones(batch, length, dtype=torch.bool, device=seq_idx.device)
    torch.ne(seq_idx[:, 1:], seq_idx[:, :-1], out=begins[:, 1:])
    begin = begins.cpu().flatten().nonzero().flatten()
    end = torch.cat([begin[1:], begin.new_tensor([batch * length])])
    chunks = (end - begin + size - 1) // size
    first = chunks.cumsum(0) - chunks
    none = torch.full_like(begin, -1)
    row_in = torch.where(begin % length == 0, begin // length, none)
    row_out = torch.where(end % length == 0, begin // length, none)
    document = torch.repeat_interleave(chunks)
    borders = begin[document] + (torch.arange(len(document)) - first[document]) * size
    borders = torch.cat([borders, end[-1:]]).to(seq_idx.device)
    table = torch.stack([begin, end, first, row_in, row_out], 1).to(seq_idx.device)
    return Chunks(size, length, 0, len(document), len(begin), borders, table)


# ptxas 12.8, which Triton 3.4 to 3.7 bring, compiles some pairs of Hopper's products so that the second reads a factor
# at an address that was never computed. It was seen where a tile of 16 columns, or one wider than what it is to hold,
# holds all of a head, where the narrower of keys and values had the narrower tile, and in the output stage where one
# tile holds all keys. No shape below has it: tests/ham_kernels/test_compile.py disassembles them to see.
SMALLEST_TILE = 32


def _tile(dim: int, largest: int) -> int:
    """The power of two that holds a dimension, within bounds."""
    return min(largest, max(SMALLEST_TILE, triton.next_power_of_2(dim)))


def _read_tile(dim: int) -> int:
    """Columns of keys that the output stage multiplies at once: half of what holds them, see `SMALLEST_TILE`."""
    return max(16, min(64, _tile(dim, MAX_HEAD_DIM) // 2))


def _shape(k: torch.Tensor, v: torch.Tensor, chunks: Chunks) -> dict[str, Any]:
    """The constants that every kernel over chunks takes."""
    return {
        "T": chunks.length,
        "NT": chunks.per_row,
        "HK": k.shape[2],
        "K": k.shape[3],
        "BT": chunks.size,
        "PACKED": chunks.borders is not None,
        # TF32 alone has 10 bits; three products of it restore those of float32. Of 16 bits, none is lost.
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",
    }


def wy_fwd(
    k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, v: torch.Tensor, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sums of the gates `[B, T, Hk, 2]` float32, and inverses `[B, T, Hk, BT]` in the dtype of `k`."""
    gc = g.new_empty(*g.shape, 2)
    inverse = k.new_empty(*k.shape[:3], chunks.size)
    diagonal = k.new_empty(chunks.total, k.shape[2], chunks.size, BC.value, dtype=torch.float32)
    wy_inverse_fwd_kernel[(chunks.total, k.shape[2])](
        k, g, beta, gc, inverse, diagonal, chunks.borders, BK=_tile(k.shape[3], 64), **_shape(k, v, chunks)
    )
    return gc, inverse


def state_fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    gc: torch.Tensor,
    inverse: torch.Tensor,
    initial_state: torch.Tensor | None,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`w` and updates `u` of each token, the state before each chunk `[chunks, Hk, K, V]`, each row's final state."""
    batch, _, kv_heads, key_dim = k.shape
    value_dim, shape = v.shape[3], _shape(k, v, chunks)
    w, from_values = torch.empty_like(k), torch.empty_like(v)
    narrower = _tile(min(key_dim, value_dim), 64)  # for both: see `SMALLEST_TILE`
    wy_apply_fwd_kernel[(chunks.total, kv_heads)](
        k, v, beta, gc, inverse, w, from_values, chunks.borders,
        V=value_dim, BK=narrower, BV=narrower, **shape,
    )  # fmt: skip
    u = torch.empty_like(v)
    states = k.new_empty(chunks.total, kv_heads, key_dim, value_dim)
    final_state = k.new_empty(batch, kv_heads, key_dim, value_dim, dtype=torch.float32)
    programs = chunks.sequences * kv_heads
    state_fwd_kernel[lambda meta: (programs * triton.cdiv(value_dim, meta["BV"]),)](
        k, w, from_values, gc, u, states, initial_state, final_state, chunks.table,
        bucket=next_bucket(programs), V=value_dim, BK=_tile(key_dim, MAX_HEAD_DIM), **shape,
    )  # fmt: skip
    return w, u, states, final_state


def _prediction_and_moments(
    v: torch.Tensor, score: str | None, predict: bool, columns: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where a kernel puts what it predicts: the prediction itself, or all that a score needs of it, or nowhere."""
    if not predict:
        return None, None
    if score is None:
        return torch.empty_like(v, dtype=torch.float32), None
    return None, v.new_empty(*v.shape[:3], triton.cdiv(v.shape[3], columns), 4, dtype=torch.float32)


def score_fwd(moments: torch.Tensor, beta: torch.Tensor, score: str) -> torch.Tensor:
    """Scores `[B, T, Hk]` float32 of the partial sums `[B, T, Hk, parts, 4]`."""
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
    """Outputs `[B, T, H, V]`, predictions `[B, T, Hk, V]` float32, or the scores of these, or `None`."""
    o = u.new_empty(*q.shape[:3], u.shape[3])
    prediction, moments = _prediction_and_moments(v, score, predict, CHUNK_COLUMNS)
    output_fwd_kernel[lambda meta: (chunks.total * triton.cdiv(u.shape[3], meta["BV"]), k.shape[2])](
        q, k, v, u, gc, states, o, prediction, moments, chunks.borders, scale,
        GROUP=q.shape[2] // k.shape[2], V=u.shape[3], BK=_read_tile(k.shape[3]), WIDTH=CHUNK_COLUMNS,
        **_shape(k, u, chunks),
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
    """Output `[B, 1, H, V]`, prediction `[B, 1, Hk, V]`, its score or `None`, and final state of one token a row."""
    batch, _, kv_heads, key_dim = k.shape
    value_dim = v.shape[3]
    o = v.new_empty(*q.shape[:3], value_dim)
    prediction, moments = _prediction_and_moments(v, score, predict, STEP_COLUMNS)
    final_state = k.new_empty(batch, kv_heads, key_dim, value_dim, dtype=torch.float32)
    step_fwd_kernel[lambda meta: (batch * kv_heads * triton.cdiv(value_dim, meta["BV"]),)](
        q, k, v, g, beta, initial_state, o, prediction, moments, final_state, scale,
        bucket=next_bucket(batch * kv_heads), HK=kv_heads, GROUP=q.shape[2] // kv_heads, K=key_dim, V=value_dim,
        BK=_tile(key_dim, MAX_HEAD_DIM), WIDTH=STEP_COLUMNS,
    )  # fmt: skip
    if score is not None and moments is not None:
        return o, score_fwd(moments, beta, score), final_state
    return o, prediction, final_state


def output_and_state_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    gc: torch.Tensor,
    states: torch.Tensor,
    do: torch.Tensor,
    dfinal_state: torch.Tensor | None,
    dinitial_state: torch.Tensor | None,
    scale: float,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of output and recurrence: `dq`, part of `dk`, `dw`, `du`, parts of `dg`; fills `dinitial_state`."""
    kv_heads, key_dim = k.shape[2:]
    value_dim, group = u.shape[3], q.shape[2] // kv_heads
    shape = {**_shape(k, u, chunks), "V": value_dim, "GROUP": group}
    du_chunk, du, dstates = torch.empty_like(u), torch.empty_like(u), torch.empty_like(states)
    local_bwd_kernel[lambda meta: (chunks.total * triton.cdiv(value_dim, meta["BV"]), kv_heads)](
        q, k, gc, do, du_chunk, chunks.borders, scale, BK=_tile(key_dim, MAX_HEAD_DIM), **shape
    )
    programs = chunks.sequences * kv_heads
    state_bwd_kernel[lambda meta: (programs * triton.cdiv(value_dim, meta["BV"]),)](
        q, k, w, gc, do, du_chunk, du, dstates, dfinal_state, dinitial_state, chunks.table, scale,
        bucket=next_bucket(programs), BK=_tile(key_dim, MAX_HEAD_DIM), **shape,
    )  # fmt: skip
    block = _tile(key_dim, 64)
    dq, dk, dw = torch.empty_like(q), torch.empty_like(k), torch.empty_like(w)
    dg_parts = gc.new_empty(triton.cdiv(key_dim, block), *gc.shape[:3])
    grid = (chunks.total * len(dg_parts), kv_heads)
    shape |= {"tokens": gc.shape[0] * gc.shape[1], "BK": block}
    key_bwd_kernel[grid](q, k, u, gc, states, do, du, dstates, dk, dw, dg_parts, chunks.borders, scale, **shape)
    query_bwd_kernel[grid](q, k, u, gc, states, do, dq, dg_parts, chunks.borders, scale, **shape)
    return dq, dk, dw, du, dg_parts


def wy_bwd(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    gc: torch.Tensor,
    inverse: torch.Tensor,
    dw: torch.Tensor,
    du: torch.Tensor,
    dk: torch.Tensor,
    dg_parts: torch.Tensor,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of the WY form: `dv`, `dg`, `dbeta`; completes `dk` in place."""
    dv, dg, dbeta = torch.empty_like(v), torch.empty_like(beta), torch.empty_like(beta)
    wy_bwd_kernel[(chunks.total, k.shape[2])](
        k, v, beta, gc, inverse, dw, du, dg_parts, torch.empty_like(inverse), dk, dv, dg, dbeta, chunks.borders,
        tokens=gc.shape[0] * gc.shape[1], V=v.shape[3], BK=_tile(k.shape[3], 64), BV=_tile(v.shape[3], 32),
        PARTS=len(dg_parts), **_shape(k, v, chunks),
    )  # fmt: skip
    return dv, dg, dbeta


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


class GatedDeltaRuleWithPredictionFunction(torch.autograd.Function):
    """Keeps the inputs, the gates' sums and the inverses; backward computes `w`, `u` and the states again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        scale: float,
        chunks: Chunks,
        score: str | None,
        predict: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Runs the three stages."""
        gc, inverse = wy_fwd(k, g, beta, v, chunks)
        _, u, states, final_state = state_fwd(k, v, beta, gc, inverse, initial_state, chunks)
        o, prediction = output_fwd(q, k, v, beta, u, gc, states, scale, chunks, score, predict)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, gc, inverse, chunks.borders, chunks.table)
        ctx.scale, ctx.chunks = scale, chunks._replace(borders=None, table=None)
        if prediction is not None and score is not None:
            ctx.mark_non_differentiable(prediction)
        ctx.set_materialize_grads(False)
        return o, prediction, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dprediction: torch.Tensor | None, dfinal_state: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Runs them backwards; what nobody asked a gradient of counts as zero."""
        q, k, v, g, beta, initial_state, gc, inverse, borders, table = ctx.saved_tensors
        chunks = ctx.chunks._replace(borders=borders, table=table)
        do = v.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.contiguous()
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
        if dprediction is not None:
            dprediction = dprediction * g.exp()[..., None]
            q, do = with_next_keys(q, k, do, dprediction / ctx.scale, chunks)
        w, u, states = state_fwd(k, v, beta, gc, inverse, initial_state, chunks)[:3]
        dq, dk, dw, du, dg_parts = output_and_state_bwd(
            q, k, w, u, gc, states, do, dfinal_state, dinitial_state, ctx.scale, chunks
        )
        dv, dg, dbeta = wy_bwd(k, v, beta, gc, inverse, dw, du, dk, dg_parts, chunks)
        if dprediction is not None:
            dq = prediction_bwd(dprediction, dq, k, initial_state, dk, dg, dinitial_state)
        return dq, dk, dv, dg, dbeta, dinitial_state, None, None, None, None


def with_next_keys(
    q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, dread: torch.Tensor, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and gradients of outputs with one more head a group, which reads the next token's prediction.

    A prediction is `exp(g_t)` times what the key reads from the state after the token before: an output like others,
    unless no token of the document comes before. `dread` `[B, T, Hk, V]` is the gradient of what the keys read.
    """
    kv_heads = k.shape[2]
    if chunks.table is not None:
        begins = torch.zeros(dread.shape[:2].numel(), dtype=torch.bool, device=k.device)
        begins[chunks.table[:, 0]] = True
        dread = dread.masked_fill(begins.view(*dread.shape[:2], 1, 1), 0)
    both = []
    for x, next_one in ((q, k), (do, dread.to(do.dtype))):
        extra = F.pad(next_one[:, 1:], (0, 0, 0, 0, 0, 1)).unsqueeze(3)
        both.append(torch.cat([x.unflatten(2, (kv_heads, -1)), extra], 3).flatten(2, 3))
    return both[0], both[1]


def prediction_bwd(
    dread: torch.Tensor,
    dq: torch.Tensor,
    k: torch.Tensor,
    initial_state: torch.Tensor | None,
    dk: torch.Tensor,
    dg: torch.Tensor,
    dinitial_state: torch.Tensor | None,
) -> torch.Tensor:
    """Splits the heads of `with_next_keys` off `dq`, and adds to `dk`, `dg` and `dinitial_state` what they brought."""
    dq = dq.unflatten(2, (k.shape[2], -1))
    through_keys = F.pad(dq[:, :-1, :, -1].float(), (0, 0, 0, 0, 1, 0))
    if initial_state is not None and dinitial_state is not None:
        through_keys[:, 0] = (initial_state @ dread[:, 0, :, :, None]).squeeze(-1)
        dinitial_state += k[:, 0, :, :, None].float() * dread[:, 0, :, None]
    dk += through_keys
    dg += (through_keys * k).sum(-1)
    return dq[:, :, :, :-1].flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------------------------------


def gated_delta_rule_with_prediction(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_size: int = 64,
    score: str | None = None,
    predict: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gated delta rule (arXiv 2412.06464), with what the state predicted for each token before it saw the value.

    Differentiable, also through the prediction, but not through a score. Everything is computed in the dtype of `v`
    with float32 sums, the recurrence in float32. Where nothing was stored, the prediction is exactly zero. Backward
    needs `K * V / chunk_size` numbers a token and key/value head, for the states, twice, and for a gradient of the
    prediction as much work as another query head. One token without a gradient to compute takes a single launch, and
    one more for a score.

    Args:
        q: `[B, T, H, K]`, L2-normalised by the caller; `H` is a multiple of `Hk`.
        k: `[B, T, Hk, K]`, L2-normalised by the caller; `K` at most 256.
        v: `[B, T, Hk, V]` float32, float16 or bfloat16; `V` at most 256.
        g: `[B, T, Hk]` decay in log space, at most 0; 0 for padding.
        beta: `[B, T, Hk]` write strength in (0, 1); 0 for padding.
        scale: factor of the output; `K ** -0.5` if `None`.
        initial_state: `[B, Hk, K, V]` float32; zeros if `None`.
        seq_idx: `[B, T]` int, document of each token, constant over padding; the state is cleared where it changes.
            Giving it makes the host wait for the device once.
        chunk_size: tokens solved at once, 16, 32 or 64; at most 32 are for float32 with `K` above 128.
        score: `"cosine"`, `"l2"` or `"residual"` returns that score of each prediction instead, computed from its
            float32; the prediction is then never written. What is not a number counts as 1.
        predict: `False` leaves the prediction out, for one who reads neither it nor a score: nothing is computed or
            written for it.

    Returns:
        `o` `[B, T, H, V]` in the dtype of `v`; `prediction` `[B, T, Hk, V]` float32, or the scores `[B, T, Hk]`
        float32 in `[0, 1]`, or `None` without `predict`; the final state `[B, Hk, K, V]` float32.

    Raises:
        ValueError: for shapes that do not fit, head dimensions above 256, other dtypes, chunk sizes or scores, a score
            without `predict`, or a CPU tensor outside Triton's interpreter.
    """
    _check_arguments(q, k, v, g, beta, initial_state, seq_idx, chunk_size)
    if score is not None and score not in SCORES:
        raise ValueError(f"`score` must be one of {', '.join(map(repr, SCORES))} or None, got {score!r}")
    if score is not None and not predict:
        raise ValueError(f"`predict` must be True with `score` {score!r}, got {predict!r}")
    check_platform(v.device)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(v.dtype).contiguous() for x in (q, k, v))
    g, beta = g.float().contiguous(), beta.float().contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    given = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    if v.shape[1] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return step_fwd(q, k, v, g, beta, initial_state, scale, score, predict)
    if v.dtype == torch.float32 and k.shape[3] > 128:
        chunk_size = min(chunk_size, 32)  # what a block of threads holds at once would not fit
    if seq_idx is None:
        chunks = split_rows(v.shape[0], v.shape[1], chunk_size)
    else:
        chunks = split_documents(seq_idx, chunk_size)
    return GatedDeltaRuleWithPredictionFunction.apply(q, k, v, g, beta, initial_state, scale, chunks, score, predict)


def _check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    chunk_size: int,
) -> None:
    if v.ndim != 4 or 0 in v.shape:
        raise ValueError(f"`v` must be [B, T, Hk, V] with no empty dimension, got {list(v.shape)}")
    if v.dtype not in DTYPES:
        raise ValueError(f"`v` must be float32, float16 or bfloat16, got {v.dtype}")
    batch, length, kv_heads, value_dim = v.shape
    if k.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"`k` must be [{batch}, {length}, {kv_heads}, K], got {list(k.shape)}")
    key_dim = k.shape[3]
    if not (1 <= key_dim <= MAX_HEAD_DIM and value_dim <= MAX_HEAD_DIM):
        raise ValueError(
            f"head dimensions must be at most {MAX_HEAD_DIM}, got K={key_dim} of `k`, V={value_dim} of `v`"
        )
    if q.ndim != 4 or q.shape[:2] != v.shape[:2] or q.shape[3] != key_dim or q.shape[2] % kv_heads or not q.shape[2]:
        raise ValueError(f"`q` must be [{batch}, {length}, a multiple of {kv_heads}, {key_dim}], got {list(q.shape)}")
    shapes = {
        "g": (g, [batch, length, kv_heads]),
        "beta": (beta, [batch, length, kv_heads]),
        "initial_state": (initial_state, [batch, kv_heads, key_dim, value_dim]),
        "seq_idx": (seq_idx, [batch, length]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"`{name}` must be {shape}, got {list(tensor.shape)}")
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"`chunk_size` must be one of {CHUNK_SIZES}, got {chunk_size!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The shipped shapes, for compiling ahead of time: bfloat16, one query head to each key/value head, rows that are one
# sequence.
# ---------------------------------------------------------------------------------------------------------------------


def _case(kernel: Any, dim: int, warps: int, stages: int, scored: bool = True, **constants: Any) -> dict[str, Any]:
    """One entry of `AOT_CASES`; what is neither a shape nor a table nor listed here is a bfloat16 tensor."""
    states = ("initial_state", "final_state", "dfinal_state", "dinitial_state")
    single = dict.fromkeys(
        ("g", "beta", "gc", "diagonal", "dg", "dg_parts", "dbeta", "prediction", "moments", "scores", *states), "*fp32"
    )
    scalars = dict.fromkeys(("T", "NT", "tokens", "bucket", "count"), "i32") | {"scale": "fp32"}
    fixed: dict[str, Any] = {
        "HK": 16,
        "GROUP": 1,
        "K": dim,
        "V": dim,
        "BT": 64,
        "BK": _tile(dim, 64),
        "BV": _tile(dim, 64),
        "PARTS": triton.cdiv(dim, 64),
    }
    fixed |= {"PACKED": False, "PRECISION": "tf32", "borders": None, "sequences": None}
    fixed["prediction" if scored else "moments"] = None
    fixed |= constants
    names = kernel.arg_names
    return {
        "kernel": kernel,
        "signature": {x: single.get(x) or scalars.get(x, "*bf16") for x in names if x not in fixed},
        "constexprs": {x: fixed[x] for x in names if x in fixed},
        "num_warps": warps,
        "num_stages": stages,
    }


AOT_CASES = [
    case
    for dim in (128, 64, 32, 16)
    for whole in [_tile(dim, MAX_HEAD_DIM)]
    for case in (
        _case(output_fwd_kernel, dim, 4, 2, BK=_read_tile(dim), BV=32, WIDTH=CHUNK_COLUMNS),
        _case(output_fwd_kernel, dim, 4, 2, BK=_read_tile(dim), BV=32, WIDTH=CHUNK_COLUMNS, GROUP=4),
        _case(output_fwd_kernel, dim, 4, 2, BK=_read_tile(dim), BV=32, WIDTH=CHUNK_COLUMNS, scored=False),
        _case(output_fwd_kernel, dim, 4, 2, BK=_read_tile(dim), BV=32, WIDTH=CHUNK_COLUMNS, moments=None),
        _case(score_fwd_kernel, dim, 4, 3, PARTS=triton.cdiv(dim, CHUNK_COLUMNS), SCORE="cosine", BLOCK=256),
        _case(wy_inverse_fwd_kernel, dim, 4, 2),
        _case(wy_apply_fwd_kernel, dim, 4, 2),
        _case(state_fwd_kernel, dim, 4, 2, BK=whole, BV=32),
        _case(step_fwd_kernel, dim, 4, 1, BK=whole, BV=32, WIDTH=STEP_COLUMNS),
        _case(step_fwd_kernel, dim, 4, 1, BK=whole, BV=32, WIDTH=STEP_COLUMNS, scored=False),
        _case(step_fwd_kernel, dim, 4, 1, BK=whole, BV=32, WIDTH=STEP_COLUMNS, moments=None),
        _case(local_bwd_kernel, dim, 4, 2, BK=whole),
        _case(local_bwd_kernel, dim, 4, 2, BK=whole, GROUP=4),
        _case(key_bwd_kernel, dim, 4, 2, BV=32),
        _case(key_bwd_kernel, dim, 4, 2, BV=32, GROUP=4),
        _case(state_bwd_kernel, dim, 4, 2, BK=whole, BV=32),
        _case(state_bwd_kernel, dim, 4, 2, BK=whole, BV=32, GROUP=4),
        _case(query_bwd_kernel, dim, 4, 2, BV=32),
        _case(query_bwd_kernel, dim, 4, 2, BV=32, GROUP=4),
        _case(wy_bwd_kernel, dim, 4, 2, BV=32),
    )
]
