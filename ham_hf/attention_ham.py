# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention of new tokens over kept ones: over a paged cache of streams of any length, and with eviction."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .ops_ham import kernel_for
from .prefix_attention_ham import compact_kept, group_alike, sparse_prefix_attention

# With at most this many queries per stream PyTorch reads pages in place: copied queries are no larger than the keys.
PAGED_QUERIES = 16


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
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
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
        recent: `(keys [N, R, K], values [N, R, V], fill [N])`: tokens in the window of a single new token, in any
            order, and their number; `None` without a window. Several new tokens have windows of their own, see
            `attend_stream_by_stream`.

    Returns:
        `[N, T, G, V]` in the dtype of `v`.
    """
    if recent is not None and q.shape[1] != 1:
        raise ValueError(f"`recent` must be None for more than one new token, got {q.shape[1]} tokens.")
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not needs_gradient and (kernel := kernel_for("ragged_decode_attention", k, v)):
        return kernel(q, k, v, keep, pages, tail, scale, index, recent)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if index is not None:
        pages = _pages_in_use(pages, int((index[1] // tail[0].shape[1]).sum()))
    # A gradient needs copies: by the backward pass, pages may have been added to the same slabs.
    if recent is not None or (q.shape[1] * q.shape[2] <= PAGED_QUERIES and not needs_gradient):
        return _attend_page_by_page(q, k, v, keep, pages, tail, scale, recent)
    return attend_stream_by_stream(q, k, v, keep, pages, tail, scale)


def _attend_page_by_page(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`ragged_decode_attention` as a softmax over pages: copies the queries for each page, but no keys."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (length, groups), q = q.shape[1:3], q.flatten(1, 2)
    near = []
    for keys, _, fill in (tail, recent) if recent is not None else (tail,):
        unused = torch.arange(keys.shape[1], device=q.device) >= fill[:, None]
        near.append((q @ keys.mT).to(dtype).mul_(scale).masked_fill_(unused[:, None], -torch.inf))
    near.append((q @ k.mT).to(dtype).mul_(scale))
    if length > 1:
        token = torch.arange(length, device=q.device)
        unseen = (token[:, None] < token) | (token[:, None] > token) & ~keep[:, None]
        near[-1].masked_fill_(unseen.repeat_interleave(groups, 1), -torch.inf)
    near_values = [tail[1], v] if recent is None else [tail[1], recent[1], v]
    peak = torch.stack([logits.amax(-1) for logits in near]).amax(0)
    paged = [(q[owner] @ keys.mT).to(dtype).mul_(scale) for keys, _, owner in pages]
    if pages:
        owner = torch.cat([owner for _, _, owner in pages])
        owners = owner.long()[:, None].expand(-1, q.shape[1])
        peak = peak.scatter_reduce(0, owners, torch.cat([logits.amax(-1) for logits in paged]), "amax")
    total, out = torch.zeros_like(peak), torch.zeros(*peak.shape, v.shape[-1], dtype=dtype, device=v.device)
    for logits, values in zip(near, near_values, strict=True):
        weights = logits.sub_(peak[..., None]).exp_()
        total += weights.sum(-1)
        out += weights.to(v.dtype) @ values
    for logits, (_, values, owner) in zip(paged, pages, strict=True):
        weights = (logits - peak[owner, :, None]).exp()
        total.index_add_(0, owner, weights.sum(-1))
        out.index_add_(0, owner, (weights.to(v.dtype) @ values).to(dtype))
    return (out / total[..., None]).to(v.dtype).unflatten(1, (length, groups))


def attend_stream_by_stream(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    window_start: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ragged_decode_attention` over copies of the pages, for a few streams of similar length at a time.

    With windows `k`, `v` and `keep` `[N, L, ...]` begin with tokens of the window that are younger than the pages,
    and `window_start` `[N, T]` and `real` `[N, L]` are those of `sparse_prefix_attention`.
    """
    tail_k, tail_v, fill = tail
    streams, page = tail_k.shape[:2]
    # Each stream's open page comes first, unused slots in front, so that the stream's tokens are one span of columns.
    slot = ((torch.arange(page, device=q.device) + fill[:, None]) % page)[..., None]
    opened = [x.gather(1, slot.expand_as(x)) for x in (tail_k, tail_v)]
    pages = [(opened[0], opened[1], torch.arange(streams, device=q.device)), *pages]
    held, places = _places_of_pages([owner for _, _, owner in pages], streams)
    kept, before = compact_kept(keep[..., None], k[:, :, None], v[:, :, None])
    if window_start is not None:
        before = before.gather(1, window_start[..., None])
    groups = group_alike((held * page + before[:, -1, 0]).tolist())
    out = []
    for group in groups:
        members = torch.tensor(group, device=q.device)
        stored = _gather_pages(pages, places, held, members)
        keys, values = (torch.cat([x, new[members]], 2) for x, new in zip(stored, kept, strict=True))
        width = stored[0].shape[2]
        begin = (width - (held[members] - 1) * page - fill[members])[:, None, None].expand(-1, q.shape[1], 1)
        end = width + before[members]
        own = k[members].unsqueeze(2), v[members].unsqueeze(2)
        start, shown = (None if x is None else x[members] for x in (window_start, real))
        new = sparse_prefix_attention(
            q[members], *own, keys, values, begin, end, scale=scale, window_start=start, real=shown
        )
        out.append(new)
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


