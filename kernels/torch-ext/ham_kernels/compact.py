# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compaction: gathers the kept tokens of each row and head, in order, so that attention computes only those.

The first kernel counts the kept tokens of each chunk. The second adds up the counts before a chunk, and scans it.
Chunks are independent, so a few heads fill the chip as well as many. The third kernel moves the rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from .tuning import check_platform

# Elements that one program holds at once: 16 for each of 256 threads.
TILE_ELEMENTS = 4096
NUM_WARPS = 8


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A row has `HK` heads, `T` tokens and `M` columns; a stream is one head of one row. All programs are on the
# first axis of the grid, as the others end at 65,535.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def compact_kept_count_kernel(keep, counts, T, HK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    chunks = tl.cdiv(T, BLOCK_T)
    chunk, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.arange(0, BLOCK_H)
    mask = (t < T)[:, None] & (h < HK)[None, :]
    kept = tl.load(keep + row * T * HK + t.to(tl.int64)[:, None] * HK + h[None, :], mask=mask, other=0)
    count = tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + (row * chunks + chunk) * HK + h, count, mask=h < HK)


@triton.jit(do_not_specialize=["T"])
def compact_kept_scan_kernel(
    keep, counts, before, total, T, HK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):
    chunks = tl.cdiv(T, BLOCK_T)
    chunk, row = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    carry = tl.zeros([BLOCK_H], dtype=tl.int32)
    for start in range(0, chunk, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = (i < chunk)[:, None] & (h < HK)[None, :]
        carry += tl.sum(tl.load(counts + (row * chunks + i[:, None]) * HK + h[None, :], mask=mask, other=0), 0)
    t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (t < T)[:, None] & (h < HK)[None, :]
    offsets = row * T * HK + t.to(tl.int64)[:, None] * HK + h[None, :]
    kept = tl.load(keep + offsets, mask=mask, other=0).to(tl.int32)
    tl.store(before + offsets, (carry[None, :] + tl.cumsum(kept, 0) - kept).to(tl.int64), mask=mask)
    if chunk == chunks - 1:
        tl.store(total + row * HK + h, carry + tl.sum(kept, 0), mask=h < HK)


@triton.jit(do_not_specialize=["T", "M"])
def compact_kept_fwd_kernel(
    x, out, keep, before, total, stride_b, stride_t, stride_h, T, M,
    HK: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(T, BLOCK_T)
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    row, head = stream // HK, stream % HK
    t = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    kept = tl.load(keep + (row * T + t) * HK + head, mask=t < T, other=0) != 0
    column = tl.load(before + (row * T + t) * HK + head, mask=t < T, other=0)
    # Dropped tokens write zeros to the columns past the kept ones, so each column is written once.
    column = tl.where(kept, column, tl.load(total + stream) + t - column)
    inside = (t < T) & (column < M)
    source = x + row * stride_b + head * stride_h + t[:, None] * stride_t + d[None, :]
    values = tl.load(source, mask=(kept & inside)[:, None] & (d < D)[None, :], other=0)
    tl.store(out + (stream * M + column[:, None]) * D + d[None, :], values, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T", "M"])
def compact_kept_bwd_kernel(
    grad, dx, keep, before, T, M,
    HK: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(T, BLOCK_T)
    stream = (tl.program_id(0) // chunks).to(tl.int64)
    row, head = stream // HK, stream % HK
    t = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    kept = tl.load(keep + (row * T + t) * HK + head, mask=t < T, other=0) != 0
    column = tl.load(before + (row * T + t) * HK + head, mask=t < T, other=0)
    source = grad + (stream * M + column[:, None]) * D + d[None, :]
    values = tl.load(source, mask=(kept & (column < M))[:, None] & (d < D)[None, :], other=0)
    target = dx + ((row * T + t[:, None]) * HK + head) * D + d[None, :]
    tl.store(target, values, mask=(t < T)[:, None] & (d < D)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def _tile(size: int) -> tuple[int, int]:
    """Sides of a tile of `TILE_ELEMENTS`; the second covers `size`."""
    side = triton.next_power_of_2(size)
    return max(1, TILE_ELEMENTS // side), side


def count_before(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens kept before each token, `[B, T, Hk]` int64, and in all, `[B, Hk]` int32; `keep` is contiguous."""
    batch, length, heads = keep.shape
    flags = keep.view(torch.uint8)
    block_t, block_h = _tile(heads)
    chunks = triton.cdiv(length, block_t)
    grid = (batch * chunks,)
    counts = torch.empty(batch, chunks, heads, dtype=torch.int32, device=keep.device)
    before = torch.empty(keep.shape, dtype=torch.int64, device=keep.device)
    total = torch.empty(batch, heads, dtype=torch.int32, device=keep.device)
    compact_kept_count_kernel[grid](flags, counts, length, heads, block_t, block_h, num_warps=NUM_WARPS)
    compact_kept_scan_kernel[grid](flags, counts, before, total, length, heads, block_t, block_h, num_warps=NUM_WARPS)
    return before, total


def compact_kept_fwd(
    x: torch.Tensor, keep: torch.Tensor, before: torch.Tensor, total: torch.Tensor, columns: int
) -> torch.Tensor:
    """Gathers `x` `[B, T, Hk, D]` into `[B, Hk, columns, D]`, zero past a head's own count."""
    batch, length, heads, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    # The kernel writes one column per token; further columns must be zero beforehand.
    out = (torch.empty if columns <= length else torch.zeros)(
        batch, heads, columns, dim, dtype=x.dtype, device=x.device
    )
    if not out.numel():
        return out
    block_t, block_d = _tile(dim)
    grid = (batch * heads * triton.cdiv(length, block_t),)
    compact_kept_fwd_kernel[grid](
        x, out, keep.view(torch.uint8), before, total, *x.stride()[:3], length, columns,
        heads, dim, block_t, block_d, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def compact_kept_bwd(grad: torch.Tensor, keep: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Scatters the columns' gradient `[B, Hk, M, D]` to the tokens, `[B, T, Hk, D]`; dropped tokens get zero."""
    batch, length, heads = keep.shape
    columns, dim = grad.shape[2:]
    dx = torch.empty(batch, length, heads, dim, dtype=grad.dtype, device=grad.device)
    block_t, block_d = _tile(dim)
    grid = (batch * heads * triton.cdiv(length, block_t),)
    compact_kept_bwd_kernel[grid](
        grad.contiguous(), dx, keep.view(torch.uint8), before, length, columns,
        heads, dim, block_t, block_d, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


class CompactKeptFunction(torch.autograd.Function):
    """`compact_kept` for tensors that are not empty."""

    @staticmethod
    def forward(
        ctx: Any, keep: torch.Tensor, capacity: int | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        keep = keep.contiguous()
        before, total = count_before(keep)
        columns = int(total.max()) if capacity is None else capacity
        compacted = [compact_kept_fwd(x, keep, before, total, columns) for x in tensors]
        ctx.save_for_backward(keep, before)
        ctx.mark_non_differentiable(before, *(x for x in compacted if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return before, *compacted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        keep, before = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(
                compact_kept_bwd(grad, keep, before) if want and grad is not None else None
                for want, grad in zip(wanted, grads, strict=True)
            ),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Public function
# ---------------------------------------------------------------------------------------------------------------------


def compact_kept(
    keep: torch.Tensor, *tensors: torch.Tensor, capacity: int | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gathers the kept tokens of each row and head, in order, to the front.

    Differentiable in `tensors`, which may differ in dtype and last dimension.

    Args:
        keep: `[B, T, Hk]` bool.
        tensors: each `[B, T, Hk, D]`.
        capacity: number of columns to return; tokens kept beyond it are lost. `None` returns as many as needed, for
            which the host waits for the device; with a capacity it never waits.

    Returns:
        each tensor as `[B, Hk, M, D]`, `M` the largest number kept or `capacity` (zero past a head's own number), and
        `[B, T, Hk]` int64, the number of tokens kept before each token.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or capacity; the message names the argument.
    """
    _check(keep, tensors, capacity)
    check_platform(keep.device)
    if not keep.numel():
        columns, (batch, _, heads) = capacity or 0, keep.shape
        empty = [x.new_zeros(batch, heads, columns, x.shape[-1]) for x in tensors]
        return empty, torch.zeros(keep.shape, dtype=torch.int64, device=keep.device)
    with torch.cuda.device_of(keep):
        before, *compacted = CompactKeptFunction.apply(keep, capacity, *tensors)
    return compacted, before


def _check(keep: torch.Tensor, tensors: tuple[torch.Tensor, ...], capacity: int | None) -> None:
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
        raise TypeError(f"`keep` must be a bool tensor, got {getattr(keep, 'dtype', type(keep).__name__)}.")
    if keep.ndim != 3:
        raise ValueError(f"`keep` must be [B, T, Hk], got {list(keep.shape)}.")
    for i, x in enumerate(tensors):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"`tensors[{i}]` must be a tensor, got {type(x).__name__}.")
        if x.ndim != 4 or x.shape[:3] != keep.shape or x.shape[3] == 0:
            raise ValueError(f"`tensors[{i}]` must be {[*keep.shape, 'D']}, got {list(x.shape)}.")
        if x.device != keep.device:
            raise ValueError(f"`tensors[{i}]` must be on the device of `keep`, {keep.device}, got {x.device}.")
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int)):
        raise TypeError(f"`capacity` must be an int or None, got {capacity!r}.")
    if capacity is not None and capacity < 0:
        raise ValueError(f"`capacity` must not be negative, got {capacity}.")


__all__ = ["compact_kept"]
