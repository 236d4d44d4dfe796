# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention of each query over a span of compacted kept tokens and itself, forward and backward.

The tiles are FlashAttention-2's (arXiv 2307.08691). What differs is the mask: query `t` sees the columns
`begin[t] <= c < end[t]` of its head, so a tile of queries visits `end - begin` columns instead of `t`, whatever
pattern of tokens was kept; and its own key and value, which start the online softmax. `begin` and `end` never fall
along `T`, so the first and last query of a tile tell which columns all of its queries see: only the tiles of columns
beside those are masked. All query heads of a key/value head share its tiles: the rows of a tile are pairs of a query
and a head of the group.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .tuning import check_platform, next_bucket, tuned

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**24  # rows of a group, counted in 32 bits

# Tile shapes by kernel and by (bytes of an element, head dimension up to): (BLOCK_M query rows, BLOCK_N columns,
# warps, stages). The first is taken where nothing is measured. None for 2 bytes and up to 128 spills: see `AOT_CASES`.
TILES = {
    "fwd": {
        (2, 64): [(128, 64, 8, 3), (128, 64, 4, 3)],
        (2, 128): [(128, 64, 8, 2), (64, 64, 4, 2)],
        (2, 256): [(128, 32, 8, 2), (64, 32, 4, 1)],
        (4, 128): [(64, 32, 4, 2)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "dq": {
        (2, 64): [(128, 64, 8, 2), (64, 64, 8, 2)],
        (2, 128): [(64, 128, 8, 2), (64, 64, 8, 2)],
        (2, 256): [(64, 32, 8, 1)],
        (4, 128): [(32, 32, 8, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "dkv": {
        (2, 64): [(32, 64, 8, 2)],
        (2, 128): [(64, 64, 8, 2), (32, 64, 8, 2)],
        (2, 256): [(32, 32, 8, 1)],
        (4, 128): [(32, 32, 4, 1)],
        (4, 256): [(16, 16, 4, 1)],
    },
}
# Compute capability 9.0 tries these first: warp groups multiply from shared memory, which leaves registers for more.
HOPPER_TILES = {
    "fwd": {(2, 64): [(128, 128, 8, 2)], (2, 128): [(128, 128, 8, 2), (128, 64, 8, 3)]},
    "dq": {(2, 128): [(128, 64, 8, 2)]},
    "dkv": {(2, 64): [(64, 128, 8, 2), (64, 64, 4, 2)], (2, 128): [(32, 128, 8, 2)]},
}
# Elements of a head that a program of the self term holds at once.
SELF_ELEMENTS, SELF_WARPS = 4096, 8
# Columns of a program that looks up who sees them.
SEEN_COLUMNS = 128


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A stream is a row's key/value head; `HK` key/value heads, `GROUP` query heads to each, `K` and `V` head
# dimensions, `BLOCK_K` and `BLOCK_V` the powers of two that hold them. Row `r` of a stream is query `r // GROUP` of
# head `r % GROUP`. `T_BUCKET` and `M_BUCKET` stand for the lengths where tile shapes are measured. Tensors are
# contiguous; `log2_scale` and `lse` are in units of log 2. `lse_rest` is what rounding took from `lse`: at large
# logits it would change a weight of nearly 1 by more than anything else does. For the same reason the backward pass
# takes a query's weight on itself, `self_weight`, from the forward: another kernel may round that logit otherwise.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tile(x, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of `D` numbers at `offsets`; zero past `D`, and where not `inside`."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + offsets[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_tile(x, offsets, values, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(x + offsets[:, None] + d[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _stream_and_tile(length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Stream and tile of this program: all streams' longest tiles come first, so that none is left to the end."""
    tiles = tl.cdiv(length, BLOCK)
    streams = tl.num_programs(0) // tiles
    tile = tl.program_id(0) // streams
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return (tl.program_id(0) % streams).to(tl.int64), tile


@triton.jit
def _query_rows(start, stream, T, HK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Of the rows from `start` on: their queries; where the first's token is among all tokens and heads (64 bits, of
    queries `GROUP` times that), and how far from there each row's token and its query are.
    """
    r = start % GROUP + tl.arange(0, BLOCK)
    base = ((stream // HK) * T + start // GROUP) * HK + stream % HK
    token = (r // GROUP) * HK
    return start // GROUP + r // GROUP, base, token, token * GROUP + r % GROUP


@triton.jit
def _tiles(first, last, all_first, all_last, BLOCK: tl.constexpr):
    """Tiles that cover `first..last`, and which of them, from and to, lie inside `all_first..all_last`."""
    inside = tl.cdiv(tl.maximum(all_first - first, 0), BLOCK)
    inside_end = inside + tl.maximum(all_last - first - inside * BLOCK, 0) // BLOCK
    return tl.cdiv(tl.maximum(last - first, 0), BLOCK), inside, inside_end


@triton.jit
def _visible_columns(begin, end, first, last, T, M, stream, HK: tl.constexpr):
    """Columns that some, and that all of the queries `first..last` of a stream see."""
    base = (stream // HK) * T * HK + stream % HK
    last = tl.minimum(last, T - 1)
    some_first = tl.load(begin + base + first.to(tl.int64) * HK).to(tl.int32)
    some_last = tl.load(end + base + last.to(tl.int64) * HK).to(tl.int32)
    all_first = tl.load(begin + base + last.to(tl.int64) * HK).to(tl.int32)
    all_last = tl.load(end + base + first.to(tl.int64) * HK).to(tl.int32)
    return tl.maximum(some_first, 0), tl.minimum(some_last, M), all_first, tl.minimum(all_last, M)


@triton.jit
def _attend(
    acc, total, peak, q, k_kept, v_kept, until, start, last, begin, end, t, masked, log2_scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the columns `start..start + BLOCK_N` before `last`."""
    c = tl.arange(0, BLOCK_N)
    column = start + c
    k = _load_tile(k_kept + start.to(tl.int64) * K, c * K, column < last, K, BLOCK_K)
    v = _load_tile(v_kept + start.to(tl.int64) * V, c * V, column < last, V, BLOCK_V)
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


@triton.jit(do_not_specialize=["T", "M", "T_BUCKET", "M_BUCKET"])
def sparse_prefix_attention_fwd_kernel(
    q, k, v, k_kept, v_kept, begin, end, until, o, lse, lse_rest, self_weight, log2_scale, T, M, T_BUCKET, M_BUCKET,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    stream, tile = _stream_and_tile(T * GROUP, BLOCK_M, True)
    t, base, token, query = _query_rows(tile * BLOCK_M, stream, T, HK, GROUP, BLOCK_M)
    real = t < T
    first, last, all_first, all_last = _visible_columns(
        begin, end, tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP, T, M, stream, HK
    )
    begin_of = tl.load(begin + base + token, mask=real, other=0).to(tl.int32)
    end_of = tl.load(end + base + token, mask=real, other=0).to(tl.int32)
    k_kept += stream * M * K
    v_kept += stream * M * V
    if until is not None:
        until += stream * M
        all_last = first  # which tile every query sees whole, `begin` and `end` do not tell

    queries = _load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    own_key = _load_tile(k + base * K, token * K, real, K, BLOCK_K)
    own_logit = tl.sum(queries.to(tl.float32) * own_key.to(tl.float32), 1) * log2_scale
    peak = own_logit
    total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    acc = _load_tile(v + base * V, token * V, real, V, BLOCK_V).to(tl.float32)
    tiles, inside, inside_end = _tiles(first, last, all_first, all_last, BLOCK_N)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        acc, total, peak = _attend(
            acc, total, peak, queries, k_kept, v_kept, until, first + i * BLOCK_N, last, begin_of, end_of, t,
            masked, log2_scale, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    _store_tile(o + base * GROUP * V, query * V, acc / total[:, None], real, V, BLOCK_V)
    log_total = tl.log2(total)
    log_sum = peak + log_total
    tl.store(lse + base * GROUP + query, log_sum, mask=real)
    rest = (peak - log_sum) + log_total
    tl.store(lse_rest + base * GROUP + query, rest, mask=real)
    tl.store(self_weight + base * GROUP + query, tl.exp2((own_logit - log_sum) - rest), mask=real)


@triton.jit(do_not_specialize=["T"])
def sparse_prefix_attention_bwd_self_kernel(
    q, v, o, do, self_weight, dlse, dk, dv, delta, self_slope, scale, T,
    HK: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The self term, per token and summed over its group, and `delta`: the mean of `do . v` under each softmax."""
    stream = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < T
    token = ((stream // HK) * T + t) * HK + stream % HK
    own_value = _load_tile(v, token * V, real, V, BLOCK_V).to(tl.float32)
    dkey = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    dvalue = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    for g in range(0, GROUP):
        query = token * GROUP + g
        queries = _load_tile(q, query * K, real, K, BLOCK_K).to(tl.float32)
        grad = _load_tile(do, query * V, real, V, BLOCK_V).to(tl.float32)
        out = _load_tile(o, query * V, real, V, BLOCK_V).to(tl.float32)
        mean = tl.sum(grad * out, 1)
        # Of a weight near 1, what remains after `mean` is subtracted is small: the values cancel before the sum does.
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
    _store_tile(dk, token * K, dkey * scale, real, K, BLOCK_K)
    _store_tile(dv, token * V, dvalue, real, V, BLOCK_V)


@triton.jit
def _add_dq(
    dq, q, do, log_sum, rest, mean, k_kept, v_kept, until, start, last, begin, end, t, masked, log2_scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the columns `start..start + BLOCK_N` add to the gradient of a tile of queries."""
    c = tl.arange(0, BLOCK_N)
    column = start + c
    k = _load_tile(k_kept + start.to(tl.int64) * K, c * K, column < last, K, BLOCK_K)
    v = _load_tile(v_kept + start.to(tl.int64) * V, c * V, column < last, V, BLOCK_V)
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
    stream, tile = _stream_and_tile(T * GROUP, BLOCK_M, True)
    t, base, token, query = _query_rows(tile * BLOCK_M, stream, T, HK, GROUP, BLOCK_M)
    real = t < T
    first, last, all_first, all_last = _visible_columns(
        begin, end, tile * BLOCK_M // GROUP, (tile * BLOCK_M + BLOCK_M - 1) // GROUP, T, M, stream, HK
    )
    begin_of = tl.load(begin + base + token, mask=real, other=0).to(tl.int32)
    end_of = tl.load(end + base + token, mask=real, other=0).to(tl.int32)
    k_kept += stream * M * K
    v_kept += stream * M * V
    if until is not None:
        until += stream * M
        all_last = first

    queries = _load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    grad = _load_tile(do + base * GROUP * V, query * V, real, V, BLOCK_V)
    log_sum = tl.load(lse + base * GROUP + query, mask=real, other=0.0)
    rest = tl.load(lse_rest + base * GROUP + query, mask=real, other=0.0)
    mean = tl.load(delta + base * GROUP + query, mask=real, other=0.0)
    own_slope = tl.load(self_slope + base * GROUP + query, mask=real, other=0.0)
    acc = own_slope[:, None] * _load_tile(k + base * K, token * K, real, K, BLOCK_K).to(tl.float32)
    tiles, inside, inside_end = _tiles(first, last, all_first, all_last, BLOCK_N)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        acc = _add_dq(
            acc, queries, grad, log_sum, rest, mean, k_kept, v_kept, until, first + i * BLOCK_N, last,
            begin_of, end_of, t, masked, log2_scale, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    _store_tile(dq + base * GROUP * K, query * K, acc * scale, real, K, BLOCK_K)


@triton.jit
def _first_above(x, bound, T, HK: tl.constexpr):
    """Of each `bound`, the first of `T` places of `x` that exceeds it; `T` if none does."""
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
    """By which queries each column is seen: from, and up to but without."""
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
    """What the rows `start..start + BLOCK_M` before `last` add to the gradients of a tile of columns.

    Weights and slopes are computed transposed: Triton 3.4 to 3.7.0 miscompile the product of a transposed product.
    """
    r = tl.arange(0, BLOCK_M)
    _, base, _, query = _query_rows(start, stream, T, HK, GROUP, BLOCK_M)
    real = r < last - start
    queries = _load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    log_sum = tl.load(lse + base * GROUP + query, mask=real, other=0.0)
    rest = tl.load(lse_rest + base * GROUP + query, mask=real, other=0.0)
    logits = tl.dot(k, tl.trans(queries), input_precision="ieee")
    weights = tl.exp2((logits * log2_scale - log_sum[None, :]) - rest[None, :])
    if masked:
        visible = (r[None, :] >= (seen_from * GROUP - start)[:, None]) & (
            r[None, :] < (seen_until * GROUP - start)[:, None]
        )
        weights = tl.where(visible, weights, 0.0)
    grad = _load_tile(do + base * GROUP * V, query * V, real, V, BLOCK_V)
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
    stream, tile = _stream_and_tile(M, BLOCK_N, False)
    c = tl.arange(0, BLOCK_N)
    column = tile * BLOCK_N + c
    seen += 2 * stream * M
    seen_from = tl.load(seen + column, mask=column < M, other=0)
    seen_until = tl.load(seen + M + column, mask=column < M, other=0)
    # A column that nobody sees may hold anything, and has no say in which queries see all of the tile.
    exists = seen_from < seen_until
    first = tl.min(tl.where(exists, seen_from, T), 0) * GROUP
    last = tl.max(tl.where(exists, seen_until, 0), 0) * GROUP
    all_first = tl.max(tl.where(exists, seen_from, 0), 0) * GROUP
    all_last = tl.minimum(tl.min(tl.where(exists, seen_until, T), 0) * GROUP, last)

    start = stream * M + tile * BLOCK_N
    k = _load_tile(k_kept + start * K, c * K, exists, K, BLOCK_K)
    v = _load_tile(v_kept + start * V, c * V, exists, V, BLOCK_V)
    dkey = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    tiles, inside, inside_end = _tiles(first, last, all_first, all_last, BLOCK_M)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        dkey, dvalue = _add_dkv(
            dkey, dvalue, k, v, q, do, lse, lse_rest, delta, first + i * BLOCK_M, last, seen_from, seen_until, masked,
            stream, T, log2_scale, HK, GROUP, K, V, BLOCK_K, BLOCK_V, BLOCK_M,
        )  # fmt: skip
    dkey, dvalue = tl.where(exists[:, None], dkey * scale, 0.0), tl.where(exists[:, None], dvalue, 0.0)
    _store_tile(dk_kept + start * K, c * K, dkey, column < M, K, BLOCK_K)
    _store_tile(dv_kept + start * V, c * V, dvalue, column < M, V, BLOCK_V)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: they take contiguous tensors.
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = {
    "fwd": sparse_prefix_attention_fwd_kernel,
    "dq": sparse_prefix_attention_bwd_dq_kernel,
    "dkv": sparse_prefix_attention_bwd_dkv_kernel,
}


@functools.cache
def _tuned_kernel(name: str, itemsize: int, width: int, hopper: bool) -> Any:
    """The kernel with the tile shapes for a type of `itemsize` bytes and heads up to `width` wide."""
    kind = next((size, limit) for size, limit in TILES[name] if size == itemsize and width <= limit)
    tiles = (HOPPER_TILES[name].get(kind, []) if hopper else []) + TILES[name][kind]
    configs = [
        triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)
        for block_m, block_n, warps, stages in tiles
    ]
    return tuned(configs, key=["T_BUCKET", "M_BUCKET", "GROUP", "K", "V"])(KERNELS[name])


def _sizes(q: torch.Tensor, k_kept: torch.Tensor, v_kept: torch.Tensor) -> dict[str, int]:
    """The arguments in capitals, but for tile shapes and lengths."""
    heads, (kv_heads, key_dim), value_dim = q.shape[2], (k_kept.shape[1], k_kept.shape[3]), v_kept.shape[3]
    block_k, block_v = (max(16, triton.next_power_of_2(x)) for x in (key_dim, value_dim))
    return {
        "HK": kv_heads, "GROUP": heads // kv_heads,
        "K": key_dim, "V": value_dim, "BLOCK_K": block_k, "BLOCK_V": block_v,
    }  # fmt: skip


def _launch(name: str, q: torch.Tensor, k_kept: torch.Tensor, v_kept: torch.Tensor, *arguments: Any) -> None:
    """Runs a kernel, one program per tile and stream."""
    length, columns, sizes = q.shape[1], k_kept.shape[2], _sizes(q, k_kept, v_kept)
    streams = q.shape[0] * sizes["HK"]

    def grid(meta: dict[str, int]) -> tuple[int]:
        if name == "dkv":
            return (triton.cdiv(columns, meta["BLOCK_N"]) * streams,)
        return (triton.cdiv(length * sizes["GROUP"], meta["BLOCK_M"]) * streams,)

    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)
    kernel = _tuned_kernel(name, q.element_size(), max(sizes["K"], sizes["V"]), hopper)
    kernel[grid](*arguments, length, columns, next_bucket(length), next_bucket(columns), **sizes)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs `[B, T, H, V]`; `[B, T, H]` float32: base-2 log-sum-exp, its rest, each query's weight on itself."""
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lse_rest, self_weight, log2_scale = torch.empty_like(lse), torch.empty_like(lse), scale * LOG2E.value
    _launch(
        "fwd", q, k_kept, v_kept,
        q, k, v, k_kept, v_kept, begin, end, until, o, lse, lse_rest, self_weight, log2_scale,
    )  # fmt: skip
    return o, lse, lse_rest, self_weight


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
    sizes, length = _sizes(q, k_kept, v_kept), q.shape[1]
    block_t = SELF_ELEMENTS // max(sizes["BLOCK_K"], sizes["BLOCK_V"])
    sparse_prefix_attention_bwd_self_kernel[(triton.cdiv(length, block_t), q.shape[0] * sizes["HK"])](
        q, v, o, do, self_weight, dlse, dk, dv, delta, self_slope, scale, length,
        **sizes, BLOCK_T=block_t, num_warps=SELF_WARPS,
    )  # fmt: skip
    _launch(
        "dq", q, k_kept, v_kept,
        q, k, k_kept, v_kept, begin, end, until, do, lse, lse_rest, delta, self_slope, dq, scale, log2_scale,
    )  # fmt: skip
    columns, streams = k_kept.shape[2], q.shape[0] * sizes["HK"]
    if columns:
        seen = torch.empty(streams, 2, columns, dtype=torch.int32, device=q.device)
        sparse_prefix_attention_bwd_seen_kernel[(triton.cdiv(columns, SEEN_COLUMNS), streams)](
            begin, end, until, seen, length, columns, sizes["HK"], SEEN_COLUMNS, num_warps=4
        )
        _launch(
            "dkv", q, k_kept, v_kept,
            q, k_kept, v_kept, seen, do, lse, lse_rest, delta, dk_kept, dv_kept, scale, log2_scale,
        )  # fmt: skip
    return dq, dk, dv, dk_kept, dv_kept


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


class SparsePrefixAttentionFunction(torch.autograd.Function):
    """`sparse_prefix_attention` of at least one query; the log-sum-exp is in units of log 2, as the kernels use it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_kept: torch.Tensor,
        v_kept: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        until: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, k_kept, v_kept, begin, end = (x.contiguous() for x in (q, k, v, k_kept, v_kept, begin, end))
        until = None if until is None else until.contiguous()
        o, *sums = sparse_prefix_attention_fwd(q, k, v, k_kept, v_kept, begin, end, until, scale)
        ctx.save_for_backward(q, k, v, k_kept, v_kept, begin, end, until, o, *sums)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o, sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        o = ctx.saved_tensors[8]
        do = torch.zeros_like(o) if do is None else do.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        grads = sparse_prefix_attention_bwd(*ctx.saved_tensors, do, dlse, ctx.scale)  # type: ignore[call-arg]
        return *grads, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------------------------------


def sparse_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each query over a span of compacted kept tokens and itself.

    Work is proportional to the spans, memory to `T`. Differentiable in `q`, `k`, `v`, `k_kept` and `v_kept`, through
    the log-sum-exp too. Columns outside `begin[:, 0] <= c < end[:, -1]` are never read and may hold anything.

    Args:
        q: `[B, T, H, K]` queries in float32, float16 or bfloat16; `H` is a multiple of `Hk`; `K` is at most 256.
        k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`, each query's own key and value, which it always sees, in the dtype
            of `q`; under autocast all five are cast.
        k_kept, v_kept: `[B, Hk, M, K]` and `[B, Hk, M, V]` compacted keys and values, in the dtype of `q`.
        begin, end: `[B, T, Hk]` int, query `t` sees columns `begin <= c < end`; both must not fall along `T`.
        until: `[B, Hk, M]` int, column `c` is seen by queries `t < until` only; `None` if nothing is ever evicted.
        scale: positive factor of the logits; `K ** -0.5` if `None`.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        `[B, T, H, V]` in the dtype of `v`; with `return_lse` also `[B, T, H]` float32, the natural logarithm of the
        sum of each query's exponentials.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or scale; the message names the argument.
    """
    if isinstance(q, torch.Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, k_kept, v_kept = (x.to(dtype) for x in (q, k, v, k_kept, v_kept))
    _check({"q": q, "k": k, "v": v, "k_kept": k_kept, "v_kept": v_kept}, {"begin": begin, "end": end, "until": until})
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be positive and finite, got {scale}.")
    check_platform(q.device)
    begin, end, until = begin.long(), end.long(), None if until is None else until.long()
    if q.shape[0] * q.shape[1] == 0:
        o, lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        with torch.cuda.device_of(q):
            o, lse = SparsePrefixAttentionFunction.apply(q, k, v, k_kept, v_kept, begin, end, until, float(scale))
    return (o, lse / LOG2E.value) if return_lse else o


def _check(floats: dict[str, Any], ints: dict[str, Any]) -> None:
    q = floats["q"]
    for name, x in (floats | ints).items():
        if name == "until" and x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")
        if name in floats and (x.dtype not in DTYPES or x.dtype != q.dtype):
            raise TypeError(f"`{name}` must be float32, float16 or bfloat16 like `q`, {q.dtype}, got {x.dtype}.")
        if name in ints and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise TypeError(f"`{name}` must be an integer tensor, got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"`{name}` must be on the device of `q`, {q.device}, got {x.device}.")
        if x.ndim != (4 if name in floats else 3):
            raise ValueError(f"`{name}` must have {4 if name in floats else 3} dimensions, got {list(x.shape)}.")
    batch, length, heads, key_dim = q.shape
    kv_heads, columns, value_dim = floats["k"].shape[2], floats["k_kept"].shape[2], floats["v"].shape[3]
    shapes = {
        "k": (batch, length, kv_heads, key_dim),
        "v": (batch, length, kv_heads, value_dim),
        "k_kept": (batch, kv_heads, columns, key_dim),
        "v_kept": (batch, kv_heads, columns, value_dim),
        "begin": (batch, length, kv_heads),
        "end": (batch, length, kv_heads),
        "until": (batch, kv_heads, columns),
    }
    for name, shape in shapes.items():
        x = (floats | ints)[name]
        if x is not None and x.shape != shape:
            raise ValueError(
                f"`{name}` must be {list(shape)} to go with `q`, `k`, `v` and `k_kept`, got {list(x.shape)}."
            )
    if kv_heads == 0 or heads % kv_heads or heads == 0:
        raise ValueError(f"`q` must have a multiple of the {kv_heads} heads of `k`, got {heads}.")
    if not (0 < key_dim <= MAX_HEAD_DIM and 0 < value_dim <= MAX_HEAD_DIM):
        raise ValueError(
            f"`q` and `v` must have head dimensions of 1 to {MAX_HEAD_DIM}, got {key_dim} and {value_dim}."
        )
    if max(length, columns) > MAX_LENGTH:
        raise ValueError(f"`q` and `k_kept` must have at most {MAX_LENGTH} tokens, got {length} and {columns}.")


def _aot_cases(tiles: dict[str, dict[tuple[int, int], list[tuple[int, int, int, int]]]]) -> list[dict[str, Any]]:
    """Tiles for bfloat16 at head dimensions 64 and 128, the first of each kernel also with groups and `until`."""
    return [
        _aot_case(KERNELS[name], dim, group, warps, stages, {"BLOCK_M": block_m, "BLOCK_N": block_n}, optional)
        for dim in (128, 64)
        for name in KERNELS
        for i, (block_m, block_n, warps, stages) in enumerate(tiles[name].get((2, dim), []))
        for group, optional in ((1, ""), (4, "until"))[: 2 if i == 0 else 1]
    ]


def _aot_case(
    kernel: Any, dim: int, group: int, warps: int, stages: int, blocks: dict[str, int], optional: str
) -> dict[str, Any]:
    """One entry of `AOT_CASES`; of the tensors that may be absent, only `optional` is there."""
    pointers = {"begin": "*i64", "end": "*i64", "until": "*i64", "seen": "*i32"}
    pointers |= dict.fromkeys(("lse", "lse_rest", "self_weight", "delta", "self_slope", "dlse"), "*fp32")
    scalars = {"scale": "fp32", "log2_scale": "fp32"} | dict.fromkeys(("T", "M", "T_BUCKET", "M_BUCKET"), "i32")
    sizes = {"HK": 16, "GROUP": group, "K": dim, "V": dim, "BLOCK_K": dim, "BLOCK_V": dim, **blocks}
    names = [name for name in kernel.arg_names if name not in sizes]
    constexprs: dict[str, Any] = {name: size for name, size in sizes.items() if name in kernel.arg_names}
    constexprs |= {name: None for name in names if name in ("until", "dlse") and name != optional}
    signature = {name: scalars.get(name) or pointers.get(name, "*bf16") for name in names if name not in constexprs}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": stages,
    }


AOT_CASES = [
    *_aot_cases(TILES),
    *(
        _aot_case(
            sparse_prefix_attention_bwd_self_kernel, dim, 4, SELF_WARPS, 3, {"BLOCK_T": SELF_ELEMENTS // dim}, "dlse"
        )
        for dim in (64, 128)
    ),
    _aot_case(sparse_prefix_attention_bwd_seen_kernel, 128, 1, 4, 3, {"BLOCK_N": SEEN_COLUMNS}, "until"),
]
# For sm_90 only.
HOPPER_AOT_CASES = _aot_cases(HOPPER_TILES)

__all__ = ["sparse_prefix_attention"]