def window_starts(
    window: int, batch: int, length: int, device: torch.device, real: torch.Tensor | None, seq_idx: torch.Tensor | None
) -> torch.Tensor:
    """The first token in the window of each token: of the last `window` real tokens of its document, itself included.

    Args:
        window: at least 1.
        batch, length: rows and tokens.
        device: of the result.
        real: `[B, T]` bool, false for padding, or `None`.
        seq_idx: `[B, T]` int, the document of each token, or `None`.

    Returns:
        `[B, T]` int64, at most the token itself, not falling along `T`.
    """
    token = torch.arange(length, device=device)
    if real is None:
        start = (token - (window - 1)).clamp(min=0).expand(batch, -1)
    else:
        rank = real.cumsum(1) - 1
        start = torch.searchsorted(rank, (rank - (window - 1)).clamp(min=0)).minimum(token)
    if seq_idx is not None:
        start = start.maximum(torch.searchsorted(seq_idx.contiguous(), seq_idx.contiguous()))
    return start


def attend_new(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    budget: int | None = None,
    cached: KeptColumns | None = None,
    seq_idx: torch.Tensor | None = None,
    window: int = 0,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens over cached columns, the kept new tokens before them, their windows and themselves.

    Args:
        q: `[B, n, H, K]` queries of the last `n` tokens, which may be all.
        k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
        keep: `[B, T, Hk]` bool.
        scores: `[B, T, Hk]` routing scores, read only with a budget.
        budget: most tokens per head, those in the window included, beyond which the lowest score is dropped; `None`
            for any number.
        cached: tokens already in a cache and older than any window, at most `budget` per head.
        seq_idx: `[B, T]` int, the document of each token; without a cache only.
        window: number of the last real tokens that a query sees, itself included.
        real: `[B, T]` bool, false for padding; read only with a window.

    Returns:
        `[B, n, H, V]`.
    """
    (keys, values, kept_scores), before = compact_kept(keep, k, v, scores[..., None])
    start = None
    if window > 1:
        start = window_starts(window, k.shape[0], k.shape[1], k.device, real, seq_idx)
    end = before if start is None else before.gather(1, start[..., None].expand_as(before))
    begin = torch.zeros_like(end)
    if seq_idx is not None:
        first = torch.searchsorted(seq_idx.contiguous(), seq_idx.contiguous())
        begin = before.gather(1, first[..., None].expand_as(end))
    until = None
    if budget is not None:
        until = eviction_times(keep, kept_scores[..., 0], budget, cached, window, real)
    if cached is not None:
        width = cached.keys.shape[2]
        begin, end = begin + (width - cached.counts)[:, None], end + width
        keys, values = torch.cat([cached.keys, keys], 2), torch.cat([cached.values, values], 2)
    skipped = k.shape[1] - q.shape[1]
    if skipped:
        begin, end = begin[:, skipped:], end[:, skipped:]
        until = None if until is None else until - skipped
    if start is None:
        return sparse_prefix_attention(q, k[:, skipped:], v[:, skipped:], keys, values, begin, end, until)
    return sparse_prefix_attention(
        q, k, v, keys, values, begin, end, until, window_start=start[:, skipped:], real=real
    )


def eviction_times(
    keep: torch.Tensor,
    scores: torch.Tensor,
    budget: int,
    cached: KeptColumns | None = None,
    window: int = 0,
    real: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """For each column, the first query that no longer sees it because the budget evicted it, lowest score first.

    A token joins the others that were kept, and may evict one, when it leaves the window.

    Args:
        keep: `[B, T, Hk]` bool, the new tokens that are admitted.
        scores: `[B, Hk, M]` their scores, compacted.
        budget: most tokens that a head may hold, those in the window included.
        cached: tokens that it already holds and that are older than the window, at most `budget`.
        window: number of the last real tokens that a query sees, itself included.
        real: `[B, T]` bool, false for padding; read only with a window.

    Returns:
        `[B, Hk, M]` int64 (cached columns first): earlier queries see the column. `None` if nothing is evicted.
    """
    batch, length, heads = keep.shape
    waits = max(window, 1) - 1
    budget -= waits
    added = keep.sum(1)
    held = torch.zeros_like(added) if cached is None else cached.counts
    if not bool((held + added > budget).any()):
        return None
    width = 0 if cached is None else cached.keys.shape[2]
    scores = scores if cached is None else torch.cat([cached.scores, scores], 2)
    # Columns without a token lie before a stream's first cached one, and behind its last new one.
    column = torch.arange(scores.shape[2], device=keep.device)
    filled = (column >= width - held[..., None]) & (column < width + added[..., None])
    # The column breaks ties and grows with the position: the oldest of equal scores leaves.
    ordered = scores.argsort(dim=2, stable=True)
    ordered = ordered.gather(2, filled.gather(2, ordered).byte().argsort(dim=2, stable=True))
    rank = torch.empty_like(ordered).scatter_(2, ordered, column.expand_as(ordered))
    arrival = torch.arange(scores.shape[2] - width, device=keep.device)
    # A stream holds the highest ranks of what has come, so what leaves never comes back.
    least = kth_largest_of_prefixes(rank.flatten(0, 1), budget, width + 1).view(batch, heads, -1)
    evicting = torch.searchsorted(least, rank, right=True).maximum((column - width).clamp(min=0))
    number = keep.transpose(1, 2).cumsum(2)
    times = torch.searchsorted(number, (arrival + 1).expand(batch, heads, -1).contiguous())
    until = F.pad(times, (0, 1), value=length).gather(2, evicting) + 1
    return until if waits == 0 else _delayed(until, waits, length, real)


def kth_largest_of_prefixes(ranks: torch.Tensor, k: int, first: int) -> torch.Tensor:
    """The k-th largest number of each prefix, by a wavelet matrix, whose bits are counted from the highest on.

    Args:
        ranks: `[S, N]` int64, a permutation of 0 to N - 1 in each row.
        k: from 1.
        first: numbers in the shortest prefix.

    Returns:
        `[S, N - first + 1]` int64, which rises; -1 for prefixes of fewer than `k` numbers.
    """
    streams, size = ranks.shape
    index = torch.arange(size, device=ranks.device)
    stop = torch.arange(first, size + 1, device=ranks.device).expand(streams, -1)
    start, wanted, found, prefix = torch.zeros_like(stop), torch.full_like(stop, k), torch.zeros_like(stop), stop
    for bit in reversed(range(max(1, (size - 1).bit_length()))):
        ones = (ranks >> bit) & 1
        before = F.pad(ones.cumsum(1), (1, 0))
        zeros = size - before[:, -1:]
        ones_before, ones_until = before.gather(1, start), before.gather(1, stop)
        inside = ones_until - ones_before
        high = wanted <= inside
        found = found + (high.long() << bit)
        wanted = torch.where(high, wanted, wanted - inside)
        start = torch.where(high, zeros + ones_before, start - ones_before)
        stop = torch.where(high, zeros + ones_until, stop - ones_until)
        # Zeros first, then ones, each in their order.
        place = torch.where(ones.bool(), zeros + before[:, :-1], index - before[:, :-1])
        ranks = torch.empty_like(ranks).scatter_(1, place, ranks)
    return found.masked_fill(prefix < k, -1)


def _delayed(until: torch.Tensor, waits: int, length: int, real: torch.Tensor | None) -> torch.Tensor:
    """Moves times of eviction `[B, Hk, M]` by `waits` real tokens, to when the evicting token leaves its window."""
    if real is None:
        return until + waits
    rank = F.pad(real.cumsum(1) - 1, (0, 1), value=2 * length)
    evicting = (until - 1).clamp(max=length).flatten(1)
    return torch.searchsorted(rank, rank.gather(1, evicting) + waits + 1).view_as(until)


__all__ = [
    "KeptColumns",
    "attend_new",
    "attend_stream_by_stream",
    "eviction_times",
    "kth_largest_of_prefixes",
    "ragged_decode_attention",
    "slab_table",
    "window_starts",
]
