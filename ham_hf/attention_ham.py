# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention over kept tokens only: compaction, ragged attention over a paged cache, and eviction."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
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

# With at most this many queries per stream PyTorch reads pages in place: copied queries are no larger than the keys.
PAGED_QUERIES = 16


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
) -> torch.Tensor:
    """Softmax attention of each query over a span of compacted kept tokens and itself.

    Column `end[t]` holds token `t` itself if it is kept. Work is proportional to the spans; backward recomputes the
    weights, so memory is linear in `T`.

    Args:
        q: `[B, T, H, K]` queries; `H` is a multiple of `Hk`.
        k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`, each query's own key and value, which it always sees.
        k_kept, v_kept: `[B, Hk, M, K]` and `[B, Hk, M, V]` compacted keys and values.
        begin, end: `[B, T, Hk]` int, query `t` sees columns `begin <= c < end`; neither may fall along `T`.
        until: `[B, Hk, M]` int, only queries `t < until` see column `c`; `None` if nothing is ever evicted.
        scale: factor of the logits; `K ** -0.5` if `None`.

    Returns:
        `[B, T, H, V]` in the dtype of `v`.
    """
    batch, _, kv_heads, key_dim = k.shape
    scale = key_dim**-0.5 if scale is None else scale
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, k_kept, v_kept = (x.to(dtype) for x in (q, k, v, k_kept, v_kept))
    if kernel := kernel_for("sparse_prefix_attention", k, v):
        return kernel(q, k, v, k_kept, v_kept, begin, end, until, scale)
    q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * Hk, G, T, K]
    k, v, begin, end = (x.transpose(1, 2).flatten(0, 1) for x in (k, v, begin, end))
    k_kept, v_kept = k_kept.flatten(0, 1), v_kept.flatten(0, 1)
    until = None if until is None else until.flatten(0, 1)
    out = _SparsePrefixAttention.apply(q, k, v, k_kept, v_kept, begin, end, until, scale)
    return out.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


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
        begin: torch.Tensor,
        end: torch.Tensor,
        until: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, k_kept, v_kept, begin, end, until)
        ctx.scale = scale
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        for block in _blocks(k, v, k_kept, v_kept, begin, end, until, q.shape[1]):
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
        q, k, v, k_kept, v_kept, begin, end, until = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Summed over blocks, so at least in float32.
        dtype = torch.promote_types(q.dtype, torch.float32)
        dk_kept, dv_kept = torch.zeros_like(k_kept, dtype=dtype), torch.zeros_like(v_kept, dtype=dtype)
        for block in _blocks(k, v, k_kept, v_kept, begin, end, until):
            streams, rows, columns = block.streams, block.rows, block.columns
            queries, dout = q[streams, :, rows] * ctx.scale, grad[streams, :, rows]
            shape = (*queries.shape[:3], block.keys.shape[1])
            queries, dout = queries.flatten(1, 2), dout.flatten(1, 2)
            logits = (queries @ block.keys.mT).view(shape) + block.mask
            weights = logits.softmax(-1, dtype=dtype).to(q.dtype).flatten(1, 2)
            dlogits = dout @ block.values.mT
            dlogits = weights * (dlogits - (weights * dlogits).sum(-1, keepdim=True))
            dq[streams, :, rows] = (dlogits @ block.keys).view(*shape[:3], -1) * ctx.scale
            dkeys, dvalues = dlogits.mT @ queries, weights.mT @ dout
            dk[streams, rows], dv[streams, rows] = dkeys[:, : shape[2]], dvalues[:, : shape[2]]
            dk_kept[streams, columns] += dkeys[:, shape[2] :]
            dv_kept[streams, columns] += dvalues[:, shape[2] :]
        return dq, dk, dv, dk_kept.to(k_kept.dtype), dv_kept.to(v_kept.dtype), None, None, None, None


class _Block(NamedTuple):
    """A block of queries: its streams, its tokens, and the keys and values that they read.

    The keys `[n, t + C, K]` and values `[n, t + C, V]` start with the block's own `t` tokens, followed by the `C` kept
    columns before it; the mask `[n, copies, t, t + C]` is 0 where a query may look, else -inf. All are views that the
    next block overwrites.
    """

    streams: torch.Tensor | slice
    rows: slice
    columns: slice
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


