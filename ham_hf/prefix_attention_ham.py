# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Sparse prefix attention: compaction of kept tokens, and attention over them, in blocks of queries."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .ops_ham import kernel_for

# Queries per attention block, whose logits are held at once; twice as many from `MANY_COLUMNS` columns on.
QUERY_BLOCK = 64

MANY_COLUMNS = 512

# Streams whose kept counts lie within this ratio share one padded batch, which bounds the cost of padding.
GROUP_RATIO = 0.75

# Mask elements per query head in such a batch, roughly: larger masks do not fit in a CPU core's own cache.
GROUP_ELEMENTS = 2**18


def compact_kept(keep: torch.Tensor, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gathers the kept tokens of each row and head, in order, to the front.

    Args:
        keep: `[B, T, Hk]` bool.
        tensors: each `[B, T, Hk, D]`.

    Returns:
        each tensor as `[B, Hk, M, D]`, where `M` is the largest number kept (entries past a head's own number are
        unspecified), and `[B, T, Hk]` int64, the number of tokens kept before each.
    """
    if kernel := kernel_for("compact_kept", keep, *tensors):
        return kernel(keep, *tensors)
    counts = keep.cumsum(1)
    largest = int(counts[:, -1].max()) if keep.numel() else 0
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :largest].transpose(1, 2)
    compacted = [x.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in tensors]
    return compacted, counts - keep.long()


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
    window_start: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each query over a span of compacted kept tokens, its window of the last tokens and itself.

    Without windows, column `end[t]` holds token `t` itself if it is kept; with them, a span ends where the window
    starts. Work is proportional to spans and windows; backward recomputes the weights, so memory is linear in `T`.

    Args:
        q: `[B, T, H, K]` queries; `H` is a multiple of `Hk`.
        k, v: `[B, L, Hk, K]` and `[B, L, Hk, V]`. The last `T` tokens are the queries' own, which they always see;
            those before are in windows only.
        k_kept, v_kept: `[B, Hk, M, K]` and `[B, Hk, M, V]` compacted keys and values.
        begin, end: `[B, T, Hk]` int, query `t` sees columns `begin <= c < end`; neither may fall along `T`.
        until: `[B, Hk, M]` int, only queries `t < until` see column `c`; `None` if nothing is ever evicted.
        scale: factor of the logits; `K ** -0.5` if `None`.
        window_start: `[B, T]` int, the first token of `k` and `v` in the window of query `t`, which reaches to `t`
            itself; it may not fall along `T`. `None` without windows, and then `L` is `T`.
        real: `[B, L]` bool, false for padding, which no window shows; `None` if every token is real.

    Returns:
        `[B, T, H, V]` in the dtype of `v`.
    """
    batch, _, kv_heads, key_dim = k.shape
    scale = key_dim**-0.5 if scale is None else scale
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, k_kept, v_kept = (x.to(dtype) for x in (q, k, v, k_kept, v_kept))
    if kernel := kernel_for("sparse_prefix_attention", k, v):
        return kernel(q, k, v, k_kept, v_kept, begin, end, until, scale, window_start, real)
    q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * Hk, G, T, K]
    k, v, begin, end = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, begin, end))
    k_kept, v_kept = k_kept.flatten(0, 1), v_kept.flatten(0, 1)
    until = None if until is None else until.flatten(0, 1)
    window_start, real = (None if x is None else x.repeat_interleave(kv_heads, 0) for x in (window_start, real))
    out = _SparsePrefixAttention.apply(q, k, v, k_kept, v_kept, scale, begin, end, until, window_start, real)
    return out.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Spans(NamedTuple):
    """Which tokens the queries of `N` streams see: arguments of `sparse_prefix_attention`, as `[N, ...]`."""

    begin: torch.Tensor
    end: torch.Tensor
    until: torch.Tensor | None
    window_start: torch.Tensor | None
    real: torch.Tensor | None

    def of(self, streams: torch.Tensor | slice) -> "_Spans":
        """The spans of some of the streams."""
        until, window_start, real = (None if x is None else x[streams] for x in self[2:])
        return _Spans(self.begin[streams], self.end[streams], until, window_start, real)


