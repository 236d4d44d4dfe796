# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Backward pass of sparse prefix attention: the self term, the queries, and the kept keys and values."""

import torch
import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    head_sizes,
    launch,
    load_tile,
    query_rows,
    store_tile,
    stream_and_tile,
    tiles_between,
    visible_columns,
)

# Elements of a head that a program of the self term holds at once.
SELF_ELEMENTS, SELF_WARPS = 4096, 8
# Columns per program of the kernel that looks up which queries see a column.
SEEN_COLUMNS = 128


@triton.jit(do_not_specialize=["T"])
def sparse_prefix_attention_bwd_self_kernel(
    q, v, o, do, self_weight, dlse, dk, dv, delta, self_slope, scale, T,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Self term of each token, summed over its group, and `delta`, the mean of `do . v` under each softmax."""
    stream = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < T
    token = ((stream // HK) * T + t) * HK + stream % HK
    own_value = load_tile(v, token * V, real, V, BLOCK_V).to(tl.float32)
    dkey = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    dvalue = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    for g in range(0, GROUP):
        query = token * GROUP + g
        queries = load_tile(q, query * K, real, K, BLOCK_K).to(tl.float32)
        grad = load_tile(do, query * V, real, V, BLOCK_V).to(tl.float32)
        out = load_tile(o, query * V, real, V, BLOCK_V).to(tl.float32)
        mean = tl.sum(grad * out, 1)
        # With a weight near 1 the difference to `mean` is small, so the values are subtracted before they are summed.
        slope = tl.sum(grad * (own_value - out), 1)
        if dlse is not None:
            from_lse = tl.load(dlse + query, mask=real, other=0.0) * LOG2E
            mean -= from_lse
            slope += from_lse
        weight = tl.load(self_weight + query, mask=real, other=0.0)
        slope *= weight
        dkey += slope[:, None] * queries
        dvalue += weight[:, None] * grad
        tl.store(delta + query, mean, mask=real)
        tl.store(self_slope + query, slope, mask=real)
    store_tile(dk, token * K, dkey * scale, real, K, BLOCK_K)
    store_tile(dv, token * V, dvalue, real, V, BLOCK_V)


@triton.jit
def _add_dq(
    dq, q, do, log_sum, rest, mean, k_kept, v_kept, until, start, last, begin, end, t, masked, log2_scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the part of the columns `start..start + BLOCK_N` to the gradient of a tile of queries."""
    c = tl.arange(0, BLOCK_N)
    column = start + c
    k = load_tile(k_kept + start.to(tl.int64) * K, c * K, column < last, K, BLOCK_K)
    v = load_tile(v_kept + start.to(tl.int64) * V, c * V, column < last, V, BLOCK_V)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2((logits * log2_scale - log_sum[:, None]) - rest[:, None])
    if masked:
        visible = (c[None, :] >= (begin - start)[:, None]) & (c[None, :] < (end - start)[:, None])
        if until is not None:
            visible &= t[:, None] < tl.load(until + column, mask=column < last, other=0).to(tl.int32)[None, :]
        weights = tl.where(visible, weights, 0.0)
    slopes = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - mean[:, None])
    return tl.dot(slopes.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "M", "T_BUCKET", "M_BUCKET"])
