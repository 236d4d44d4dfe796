# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The recurrence of the state over the chunks of a sequence."""

import torch
import triton
import triton.language as tl

from ..tuning import next_bucket, tuned
from .chunks import (
    MAX_HEAD_DIM,
    NO_WIDER,
    Chunks,
    chunk_constants,
    decay_to_end,
    load_sums,
    sequence_bounds,
    tile_configs,
    tile_width,
)
from .wy import wy_apply_fwd_kernel


@tuned(
    tile_configs(warps=(4,), stages=(2, 3), BV=(32, 64)),
    key=["HK", "K", "V", "BT", "PACKED", "bucket"],
    prune_configs_by=NO_WIDER,
)
@triton.jit(do_not_specialize=["T", "NT", "bucket"])
def state_fwd_kernel(
    k, w, u, gc, u_out, states, initial_state, final_state, sequences, T, NT, bucket,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of a sequence with `BV` columns of the state; stores the state before each chunk, and `u`."""
    i_v, i_nh = tl.program_id(0) % tl.cdiv(V, BV), tl.program_id(0) // tl.cdiv(V, BV)
    i_n, i_h = i_nh // HK, i_nh % HK
    begin, end, first, row_in, row_out = sequence_bounds(sequences, i_n, T, NT, PACKED)
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
        b_g, b_rest = load_sums(gc, head + row * HK, real)
        b_out, across = decay_to_end(gc, b_g, b_rest, head + (tl.minimum(end - start, BT) - 1) * HK, real)
        b_u = (b_u * b_out[:, None]).to(b_w.dtype)
        b_kT = tl.load(
            k + head * K + o_k[:, None] + row[None, :] * (HK * K), mask=in_k[:, None] & real[None, :], other=0.0
        )
        b_S = tl.dot(b_kT, b_u, b_S * across, input_precision=PRECISION)
    tl.store(final_state + (row_out * HK + i_h) * (K * V) + square, b_S, mask=in_square & (row_out >= 0))


def state_fwd(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    gc: torch.Tensor,
    inverse: torch.Tensor,
    initial_state: torch.Tensor | None,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes `w` and updates `u` of each token, states before each chunk `[chunks, Hk, K, V]` and final states."""
    batch, _, kv_heads, key_dim = k.shape
    value_dim, shape = v.shape[3], chunk_constants(k, v, chunks)
    w, from_values = torch.empty_like(k), torch.empty_like(v)
    narrower = tile_width(min(key_dim, value_dim), 64)  # for both: see `SMALLEST_TILE`
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
        bucket=next_bucket(programs), V=value_dim, BK=tile_width(key_dim, MAX_HEAD_DIM), **shape,
    )  # fmt: skip
    return w, u, states, final_state