class _SparsePrefixAttention(torch.autograd.Function):
    """`sparse_prefix_attention` over streams, one per row and key/value head, in blocks of queries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_kept: torch.Tensor,
        v_kept: torch.Tensor,
        scale: float,
        *spans: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, k_kept, v_kept, *spans)
        ctx.scale = scale
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        for block in _blocks(k, v, k_kept, v_kept, _Spans(*spans), q.shape[1]):
            queries = q[block.streams, :, block.rows]
            # The queries of a group form one matrix, which is faster than several matrices that share their keys.
            block_out = F.scaled_dot_product_attention(
                queries.flatten(1, 2)[:, None],
                block.keys[:, None],
                block.values[:, None],
                attn_mask=block.mask.flatten(1, 2)[:, None],
                scale=scale,
            )
            out[block.streams, :, block.rows] = block_out.view(*queries.shape[:3], -1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, k_kept, v_kept, *spans = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Summed over blocks, so at least in float32.
        dtype = torch.promote_types(q.dtype, torch.float32)
        dk, dv, dk_kept, dv_kept = (torch.zeros_like(x, dtype=dtype) for x in (k, v, k_kept, v_kept))
        for block in _blocks(k, v, k_kept, v_kept, _Spans(*spans)):
            streams, rows, near, columns = block.streams, block.rows, block.near, block.columns
            queries, dout = q[streams, :, rows] * ctx.scale, grad[streams, :, rows]
            shape = (*queries.shape[:3], block.keys.shape[1])
            queries, dout = queries.flatten(1, 2), dout.flatten(1, 2)
            logits = (queries @ block.keys.mT).view(shape) + block.mask
            weights = logits.softmax(-1, dtype=dtype).to(q.dtype).flatten(1, 2)
            dlogits = dout @ block.values.mT
            dlogits = weights * (dlogits - (weights * dlogits).sum(-1, keepdim=True))
            dq[streams, :, rows] = (dlogits @ block.keys).view(*shape[:3], -1) * ctx.scale
            dkeys, dvalues = dlogits.mT @ queries, weights.mT @ dout
            own = near.stop - near.start
            dk[streams, near] += dkeys[:, :own]
            dv[streams, near] += dvalues[:, :own]
            dk_kept[streams, columns] += dkeys[:, own:]
            dv_kept[streams, columns] += dvalues[:, own:]
        gradients = (x.to(q.dtype) for x in (dk, dv, dk_kept, dv_kept))
        return dq, *gradients, None, None, None, None, None, None


class _Block(NamedTuple):
    """A block of queries: its streams, its rows, and the keys and values that they read.

    The keys `[n, near + C, K]` and values `[n, near + C, V]` start with the tokens `near`, the block's own and those
    in its windows, followed by `C` kept columns. The mask `[n, copies, t, near + C]` is 0 where a query may look, else
    -inf. All are views that the next block overwrites.
    """

    streams: torch.Tensor | slice
    rows: slice
    near: slice
    columns: slice
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


def _blocks(
    k: torch.Tensor, v: torch.Tensor, k_kept: torch.Tensor, v_kept: torch.Tensor, spans: _Spans, copies: int = 1
) -> Iterator[_Block]:
    """Yields the blocks of each group of streams with similar numbers of columns; repeats each mask `copies` times."""
    length = spans.end.shape[1]
    firsts, lasts, ends = (x.tolist() for x in (spans.begin[:, 0], spans.begin[:, -1], spans.end[:, -1]))
    later = k.new_full((2 * QUERY_BLOCK, 2 * QUERY_BLOCK), -torch.inf).triu()
    totals = [last - first for first, last in zip(firsts, ends, strict=True)]
    for group in group_alike(totals):
        size = min(_block_size(max(totals[n] for n in group)), length)
        streams = slice(group[0], group[0] + 1) if len(group) == 1 else torch.tensor(group, device=k.device)
        group_spans = spans.of(streams)
        places = list(_places(group_spans, size, k.shape[1]))
        # True if the queries of a block share all but its last columns.
        alike = len(group) == 1 and firsts[group[0]] == lasts[group[0]] and spans.until is None
        # Space in front for a block's own keys, which overwrite columns that no later query sees.
        space = max(near.stop - near.start for _, near, _ in places)
        keys, values = (F.pad(x[streams], (0, 0, space, 0)) for x in (k_kept, v_kept))
        mask = keys.new_zeros(len(group), copies, size, space + max(x.stop - x.start for _, _, x in places))
        for rows, near, columns in places:
            own = near.stop - near.start
            first, last = columns.start + space - own, columns.stop + space
            keys[:, first : first + own], values[:, first : first + own] = k[streams, near], v[streams, near]
            block_mask = mask[:, :, : rows.stop - rows.start, : last - first]
            if spans.window_start is None:
                _mask(block_mask, group_spans, rows, columns, later, alike)
            else:
                _mask_with_windows(block_mask, group_spans, rows, near, columns, alike)
            yield _Block(streams, rows, near, columns, keys[:, first:last], values[:, first:last], block_mask)


def _places(spans: _Spans, size: int, tokens: int) -> Iterator[tuple[slice, slice, slice]]:
    """The rows, near tokens (out of `tokens`) and kept columns of each block of `size` queries of some streams."""
    length = spans.end.shape[1]
    start = torch.arange(0, length, size, device=spans.end.device)
    stop = (start + size).clamp(max=length)
    low = spans.begin[:, start].amin(0)
    if spans.window_start is None:
        near, high = start, spans.end[:, start].amax(0)
    else:
        near, high = spans.window_start[:, start].amin(0), spans.end[:, stop - 1].amax(0)
    for first, last, *bounds in torch.stack([start, stop, near, low, high], 1).tolist():
        yield slice(first, last), slice(bounds[0], tokens - length + last), slice(bounds[1], max(bounds[1:]))


def _block_size(columns: int) -> int:
    """Queries per block: they also read all of its own keys, so short blocks suit few columns, long ones many."""
    return QUERY_BLOCK if columns < MANY_COLUMNS else 2 * QUERY_BLOCK


def _mask(mask: torch.Tensor, spans: _Spans, rows: slice, columns: slice, later: torch.Tensor, alike: bool) -> None:
    """Writes the mask `[n, copies, t, t + C]` of a block without windows over that of the block before.

    `later` `[m, m]` is 0 below the diagonal, else -inf; `alike` is true if all queries see all of the `C` columns.
    """
    own = rows.stop - rows.start
    # Token `t` is kept if `end[t + 1] > end[t]`; then it is in column `end[t]`.
    end = spans.end[:, rows.start : rows.stop + 1]
    kept = F.pad(end[:, 1:] > end[:, :-1], (0, own + 1 - end.shape[1]))
    inside = torch.zeros_like(kept, dtype=mask.dtype).masked_fill_(~kept, -torch.inf)[:, None] + later[:own, :own]
    inside.diagonal(dim1=1, dim2=2).zero_()
    if alike:
        mask[..., own : len(later)] = 0  # where a longer block masked its own tokens
    else:
        inside.masked_fill_(~_visible_inside(spans, rows), -torch.inf)
        visible = _visible_columns(spans, rows, spans.end[:, rows.start, None], columns)
        mask[..., own:] = torch.where(visible, 0.0, -torch.inf)[:, None]
    mask[..., :own] = inside[:, None]


def _mask_with_windows(
    mask: torch.Tensor, spans: _Spans, rows: slice, near: slice, columns: slice, alike: bool
) -> None:
    """Writes the mask `[n, copies, t, near + C]` of a block with windows over that of the block before.

    `alike` is true if all queries see all of the `C` columns but those kept since the first query's window started.
    """
    token = torch.arange(near.start, near.stop, device=mask.device)
    query = token[rows.start - rows.stop :, None]
    start = query[None] if spans.window_start is None else spans.window_start[:, rows, None]
    visible = (token >= start) & (token < query)
    if spans.real is not None:
        visible &= spans.real[:, None, near]
    own = near.stop - near.start
    mask[..., :own] = torch.where(visible | (token == query), 0.0, -torch.inf)[:, None]
    if alike:
        shared = int(spans.end[0, rows.start])
        mask[..., own : own + shared - columns.start] = 0
        columns = slice(shared, columns.stop)
    if columns.start < columns.stop:
        visible = _visible_columns(spans, rows, spans.end[:, rows], columns)
        mask[..., columns.start - columns.stop :] = torch.where(visible, 0.0, -torch.inf)[:, None]


def _visible_inside(spans: _Spans, rows: slice) -> torch.Tensor:
    """`[n, t, t]` bool: the block's own tokens that its queries may see, as if all were kept and earlier."""
    begin, end = spans.begin[:, rows], spans.end[:, rows]
    visible = end.unsqueeze(1) >= begin.unsqueeze(2)
    if spans.until is not None:
        query = torch.arange(rows.start, rows.stop, device=end.device)
        column = end.clamp(max=spans.until.shape[1] - 1)
        visible &= query[:, None] < spans.until.gather(1, column).unsqueeze(1)
    return visible | torch.eye(end.shape[1], dtype=torch.bool, device=end.device)


def _visible_columns(spans: _Spans, rows: slice, end: torch.Tensor, columns: slice) -> torch.Tensor:
    """`[n, t, C]` bool: the columns before `end` `[n, t or 1]` that a block's queries may see."""
    column = torch.arange(columns.start, columns.stop, device=end.device)
    visible = (column >= spans.begin[:, rows, None]) & (column < end[..., None])
    if spans.until is not None:
        query = torch.arange(rows.start, rows.stop, device=end.device)
        visible &= query[:, None] < spans.until[:, None, columns]
    return visible


def group_alike(counts: list[int]) -> list[list[int]]:
    """Partitions the indices of `counts` into small groups whose counts are at least `GROUP_RATIO` of the largest."""
    groups: list[list[int]] = []
    largest = 0
    for n in sorted(range(len(counts)), key=lambda n: -counts[n]):
        size = _block_size(largest)
        room = max(1, GROUP_ELEMENTS // (size * (size + largest)))
        if not groups or counts[n] < GROUP_RATIO * largest or len(groups[-1]) == room:
            groups.append([])
            largest = counts[n]
        groups[-1].append(n)
    return [sorted(group) for group in groups]


__all__ = ["compact_kept", "group_alike", "sparse_prefix_attention"]
