# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The backward pass: through the outputs, the state's recurrence, the WY form and the prediction."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..tuning import next_bucket, tuned
from .chunks import (
    MAX_HEAD_DIM,
    NO_WIDER,
    Chunks,
    chunk_bounds,
    chunk_constants,
    decay_between,
    decay_to_end,
    load_sums,
    sequence_bounds,
    tile_configs,
    tile_width,
)


@tuned(
    tile_configs(warps=(4, 2), stages=(2,), BV=(64, 128, 32)),
    key=["HK", "GROUP", "K", "V", "BT"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT"])
def local_bwd_kernel(
    q, k, gc, do, du, borders, scale, T, NT,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of `u` through the outputs of its own chunk, summed over a group of query heads."""
    i_v, i_c = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_h = tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
    row, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    real, in_k, in_v = row < end - start, o_k < K, o_v < V
    mask_k, mask_v = real[:, None] & in_k[None, :], real[:, None] & in_v[None, :]
    head = start * HK + i_h
    b_k = tl.load(k + head * K + row[:, None] * (HK * K) + o_k[None, :], mask=mask_k, other=0.0)
    b_g, b_rest = load_sums(gc, head + row * HK, real)
    # Row j, column i: token i reads the update of token j <= i.
    b_decay = decay_between(-b_g, -b_rest, row[:, None] <= row[None, :]) * scale
    b_du = tl.zeros([BT, BV], dtype=tl.float32)
    for i_q in range(GROUP):
        query = start * (HK * GROUP) + i_h * GROUP + i_q
        b_q = tl.load(q + query * K + row[:, None] * (HK * GROUP * K) + o_k[None, :], mask=mask_k, other=0.0)
        b_do = tl.load(do + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :], mask=mask_v, other=0.0)
        b_A = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_decay
        b_du = tl.dot(b_A.to(b_do.dtype), b_do, b_du, input_precision=PRECISION)
    tl.store(du + head * V + row[:, None] * (HK * V) + o_v[None, :], b_du.to(du.dtype.element_ty), mask=mask_v)


@tuned(
    tile_configs(warps=(4, 2), stages=(2, 3), BV=(32, 64)),
    key=["HK", "GROUP", "K", "V", "BT", "PACKED", "bucket"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT", "bucket"])
def state_bwd_kernel(
    q, k, w, gc, do, du, du_out, dstates, dfinal_state, dinitial_state, sequences, scale, T, NT, bucket,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks back over the chunks with `BV` columns of the state's gradient; stores it after each chunk, and `du`."""
    i_v, i_nh = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_n, i_h = i_nh // HK, i_nh % HK
    begin, end, first, row_in, row_out = sequence_bounds(sequences, i_n, T, NT, PACKED)
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
        b_g, b_rest = load_sums(gc, head + row * HK, real)
        b_out, across = decay_to_end(gc, b_g, b_rest, head + (tl.minimum(end - start, BT) - 1) * HK, real)
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
    tile_configs(warps=(4, 2), stages=(2, 3), BV=(32, 64)),
    key=["HK", "GROUP", "K", "V", "BT"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT", "tokens"])
def key_bwd_kernel(
    q, k, u, gc, states, do, du, dstates, dk, dw, dg, borders, scale, T, NT, tokens,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`BK` columns of a chunk: gradients of `w` and, except through `w` and `M`, of `k`; a part of that of `G`."""
    i_k, i_c = tl.program_id(0) % tl.cdiv(K, BK), tl.program_id(0) // tl.cdiv(K, BK)
    i_h = tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
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

    b_g, b_rest = load_sums(gc, head + row * HK, real)
    last = tl.minimum(end - start, BT) - 1
    b_out, across = decay_to_end(gc, b_g, b_rest, head + last * HK, real)
    b_dk *= b_out[:, None]
    b_share = tl.sum(b_dk * tl.load(k + head * K + offsets_k, mask=mask_k, other=0.0), 1)
    dg_last = tl.sum(b_across, 0) * across + tl.sum(b_share, 0)
    tl.store(
        dg + i_k.to(tl.int64) * tokens * HK + head + row * HK, tl.where(row == last, dg_last, 0.0) - b_share, mask=real
    )

    for i_q in range(GROUP):
        query = head * GROUP + i_q
        # Row j, column i: computed directly, not transposed (see `__init__.py`).
        b_dA = tl.zeros([BT, BT], dtype=tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            mask_v = real[:, None] & (o_v < V)[None, :]
            b_do = tl.load(do + query * V + row[:, None] * (HK * GROUP * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_u = tl.load(u + row[:, None] * (HK * V) + o_v[None, :], mask=mask_v, other=0.0)
            b_dA = tl.dot(b_u, tl.trans(b_do), b_dA, input_precision=PRECISION)
        b_g, b_rest = load_sums(gc, head + row * HK, real)
        b_dA *= decay_between(-b_g, -b_rest, row[:, None] <= row[None, :]) * scale
        b_q = tl.load(q + query * K + row[:, None] * (HK * GROUP * K) + o_k[None, :], mask=mask_k, other=0.0)
        b_dk = tl.dot(b_dA.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    tl.store(dk + head * K + offsets_k, b_dk.to(dk.dtype.element_ty), mask=mask_k)


@tuned(
    tile_configs(warps=(4, 2), stages=(2, 3), BV=(32, 64)),
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
    """`BK` columns of a chunk: gradient of `q`; adds the outputs' part of the gradient of `G` to `dg`."""
    i_k, i_c = tl.program_id(0) % tl.cdiv(K, BK), tl.program_id(0) // tl.cdiv(K, BK)
    i_h = tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
    row, o_k = tl.arange(0, BT), i_k * BK + tl.arange(0, BK)
    real, in_k = row < end - start, o_k < K
    head = start * HK + i_h
    offsets_k, mask_k = row[:, None] * (HK * K) + o_k[None, :], real[:, None] & in_k[None, :]
    u += head * V
    states += (i_c.to(tl.int64) * HK + i_h) * (K * V)
    gates = i_k.to(tl.int64) * tokens * HK + head + row * HK
    b_g, b_rest = load_sums(gc, head + row * HK, real)
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
        b_dA *= decay_between(b_g, b_rest, row[:, None] >= row[None, :]) * scale
        b_dq = tl.dot(b_dA.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        # Rows and columns must round the same numbers, or terms that cancel in sums of `dg` would not.
        b_dA *= tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dg += tl.sum(b_dA, 1) - tl.sum(b_dA, 0)
        tl.store(dq + query * K + offsets_q, b_dq.to(dq.dtype.element_ty), mask=mask_k)
    tl.store(dg + gates, b_dg, mask=real)


@triton.jit
def _apply_bwd(
    k, v, dw, du, dv, b_MT, b_beta, b_in, real,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `M` and, through `M (beta v)`, of `beta`; stores that of `v`. Pointers are at the chunk's start."""
    row = tl.arange(0, BT)
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
    return b_dM + b_dMv * b_beta[None, :], b_dbeta


@tuned(tile_configs(warps=(4, 2), stages=(2, 3)), key=["HK", "K", "V", "BT"], restore_value=["dk"])
@triton.jit(do_not_specialize=["T", "NT", "tokens"])
def wy_bwd_kernel(
    k, v, beta, gc, inverse, dw, du, dg_parts, dA, dk, dv, dg, dbeta, borders, T, NT, tokens,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk through its WY form, added to those of the output stage; completes `dk` in place."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
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

    b_dM, b_dbeta = _apply_bwd(k, v, dw, du, dv, b_MT, b_beta, b_in, real, HK, K, V, BT, BK, BV, PRECISION)

    # Below the diagonal dA = -M^T dM M^T; times the decay it is the gradient of beta_i (k_i . k_j).
    lower = row[:, None] > row[None, :]
    b_dM = tl.where(lower, b_dM, 0.0).to(b_MT.dtype)
    b_dM = tl.dot(b_dM, b_MT, input_precision=PRECISION).to(b_MT.dtype)
    b_g, b_rest = load_sums(gc, head + row * HK, real)
    b_dA = -tl.dot(b_MT, b_dM, input_precision=PRECISION) * decay_between(b_g, b_rest, lower)
    # The transpose of beta_i dA_ij, for `k_j`, is loaded from memory (see `__init__.py`).
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
        # Through beta exp(G) k and beta_i (k_i . k_j), before the factor beta_i; then as the k_j of later tokens.
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
    shape = {**chunk_constants(k, u, chunks), "V": value_dim, "GROUP": group}
    du_chunk, du, dstates = torch.empty_like(u), torch.empty_like(u), torch.empty_like(states)
    local_bwd_kernel[lambda meta: (chunks.total * triton.cdiv(value_dim, meta["BV"]), kv_heads)](
        q, k, gc, do, du_chunk, chunks.borders, scale, BK=tile_width(key_dim, MAX_HEAD_DIM), **shape
    )
    programs = chunks.sequences * kv_heads
    state_bwd_kernel[lambda meta: (programs * triton.cdiv(value_dim, meta["BV"]),)](
        q, k, w, gc, do, du_chunk, du, dstates, dfinal_state, dinitial_state, chunks.table, scale,
        bucket=next_bucket(programs), BK=tile_width(key_dim, MAX_HEAD_DIM), **shape,
    )  # fmt: skip
    block = tile_width(key_dim, 64)
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
        tokens=gc.shape[0] * gc.shape[1], V=v.shape[3], BK=tile_width(k.shape[3], 64), BV=tile_width(v.shape[3], 32),
        PARTS=len(dg_parts), **chunk_constants(k, v, chunks),
    )  # fmt: skip
    return dv, dg, dbeta


def with_next_keys(
    q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, dread: torch.Tensor, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a head to each group of queries and of output gradients; it reads the next token's prediction.

    A prediction is `exp(g_t)` times what the key reads from the state after the previous token: an output like any
    other, unless the token is its document's first. `dread` `[B, T, Hk, V]` is the gradient of what the keys read.
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
    """Splits the heads of `with_next_keys` off `dq`, and adds their part to `dk`, `dg` and `dinitial_state`."""
    dq = dq.unflatten(2, (k.shape[2], -1))
    through_keys = F.pad(dq[:, :-1, :, -1].float(), (0, 0, 0, 0, 1, 0))
    if initial_state is not None and dinitial_state is not None:
        through_keys[:, 0] = (initial_state @ dread[:, 0, :, :, None]).squeeze(-1)
        dinitial_state += k[:, 0, :, :, None].float() * dread[:, 0, :, None]
    dk += through_keys
    dg += (through_keys * k).sum(-1)
    return dq[:, :, :, :-1].flatten(2, 3)
