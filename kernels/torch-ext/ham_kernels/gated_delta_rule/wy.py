# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The WY form of a chunk: the inverse `M = (I + A)^-1`, and its products `w` and `u` with keys and values."""

import torch
import triton
import triton.language as tl

from ..tuning import tuned
from .chunks import LOG2E, Chunks, chunk_bounds, chunk_constants, decay_between, tile_configs, tile_width

# Rows of a diagonal block, which are solved one after another; products merge the blocks.
BC: tl.constexpr = tl.constexpr(16)


# On an H200 4 warps were faster than 2 for every kernel of the forward pass; other GPUs are not measured.
@tuned(tile_configs(warps=(4,), stages=(2, 3)), key=["HK", "K", "BT"])
@triton.jit(do_not_specialize=["T", "NT"])
def wy_inverse_fwd_kernel(
    k, g, beta, gc, inverse, diagonal, borders, T, NT,
    HK: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gc` and `M = (I + A)^-1` of one chunk: its diagonal blocks by substitution, the rest by products of blocks."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
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
    b_A *= decay_between(b_g, b_rest, row[:, None] > row[None, :]) * b_beta[:, None]

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


@tuned(tile_configs(warps=(4,), stages=(2, 3)), key=["HK", "K", "V", "BT"])
@triton.jit(do_not_specialize=["T", "NT"])
def wy_apply_fwd_kernel(
    k, v, beta, gc, inverse, w, u, borders, T, NT,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`w = M (beta exp(G) k)` and `M (beta v)` of one chunk."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, end = chunk_bounds(borders, i_c, T, NT, BT, PACKED)
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


def wy_fwd(
    k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, v: torch.Tensor, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sums of the gates `[B, T, Hk, 2]` float32, and inverses `[B, T, Hk, BT]` in the dtype of `k`."""
    gc = g.new_empty(*g.shape, 2)
    inverse = k.new_empty(*k.shape[:3], chunks.size)
    diagonal = k.new_empty(chunks.total, k.shape[2], chunks.size, BC.value, dtype=torch.float32)
    wy_inverse_fwd_kernel[(chunks.total, k.shape[2])](
        k, g, beta, gc, inverse, diagonal, chunks.borders,
        BK=tile_width(k.shape[3], 64), **chunk_constants(k, v, chunks),
    )  # fmt: skip
    return gc, inverse