def sparse_prefix_attention_bwd_dq_kernel(
    q, k, k_kept, v_kept, begin, end, until, do, lse, lse_rest, delta, self_slope, dq, scale, log2_scale,
    T, M, T_BUCKET, M_BUCKET,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    stream, tile = stream_and_tile(T * GROUP, BLOCK_M, True)
    t, base, token, query = query_rows(tile * BLOCK_M, stream, T, HK, GROUP, BLOCK_M)
    real = t < T
    first, last, all_first, all_last = visible_columns(
        begin, end, tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP, T, M, stream, HK
    )
    begin_of = tl.load(begin + base + token, mask=real, other=0).to(tl.int32)
    end_of = tl.load(end + base + token, mask=real, other=0).to(tl.int32)
    k_kept += stream * M * K
    v_kept += stream * M * V
    if until is not None:
        until += stream * M
        all_last = first

    queries = load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    grad = load_tile(do + base * GROUP * V, query * V, real, V, BLOCK_V)
    log_sum = tl.load(lse + base * GROUP + query, mask=real, other=0.0)
    rest = tl.load(lse_rest + base * GROUP + query, mask=real, other=0.0)
    mean = tl.load(delta + base * GROUP + query, mask=real, other=0.0)
    own_slope = tl.load(self_slope + base * GROUP + query, mask=real, other=0.0)
    acc = own_slope[:, None] * load_tile(k + base * K, token * K, real, K, BLOCK_K).to(tl.float32)
    tiles, inside, inside_end = tiles_between(first, last, all_first, all_last, BLOCK_N)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        acc = _add_dq(
            acc, queries, grad, log_sum, rest, mean, k_kept, v_kept, until, first + i * BLOCK_N, last,
            begin_of, end_of, t, masked, log2_scale, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    store_tile(dq + base * GROUP * K, query * K, acc * scale, real, K, BLOCK_K)


@triton.jit
def _first_above(x, bound, T, HK: tl.constexpr):
    """First of `T` places of `x` that exceeds each `bound`; `T` if none does."""
    low = tl.zeros_like(bound)
    high = low + T
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        above = tl.load(x + middle.to(tl.int64) * HK, mask=searching, other=0) > bound
        high = tl.where(searching & above, middle, high)
        low = tl.where(searching & ~above, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["T", "M"])
def sparse_prefix_attention_bwd_seen_kernel(begin, end, until, seen, T, M, HK: tl.constexpr, BLOCK_N: tl.constexpr):
    """First query that sees each column, and the first that no longer does."""
    stream = tl.program_id(1).to(tl.int64)
    base = (stream // HK) * T * HK + stream % HK
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen_from = _first_above(end + base, column, T, HK)
    seen_until = _first_above(begin + base, column, T, HK)
    if until is not None:
        evicted = tl.load(until + stream * M + column, mask=column < M, other=0)
        seen_until = tl.minimum(seen_until, evicted).to(tl.int32)
    tl.store(seen + 2 * stream * M + column, seen_from, mask=column < M)
    tl.store(seen + (2 * stream + 1) * M + column, seen_until, mask=column < M)


@triton.jit
def _add_dkv(
    dkey, dvalue, k, v, q, do, lse, lse_rest, delta, start, last, seen_from, seen_until, masked, stream, T, log2_scale,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds the part of the rows `start..start + BLOCK_M` before `last` to the gradients of a tile of columns.

    Computes weights and slopes transposed, because Triton 3.4 to 3.7.0 miscompile products of a transposed product.
    """
    r = tl.arange(0, BLOCK_M)
    _, base, _, query = query_rows(start, stream, T, HK, GROUP, BLOCK_M)
    real = r < last - start
    queries = load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    log_sum = tl.load(lse + base * GROUP + query, mask=real, other=0.0)
    rest = tl.load(lse_rest + base * GROUP + query, mask=real, other=0.0)
    logits = tl.dot(k, tl.trans(queries), input_precision="ieee")
    weights = tl.exp2((logits * log2_scale - log_sum[None, :]) - rest[None, :])
    if masked:
        visible = (r[None, :] >= (seen_from * GROUP - start)[:, None]) & (
            r[None, :] < (seen_until * GROUP - start)[:, None]
        )
        weights = tl.where(visible, weights, 0.0)
    grad = load_tile(do + base * GROUP * V, query * V, real, V, BLOCK_V)
    dvalue = tl.dot(weights.to(grad.dtype), grad, dvalue, input_precision="ieee")
    slopes = tl.dot(v, tl.trans(grad), input_precision="ieee")
    mean = tl.load(delta + base * GROUP + query, mask=real, other=0.0)
    slopes = weights * (slopes - mean[None, :])
    dkey = tl.dot(slopes.to(queries.dtype), queries, dkey, input_precision="ieee")
    return dkey, dvalue


@triton.jit(do_not_specialize=["T", "M", "T_BUCKET", "M_BUCKET"])
def sparse_prefix_attention_bwd_dkv_kernel(
    q, k_kept, v_kept, seen, do, lse, lse_rest, delta, dk_kept, dv_kept, scale, log2_scale, T, M, T_BUCKET, M_BUCKET,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    stream, tile = stream_and_tile(M, BLOCK_N, False)
    c = tl.arange(0, BLOCK_N)
    column = tile * BLOCK_N + c
    seen += 2 * stream * M
    seen_from = tl.load(seen + column, mask=column < M, other=0)
    seen_until = tl.load(seen + M + column, mask=column < M, other=0)
    # A column that no query sees may hold anything, and does not affect which queries see all of the tile.
    exists = seen_from < seen_until
    first = tl.min(tl.where(exists, seen_from, T), 0) * GROUP
    last = tl.max(tl.where(exists, seen_until, 0), 0) * GROUP
    all_first = tl.max(tl.where(exists, seen_from, 0), 0) * GROUP
    all_last = tl.minimum(tl.min(tl.where(exists, seen_until, T), 0) * GROUP, last)

    start = stream * M + tile * BLOCK_N
    k = load_tile(k_kept + start * K, c * K, exists, K, BLOCK_K)
    v = load_tile(v_kept + start * V, c * V, exists, V, BLOCK_V)
    dkey = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    tiles, inside, inside_end = tiles_between(first, last, all_first, all_last, BLOCK_M)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        dkey, dvalue = _add_dkv(
            dkey, dvalue, k, v, q, do, lse, lse_rest, delta, first + i * BLOCK_M, last, seen_from, seen_until, masked,
            stream, T, log2_scale, HK, GROUP, K, V, BLOCK_K, BLOCK_V, BLOCK_M,
        )  # fmt: skip
    dkey, dvalue = tl.where(exists[:, None], dkey * scale, 0.0), tl.where(exists[:, None], dvalue, 0.0)
    store_tile(dk_kept + start * K, c * K, dkey, column < M, K, BLOCK_K)
    store_tile(dv_kept + start * V, c * V, dvalue, column < M, V, BLOCK_V)


def sparse_prefix_attention_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    lse_rest: torch.Tensor,
    self_weight: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `q`, `k`, `v`, `k_kept` and `v_kept`."""
    dq, dk, dv, dk_kept, dv_kept = (torch.empty_like(x) for x in (q, k, v, k_kept, v_kept))
    delta, self_slope = torch.empty_like(lse), torch.empty_like(lse)
    log2_scale = scale * LOG2E.value
    sizes, length = head_sizes(q, k_kept, v_kept), q.shape[1]
    block_t = SELF_ELEMENTS // max(sizes["BLOCK_K"], sizes["BLOCK_V"])
    sparse_prefix_attention_bwd_self_kernel[(triton.cdiv(length, block_t), q.shape[0] * sizes["HK"])](
        q, v, o, do, self_weight, dlse, dk, dv, delta, self_slope, scale, length,
        **sizes, BLOCK_T=block_t, num_warps=SELF_WARPS,
    )  # fmt: skip
    launch(
        sparse_prefix_attention_bwd_dq_kernel, "dq", q, k_kept, v_kept,
        q, k, k_kept, v_kept, begin, end, until, do, lse, lse_rest, delta, self_slope, dq, scale, log2_scale,
    )  # fmt: skip
    columns, streams = k_kept.shape[2], q.shape[0] * sizes["HK"]
    if columns:
        seen = torch.empty(streams, 2, columns, dtype=torch.int32, device=q.device)
        sparse_prefix_attention_bwd_seen_kernel[(triton.cdiv(columns, SEEN_COLUMNS), streams)](
            begin, end, until, seen, length, columns, sizes["HK"], SEEN_COLUMNS, num_warps=4
        )
        launch(
            sparse_prefix_attention_bwd_dkv_kernel, "dkv", q, k_kept, v_kept,
            q, k_kept, v_kept, seen, do, lse, lse_rest, delta, dk_kept, dv_kept, scale, log2_scale,
        )  # fmt: skip
    return dq, dk, dv, dk_kept, dv_kept