def _blocks(
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    copies: int = 1,
) -> Iterator[_Block]:
    """Yields the blocks of each group of streams with similar numbers of columns; repeats each mask `copies` times."""
    length = end.shape[1]
    lows, highs = begin[:, ::QUERY_BLOCK].tolist(), end[:, ::QUERY_BLOCK].tolist()
    firsts, lasts, totals = begin[:, 0].tolist(), begin[:, -1].tolist(), (end[:, -1] - begin[:, 0]).tolist()
    # Token `t` is kept if `end[t + 1] > end[t]`; then it is in column `end[t]`.
    kept = F.pad(end[:, 1:] > end[:, :-1], (0, 1))
    dropped = torch.zeros_like(kept, dtype=k.dtype).masked_fill_(~kept, -torch.inf)
    later = k.new_full((2 * QUERY_BLOCK, 2 * QUERY_BLOCK), -torch.inf).triu()
    for group in _group_alike(totals):
        size = min(_block_size(max(totals[n] for n in group)), length)
        starts = range(0, length, size)
        streams = slice(group[0], group[0] + 1) if len(group) == 1 else torch.tensor(group, device=end.device)
        alike = len(group) == 1 and firsts[group[0]] == lasts[group[0]] and until is None
        # Space in front for a block's own keys, which overwrite columns that no later query sees.
        keys, values = (F.pad(x[streams], (0, 0, size, 0)) for x in (k_kept, v_kept))
        marks = [start // QUERY_BLOCK for start in starts]
        spans = [slice(min(lows[n][i] for n in group), max(highs[n][i] for n in group)) for i in marks]
        mask = keys.new_zeros(len(group), copies, size, size + max(x.stop - x.start for x in spans))
        for start, columns in zip(starts, spans, strict=True):
            own = min(size, length - start)
            rows = slice(start, start + own)
            first, last = columns.start + size - own, columns.stop + size
            keys[:, first : first + own], values[:, first : first + own] = k[streams, rows], v[streams, rows]
            block_mask = mask[:, :, :own, : last - first]
            inside = dropped[streams, None, rows] + later[:own, :own]
            inside.diagonal(dim1=1, dim2=2).zero_()
            if alike:
                block_mask[..., own:size] = 0  # where a longer block masked its own tokens
            else:
                inside.masked_fill_(~_visible_inside(begin, end, until, streams, rows), -torch.inf)
                visible = _visible_columns(begin, end, until, streams, rows, columns)
                block_mask[..., own:] = torch.where(visible, 0.0, -torch.inf)[:, None]
            block_mask[..., :own] = inside[:, None]
            yield _Block(streams, rows, columns, keys[:, first:last], values[:, first:last], block_mask)


def _block_size(columns: int) -> int:
    """Queries per block: they also read all of its own keys, so short blocks suit few columns, long ones many."""
    return QUERY_BLOCK if columns < MANY_COLUMNS else 2 * QUERY_BLOCK


def _visible_inside(
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    streams: torch.Tensor | slice,
    rows: slice,
) -> torch.Tensor:
    """`[n, t, t]` bool: the block's own tokens that its queries may see, as if all were kept and earlier."""
    begin, end = begin[streams, rows], end[streams, rows]
    visible = end.unsqueeze(1) >= begin.unsqueeze(2)
    if until is not None:
        query = torch.arange(rows.start, rows.stop, device=end.device)
        visible &= query[:, None] < until[streams].gather(1, end.clamp(max=until.shape[1] - 1)).unsqueeze(1)
    return visible | torch.eye(end.shape[1], dtype=torch.bool, device=end.device)


def _visible_columns(
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None,
    streams: torch.Tensor | slice,
    rows: slice,
    columns: slice,
) -> torch.Tensor:
    """`[n, t, C]` bool: the columns before a block that its queries may see."""
    column = torch.arange(columns.start, columns.stop, device=end.device)
    visible = (column >= begin[streams, rows, None]) & (column < end[streams, rows.start, None, None])
    if until is not None:
        query = torch.arange(rows.start, rows.stop, device=end.device)
        visible &= query[:, None] < until[streams, None, columns]
    return visible


def _group_alike(counts: list[int]) -> list[list[int]]:
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


def slab_table(slabs: list[tuple[torch.Tensor, ...]]) -> torch.Tensor | None:
    """Table of addresses of slabs `(keys, values, owner, rank, scores, positions)` for kernels; `None` for PyTorch.

    `rank` `[P]` int32 numbers the pages of each stream, from 0. The table is valid while the tensors stay in place.
    """
    kernel = kernel_for("slab_table", *slabs[0][:2])
    return None if kernel is None else kernel(slabs)


def ragged_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float | None = None,
    index: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention of new tokens over their stream's pages, the kept new tokens before them, and themselves.

    Nothing is padded to the longest stream. Pages are not copied, except by PyTorch for a gradient or for more than
    `PAGED_QUERIES` queries per stream, and then for a few streams at a time.

    Args:
        q: `[N, T, G, K]`, the `G` queries of `T` tokens in each of `N` streams (a row and key/value head).
        k, v: `[N, T, K]` and `[N, T, V]`, the tokens' own keys and values.
        keep: `[N, T]` bool, the tokens that later ones see.
        pages: per slab `(keys [P, p, K], values [P, p, V], owner [P])`: full pages and the stream each belongs to.
        tail: `(keys [N, p, K], values [N, p, V], fill [N])`: each stream's open page and the number of its tokens.
        scale: factor of the logits; `K ** -0.5` if `None`.
        index: `(slab_table(...), counts [N] int64)`: the slabs' addresses and the number of tokens in each stream,
            which save the kernel a sort; `None` if unknown. With an index the last pages may be free: only the pages
            that the counts fill are read, slab by slab.

    Returns:
        `[N, T, G, V]` in the dtype of `v`.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not needs_gradient and (kernel := kernel_for("ragged_decode_attention", k, v)):
        return kernel(q, k, v, keep, pages, tail, scale, index)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if index is not None:
        pages = _pages_in_use(pages, int((index[1] // tail[0].shape[1]).sum()))
    # A gradient needs copies: by the backward pass, pages may have been added to the same slabs.
    where_they_lie = q.shape[1] * q.shape[2] <= PAGED_QUERIES and not needs_gradient
    form = _attend_page_by_page if where_they_lie else _attend_stream_by_stream
    return form(q, k, v, keep, pages, tail, scale)


def _attend_page_by_page(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """`ragged_decode_attention` as a softmax over pages: copies the queries for each page, but no keys."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    tail_k, tail_v, fill = tail
    (length, groups), page = q.shape[1:3], tail_k.shape[1]
    q = q.flatten(1, 2)
    near = (q @ torch.cat([tail_k, k], 1).mT).to(dtype) * scale
    unused = torch.arange(page, device=q.device) >= fill[:, None]
    near[..., :page].masked_fill_(unused[:, None], -torch.inf)
    if length > 1:
        token = torch.arange(length, device=q.device)
        unseen = (token[:, None] < token) | (token[:, None] > token) & ~keep[:, None]
        near[..., page:].masked_fill_(unseen.repeat_interleave(groups, 1), -torch.inf)
    peak = near.amax(-1)
    paged = [(q[owner] @ keys.mT).to(dtype).mul_(scale) for keys, _, owner in pages]
    if pages:
        owner = torch.cat([owner for _, _, owner in pages])
        owners = owner.long()[:, None].expand(-1, q.shape[1])
        peak = peak.scatter_reduce(0, owners, torch.cat([logits.amax(-1) for logits in paged]), "amax")
    near = (near - peak[..., None]).exp()
    total = near.sum(-1)
    out = (near.to(v.dtype) @ torch.cat([tail_v, v], 1)).to(dtype)
    for logits, (_, values, owner) in zip(paged, pages, strict=True):
        weights = (logits - peak[owner, :, None]).exp()
        total.index_add_(0, owner, weights.sum(-1))
        out.index_add_(0, owner, (weights.to(v.dtype) @ values).to(dtype))
    return (out / total[..., None]).to(v.dtype).unflatten(1, (length, groups))


def _attend_stream_by_stream(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """`ragged_decode_attention` over copies of the pages, for a few streams of similar length at a time."""
    tail_k, tail_v, fill = tail
    streams, page = tail_k.shape[:2]
    # Each stream's open page comes first, unused slots in front, so that the stream's tokens are one span of columns.
    slot = ((torch.arange(page, device=q.device) + fill[:, None]) % page)[..., None]
    opened = [x.gather(1, slot.expand_as(x)) for x in (tail_k, tail_v)]
    pages = [(opened[0], opened[1], torch.arange(streams, device=q.device)), *pages]
    held, places = _places_of_pages([owner for _, _, owner in pages], streams)
    kept, before = compact_kept(keep[..., None], k[:, :, None], v[:, :, None])
    groups = _group_alike((held * page + before[:, -1, 0]).tolist())
    out = []
    for group in groups:
        members = torch.tensor(group, device=q.device)
        stored = _gather_pages(pages, places, held, members)
        keys, values = (torch.cat([x, new[members]], 2) for x, new in zip(stored, kept, strict=True))
        width = stored[0].shape[2]
        begin = (width - (held[members] - 1) * page - fill[members])[:, None, None].expand(-1, q.shape[1], 1)
        end = width + before[members]
        own = k[members].unsqueeze(2), v[members].unsqueeze(2)
        out.append(sparse_prefix_attention(q[members], *own, keys, values, begin, end, scale=scale))
    order = torch.tensor([n for group in groups for n in group], device=q.device)
    return torch.cat(out)[order.argsort()]


def _places_of_pages(owners: list[torch.Tensor], streams: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`[N]` number of pages of each stream and, per slab, `[P]` rank of each page within its stream."""
    owner = torch.cat(owners).long()
    held = torch.bincount(owner, minlength=streams)
    order = owner.argsort(stable=True)
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner), device=owner.device) - (held.cumsum(0) - held)[owner[order]]
    return held, list(place.split([len(x) for x in owners]))


def _gather_pages(
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    places: list[torch.Tensor],
    held: torch.Tensor,
    members: torch.Tensor,
) -> list[torch.Tensor]:
    """Keys and values `[n, 1, W, D]` of the streams `members` `[n]`, right-aligned."""
    width = int(held[members].max())
    row = torch.full_like(held, -1)
    row[members] = torch.arange(len(members), device=held.device)
    gathered = [x.new_zeros(len(members), width, *x.shape[1:]) for x in pages[0][:2]]
    for (keys, values, owner), place in zip(pages, places, strict=True):
        here = (row[owner] >= 0).nonzero()[:, 0]
        stream = owner[here]
        at = row[stream], width - held[stream] + place[here]
        gathered[0][at], gathered[1][at] = keys[here], values[here]
    return [x.flatten(1, 2).unsqueeze(1) for x in gathered]


def _pages_in_use(
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], number: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The first `number` pages of slabs `(keys, values, owner)`."""
    in_use = []
    for keys, values, owner in pages:
        if number > 0:
            in_use.append((keys[:number], values[:number], owner[:number]))
        number -= len(owner)
    return in_use


@dataclass
class KeptColumns:
    """A cache's kept tokens, right-aligned: `[B, Hk, M, D]` keys and values, `[B, Hk, M]` scores, `[B, Hk]` counts."""

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor


def attend_new(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    budget: int | None = None,
    cached: KeptColumns | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens over cached columns, the kept new tokens before them, and themselves.

    Args:
        q: `[B, n, H, K]` queries of the last `n` tokens, which may be all.
        k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
        keep: `[B, T, Hk]` bool.
        scores: `[B, T, Hk]` routing scores, read only with a budget.
        budget: most kept tokens per head, beyond which the lowest score is dropped, or `None`.
        cached: tokens already in a cache, at most `budget` per head.
        seq_idx: `[B, T]` int, the document of each token; without a cache only.

    Returns:
        `[B, n, H, V]`.
    """
    (keys, values, kept_scores), end = compact_kept(keep, k, v, scores[..., None])
    begin = torch.zeros_like(end)
    if seq_idx is not None:
        first = torch.searchsorted(seq_idx.contiguous(), seq_idx.contiguous())
        begin = end.gather(1, first[..., None].expand_as(end))
    until = None
    if budget is not None:
        until = eviction_times(keep, kept_scores[..., 0], budget, cached)
    if cached is not None:
        width = cached.keys.shape[2]
        begin, end = begin + (width - cached.counts)[:, None], end + width
        keys, values = torch.cat([cached.keys, keys], 2), torch.cat([cached.values, values], 2)
    skipped = k.shape[1] - q.shape[1]
    if skipped:
        k, v, begin, end = (x[:, skipped:] for x in (k, v, begin, end))
        until = None if until is None else until - skipped
    return sparse_prefix_attention(q, k, v, keys, values, begin, end, until)


def eviction_times(
    keep: torch.Tensor, scores: torch.Tensor, budget: int, cached: KeptColumns | None = None
) -> torch.Tensor | None:
    """For each column, the first query that no longer sees it because the budget evicted it, lowest score first.

    Args:
        keep: `[B, T, Hk]` bool, the new tokens that are admitted.
        scores: `[B, Hk, M]` their scores, compacted.
        budget: most tokens that a head may hold.
        cached: tokens that it already holds, at most `budget`.

    Returns:
        `[B, Hk, M]` int64 (cached columns first): earlier queries see the column. `None` if nothing is evicted.
    """
    batch, length, heads = keep.shape
    added = keep.sum(1)
    held = torch.zeros_like(added) if cached is None else cached.counts
    if not bool((held + added > budget).any()):
        return None
    width = 0 if cached is None else cached.keys.shape[2]
    until = torch.full((batch * heads, width + scores.shape[2]), length + 1)
    for stream in range(batch * heads):
        row, head = divmod(stream, heads)
        # The column breaks ties and grows with the position: the oldest of equal scores leaves.
        heap: list[tuple[float, int]] = []
        if cached is not None:
            first = width - int(held[row, head])
            heap = [(s, first + i) for i, s in enumerate(cached.scores[row, head, first:].tolist())]
            heapq.heapify(heap)
        times = keep[row, :, head].nonzero()[:, 0].tolist()
        for i, (time, score) in enumerate(zip(times, scores[row, head].tolist(), strict=False)):
            heapq.heappush(heap, (score, width + i))
            if len(heap) > budget:
                until[stream, heapq.heappop(heap)[1]] = time + 1
    return until.view(batch, heads, -1).to(keep.device)


__all__ = [
    "KeptColumns",
    "attend_new",
    "compact_kept",
    "eviction_times",
    "ragged_decode_attention",
    "slab_table",
    "sparse_prefix_attention",
]
