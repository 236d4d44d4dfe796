# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Forward pass of sparse prefix attention: an online softmax over tiles of kept columns, then of the window."""

import torch
import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    launch,
    load_tile,
    own_token,
    query_rows,
    store_tile,
    stream_and_tile,
    tiles_between,
    visible_columns,
    window_columns,
)


@triton.jit
def _attend(
    acc, total, peak, q, keys, values, until, start, last, begin, end, t, masked, log2_scale,
    STRIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the columns `start..start + BLOCK_N` before `last`."""
    c = tl.arange(0, BLOCK_N)
    column = start + c
    k = load_tile(keys + start.to(tl.int64) * (STRIDE * K), c * (STRIDE * K), column < last, K, BLOCK_K)
    v = load_tile(values + start.to(tl.int64) * (STRIDE * V), c * (STRIDE * V), column < last, V, BLOCK_V)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if masked:
        visible = (c[None, :] >= (begin - start)[:, None]) & (c[None, :] < (end - start)[:, None])
        if until is not None:
            visible &= t[:, None] < tl.load(until + column, mask=column < last, other=0).to(tl.int32)[None, :]
        logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * log2_scale)
    weights = tl.exp2(logits * log2_scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def _attend_all(
    acc, total, peak, q, keys, values, until, bounds, begin, end, t, log2_scale,
    STRIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over all columns within the bounds of a tile of queries."""
    first, last, all_first, all_last = bounds
    if until is not None:
        all_last = first  # `begin` and `end` alone do not show which tiles every query sees whole
    tiles, inside, inside_end = tiles_between(first, last, all_first, all_last, BLOCK_N)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        acc, total, peak = _attend(
            acc, total, peak, q, keys, values, until, first + i * BLOCK_N, last, begin, end, t, masked, log2_scale,
            STRIDE, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    return acc, total, peak


@triton.jit(do_not_specialize=["L", "T", "M", "T_BUCKET", "M_BUCKET"])
def sparse_prefix_attention_fwd_kernel(
    q, k, v, k_kept, v_kept, begin, end, until, window_start, shown_until, o, lse, lse_rest, self_weight, log2_scale,
    L, T, M, T_BUCKET, M_BUCKET,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    stream, tile = stream_and_tile(T * GROUP, BLOCK_M, True)
    t, base, token, query = query_rows(tile * BLOCK_M, stream, T, HK, GROUP, BLOCK_M)
    real = t < T
    first_query, last_query = tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP
    bounds = visible_columns(begin, end, first_query, last_query, T, M, stream, HK)
    begin_of = tl.load(begin + base + token, mask=real, other=0).to(tl.int32)
    end_of = tl.load(end + base + token, mask=real, other=0).to(tl.int32)
    k_kept += stream * M * K
    v_kept += stream * M * V
    if until is not None:
        until += stream * M

    queries = load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    own = own_token(base, stream, T, L, HK)
    own_key = load_tile(k + own * K, token * K, real, K, BLOCK_K)
    own_logit = tl.sum(queries.to(tl.float32) * own_key.to(tl.float32), 1) * log2_scale
    peak = own_logit
    total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    acc = load_tile(v + own * V, token * V, real, V, BLOCK_V).to(tl.float32)
    acc, total, peak = _attend_all(
        acc, total, peak, queries, k_kept, v_kept, until, bounds, begin_of, end_of, t, log2_scale,
        1, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
    )  # fmt: skip
    if window_start is not None:
        row, head = stream // HK, stream % HK
        window_start += row * T
        if shown_until is not None:
            shown_until += row * L
        bounds = window_columns(window_start, first_query, last_query, T, L)
        begin_of = tl.load(window_start + t, mask=real, other=0).to(tl.int32)
        acc, total, peak = _attend_all(
            acc, total, peak, queries, k + (row * L * HK + head) * K, v + (row * L * HK + head) * V, shown_until,
            bounds, begin_of, L - T + t, t, log2_scale, HK, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    store_tile(o + base * GROUP * V, query * V, acc / total[:, None], real, V, BLOCK_V)
    log_total = tl.log2(total)
    log_sum = peak + log_total
    tl.store(lse + base * GROUP + query, log_sum, mask=real)
    rest = (peak - log_sum) + log_total
    tl.store(lse_rest + base * GROUP + query, rest, mask=real)
    tl.store(self_weight + base * GROUP + query, tl.exp2((own_logit - log_sum) - rest), mask=real)


def sparse_prefix_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    scale: float,
    window_start: torch.Tensor | None = None,
    shown_until: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes outputs `[B, T, H, V]` and, `[B, T, H]` float32, base-2 log-sum-exp, its rest, and own weights."""
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lse_rest, self_weight, log2_scale = torch.empty_like(lse), torch.empty_like(lse), scale * LOG2E.value
    launch(
        sparse_prefix_attention_fwd_kernel, "fwd" if window_start is None else "fwd_window", q, k_kept, v_kept,
        q, k, v, k_kept, v_kept, begin, end, until, window_start, shown_until, o, lse, lse_rest, self_weight,
        log2_scale, None if window_start is None else k.shape[1],
    )  # fmt: skip
    return o, lse, lse_rest, self_weight
