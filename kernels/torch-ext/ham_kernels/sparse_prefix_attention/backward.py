# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Backward pass of sparse prefix attention: the self term, the queries, and the keys and values of the columns."""

import torch
import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    head_sizes,
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

# Elements of a head that a program of the self term holds at once.
SELF_ELEMENTS, SELF_WARPS = 4096, 8
# Columns per program of the kernel that looks up which queries see a column.
SEEN_COLUMNS = 128


@triton.jit(do_not_specialize=["L", "T"])
def sparse_prefix_attention_bwd_self_kernel(
    q, v, o, do, self_weight, dlse, dk, dv, delta, self_slope, scale, L, T,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Self term of each token, summed over its group, and `delta`, the mean of `do . v` under each softmax."""
    stream, tile = stream_and_tile(T, BLOCK_T, False)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < T
    token = ((stream // HK) * T + t) * HK + stream % HK
    own_value = load_tile(v, own_token(token, stream, T, L, HK) * V, real, V, BLOCK_V).to(tl.float32)
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
    dq, q, do, log_sum, rest, mean, keys, values, until, start, last, begin, end, t, masked, log2_scale,
    STRIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the part of the columns `start..start + BLOCK_N` to the gradient of a tile of queries."""
    c = tl.arange(0, BLOCK_N)
    column = start + c
    k = load_tile(keys + start.to(tl.int64) * (STRIDE * K), c * (STRIDE * K), column < last, K, BLOCK_K)
    v = load_tile(values + start.to(tl.int64) * (STRIDE * V), c * (STRIDE * V), column < last, V, BLOCK_V)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2((logits * log2_scale - log_sum[:, None]) - rest[:, None])
    if masked:
        visible = (c[None, :] >= (begin - start)[:, None]) & (c[None, :] < (end - start)[:, None])
        if until is not None:
            visible &= t[:, None] < tl.load(until + column, mask=column < last, other=0).to(tl.int32)[None, :]
        weights = tl.where(visible, weights, 0.0)
    slopes = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - mean[:, None])
    return tl.dot(slopes.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _add_all_dq(
    dq, q, do, log_sum, rest, mean, keys, values, until, bounds, begin, end, t, log2_scale,
    STRIDE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the part of all columns within the bounds of a tile of queries to their gradient."""
    first, last, all_first, all_last = bounds
    if until is not None:
        all_last = first
    tiles, inside, inside_end = tiles_between(first, last, all_first, all_last, BLOCK_N)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        dq = _add_dq(
            dq, q, do, log_sum, rest, mean, keys, values, until, first + i * BLOCK_N, last, begin, end, t, masked,
            log2_scale, STRIDE, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["L", "T", "M", "T_BUCKET", "M_BUCKET"])
def sparse_prefix_attention_bwd_dq_kernel(
    q, k, v, k_kept, v_kept, begin, end, until, window_start, shown_until, do, lse, lse_rest, delta, self_slope, dq,
    scale, log2_scale, L, T, M, T_BUCKET, M_BUCKET,
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
    grad = load_tile(do + base * GROUP * V, query * V, real, V, BLOCK_V)
    log_sum = tl.load(lse + base * GROUP + query, mask=real, other=0.0)
    rest = tl.load(lse_rest + base * GROUP + query, mask=real, other=0.0)
    mean = tl.load(delta + base * GROUP + query, mask=real, other=0.0)
    own_slope = tl.load(self_slope + base * GROUP + query, mask=real, other=0.0)
    own_key = load_tile(k + own_token(base, stream, T, L, HK) * K, token * K, real, K, BLOCK_K)
    acc = _add_all_dq(
        own_slope[:, None] * own_key.to(tl.float32), queries, grad, log_sum, rest, mean, k_kept, v_kept, until,
        bounds, begin_of, end_of, t, log2_scale, 1, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
    )  # fmt: skip
    if window_start is not None:
        row, head = stream // HK, stream % HK
        window_start += row * T
        if shown_until is not None:
            shown_until += row * L
        bounds = window_columns(window_start, first_query, last_query, T, L)
        begin_of = tl.load(window_start + t, mask=real, other=0).to(tl.int32)
        acc = _add_all_dq(
            acc, queries, grad, log_sum, rest, mean, k + (row * L * HK + head) * K, v + (row * L * HK + head) * V,
            shown_until, bounds, begin_of, L - T + t, t, log2_scale, HK, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
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
    stream, tile = stream_and_tile(M, BLOCK_N, False)
    base = (stream // HK) * T * HK + stream % HK
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
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
    q, keys, values, seen, do, lse, lse_rest, delta, dkeys, dvalues, scale, log2_scale, T, M, T_BUCKET, M_BUCKET,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    stream, tile = stream_and_tile(M, BLOCK_N, False)
    c = tl.arange(0, BLOCK_N)
    column = tile * BLOCK_N + c
    seen += 2 * (stream // STRIDE) * M
    seen_from = tl.load(seen + column, mask=column < M, other=0)
    seen_until = tl.load(seen + M + column, mask=column < M, other=0)
    # A column that no query sees may hold anything, and does not affect which queries see all of the tile.
    exists = seen_from < seen_until
    first = tl.min(tl.where(exists, seen_from, T), 0) * GROUP
    last = tl.max(tl.where(exists, seen_until, 0), 0) * GROUP
    all_first = tl.max(tl.where(exists, seen_from, 0), 0) * GROUP
    all_last = tl.minimum(tl.min(tl.where(exists, seen_until, T), 0) * GROUP, last)

    start = ((stream // STRIDE) * M + tile * BLOCK_N) * STRIDE + stream % STRIDE
    k = load_tile(keys + start * K, c * (STRIDE * K), exists, K, BLOCK_K)
    v = load_tile(values + start * V, c * (STRIDE * V), exists, V, BLOCK_V)
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
    store_tile(dkeys + start * K, c * (STRIDE * K), dkey, column < M, K, BLOCK_K)
    store_tile(dvalues + start * V, c * (STRIDE * V), dvalue, column < M, V, BLOCK_V)


def _columns_bwd(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    scale: float,
    *sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the columns `keys` and `values`, `[B, Hk, M, *]`, from all queries that see them.

    `begin` and `end` are `[B, T, Hk]` for kept columns; for tokens of the window, `[B, M, Hk, *]` in memory, they are
    `[B, T, 1]`, and all heads of a row share what they say.
    """
    dkeys, dvalues = torch.empty_like(keys), torch.empty_like(values)
    batch, length, heads = begin.shape
    columns = keys.shape[2]
    if columns:
        seen = torch.empty(batch * heads, 2, columns, dtype=torch.int32, device=q.device)
        sparse_prefix_attention_bwd_seen_kernel[(batch * heads * triton.cdiv(columns, SEEN_COLUMNS),)](
            begin, end, until, seen, length, columns, heads, SEEN_COLUMNS, num_warps=4
        )
        launch(
            sparse_prefix_attention_bwd_dkv_kernel, "dkv", q, keys, values,
            q, keys, values, seen, *sums, dkeys, dvalues, scale, scale * LOG2E.value, STRIDE=keys.shape[1] // heads,
        )  # fmt: skip
    return dkeys, dvalues


def sparse_prefix_attention_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    window_start: torch.Tensor | None,
    shown_until: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    lse_rest: torch.Tensor,
    self_weight: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `q`, `k`, `v`, `k_kept` and `v_kept`."""
    batch, length = q.shape[:2]
    tokens = None if window_start is None else k.shape[1]
    dq, dk, dv = torch.empty_like(q), *(x.new_empty(batch, length, *x.shape[2:]) for x in (k, v))
    delta, self_slope = torch.empty_like(lse), torch.empty_like(lse)
    sizes = head_sizes(q, k_kept, v_kept)
    block_t = SELF_ELEMENTS // max(sizes["BLOCK_K"], sizes["BLOCK_V"])
    sparse_prefix_attention_bwd_self_kernel[(batch * sizes["HK"] * triton.cdiv(length, block_t),)](
        q, v, o, do, self_weight, dlse, dk, dv, delta, self_slope, scale, tokens, length,
        **sizes, BLOCK_T=block_t, num_warps=SELF_WARPS,
    )  # fmt: skip
    sums = (do, lse, lse_rest, delta)
    launch(
        sparse_prefix_attention_bwd_dq_kernel, "dq" if window_start is None else "dq_window", q, k_kept, v_kept,
        q, k, v, k_kept, v_kept, begin, end, until, window_start, shown_until, *sums, self_slope, dq,
        scale, scale * LOG2E.value, tokens,
    )  # fmt: skip
    dk_kept, dv_kept = _columns_bwd(q, k_kept, v_kept, begin, end, until, scale, *sums)
    if window_start is not None:
        own = torch.arange(k.shape[1] - length, k.shape[1], device=q.device).repeat(batch, 1)
        dkeys, dvalues = _columns_bwd(
            q, k.transpose(1, 2), v.transpose(1, 2), window_start[..., None], own[..., None], shown_until, scale, *sums
        )
        dkeys[:, :, -length:] += dk.transpose(1, 2)
        dvalues[:, :, -length:] += dv.transpose(1, 2)
        dk, dv = dkeys.transpose(1, 2), dvalues.transpose(1, 2)
    return dq, dk, dv, dk_kept, dv_kept
