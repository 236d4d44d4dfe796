# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Forward pass of sparse prefix attention: an online softmax over tiles of kept columns."""

import torch
import triton
import triton.language as tl

from .tiles import LOG2E, launch, load_tile, query_rows, store_tile, stream_and_tile, tiles_between, visible_columns


@triton.jit
def _attend(
    acc, total, peak, q, k_kept, v_kept, until, start, last, begin, end, t, masked, log2_scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the columns `start..start + BLOCK_N` before `last`."""
    c = tl.arange(0, BLOCK_N)
    column = start + c
    k = load_tile(k_kept + start.to(tl.int64) * K, c * K, column < last, K, BLOCK_K)
    v = load_tile(v_kept + start.to(tl.int64) * V, c * V, column < last, V, BLOCK_V)
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
        all_last = first  # `begin` and `end` alone do not show which tiles every query sees whole

    queries = load_tile(q + base * GROUP * K, query * K, real, K, BLOCK_K)
    own_key = load_tile(k + base * K, token * K, real, K, BLOCK_K)
    own_logit = tl.sum(queries.to(tl.float32) * own_key.to(tl.float32), 1) * log2_scale
    peak = own_logit
    total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    acc = load_tile(v + base * V, token * V, real, V, BLOCK_V).to(tl.float32)
    tiles, inside, inside_end = tiles_between(first, last, all_first, all_last, BLOCK_N)
    for i in range(0, tiles):
        masked = (i < inside) | (i >= inside_end)
        acc, total, peak = _attend(
            acc, total, peak, queries, k_kept, v_kept, until, first + i * BLOCK_N, last, begin_of, end_of, t,
            masked, log2_scale, K, V, BLOCK_K, BLOCK_V, BLOCK_N,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes outputs `[B, T, H, V]` and, `[B, T, H]` float32, base-2 log-sum-exp, its rest, and own weights."""
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lse_rest, self_weight, log2_scale = torch.empty_like(lse), torch.empty_like(lse), scale * LOG2E.value
    launch(
        sparse_prefix_attention_fwd_kernel, "fwd", q, k_kept, v_kept,
        q, k, v, k_kept, v_kept, begin, end, until, o, lse, lse_rest, self_weight, log2_scale,
    )  # fmt: skip
    return o, lse, lse_rest, self_weight
