# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention of new query tokens over each stream's paged keys, split along the keys, for streams of any length.

The pages of a stream lie anywhere in a few slabs, and all of its new tokens see all of them. The rows of a tile are
pairs of a token and a query head: several tokens fill the tensor core's tile, which a single one leaves mostly empty,
and share one read of the keys. Four launches, none of which waits for the host:

1. `split_plan_fwd_kernel` counts: where each stream's pages begin in a list, and which stream each split belongs to.
2. `page_list_fwd_kernel` writes that list, the addresses of every page's keys and values ordered by stream. It moves
   24 bytes a page, where a page of 16 tokens at head dimension 128 in bfloat16 has 8,192.
3. `ragged_decode_attention_fwd_kernel` reads the pages, `split_pages` a program: work is cut by tokens, not by heads,
   so that one long stream is as fast as many short ones.
4. `ragged_decode_merge_fwd_kernel` merges a row's splits with the token itself, the new ones before it and the open
   page. Where the new tokens are many, they and the open page are what `sparse_prefix_attention` reads in tiles, and
   are merged as one more split.

The recent tokens of a window are read like stored ones: those that fill pages are further entries of their stream's
list, which the plan writes, and the merge reads the rest, less than a page. So many programs share a window of
thousands, the merge alone reads one of a few tokens, and neither needs a launch of its own.

Keeping the list between steps would save the first two launches, but the store would need a table padded to the
longest stream, or would have to shift it at every full page. Programs that walk the pages of a slab in place would
need no list, but would write and read a partial result per page: an eighth of the page itself.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .compact import compact_kept
from .sparse_prefix_attention import sparse_prefix_attention_fwd
from .tuning import INTERPRETED, check_platform

# Numbers of a slab: addresses of keys, values, owners and ranks, pages in the slabs before it, its own pages. A table
# may have further columns.
SLAB_FIELDS = 6
# A split holds this many pages at most: 512 keys at 16 tokens a page, 500 times the bytes of a row's partial result.
# With more than 8 rows it may grow with them, up to 8 times.
MAX_SPLIT_PAGES = 32
# The merge reads up to this many new tokens directly; more are compacted and have their own launch.
NEAR_TOKENS = 16
# Splits become shorter when there would be fewer programs than this: 4 blocks on each of an H100's 132 processors.
WANTED_PROGRAMS = 528
# Streams whose pages one program of the plan adds up at once.
PLAN_BLOCK = 1024
# Bytes of keys and values that a block loads at once: the 4 blocks of a processor hide the memory's latency.
TILE_BYTES = 2**15
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The interpreter would multiply the bits of bfloat16 as integers.
DOT_IN_FLOAT32 = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, acc):
    if DOT_IN_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _list_recent(
    recent_k, recent_v, first_slot, recent_pages, place, num_pages,
    K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the addresses of keys and values of a stream's whole recent pages to their place in the list."""
    for begin in range(0, recent_pages, BLOCK):
        page = begin + tl.arange(0, BLOCK)
        slot = first_slot + page * PAGE
        tl.store(place + page, (recent_k + slot * K).to(tl.int64), mask=page < recent_pages)
        tl.store(place + num_pages + page, (recent_v + slot * V).to(tl.int64), mask=page < recent_pages)


@triton.jit(do_not_specialize=["num_streams", "split_pages", "num_splits", "recent_slots", "num_pages"])
def split_plan_fwd_kernel(
    counts, page_start, split_start, split_stream, num_streams, split_pages, num_splits,
    recent_k, recent_v, recent_fill, recent_slots, page_list, num_pages,
    K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First page and first split of a stream, and the stream of each split; the last stream marks unused ones: -1.

    If recent tokens are given, their whole pages follow the stream's own in the list, and `page_start` ends with the
    number of pages without them.
    """
    stream = tl.program_id(0)
    recent_before = tl.zeros([BLOCK], dtype=tl.int32)
    pages_before = tl.zeros([BLOCK], dtype=tl.int32)
    splits_before = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, stream, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        pages = (tl.load(counts + n, mask=n < stream, other=0) // PAGE).to(tl.int32)
        if recent_fill is not None:
            recent_pages = (tl.load(recent_fill + n, mask=n < stream, other=0) // PAGE).to(tl.int32)
            recent_before += recent_pages
            pages += recent_pages
        pages_before += pages
        splits_before += tl.cdiv(pages, split_pages)
    first_page, first_split = tl.sum(pages_before, 0), tl.sum(splits_before, 0)
    pages = (tl.load(counts + stream) // PAGE).to(tl.int32)
    if recent_fill is not None:
        first_recent = first_page + pages
        recent_pages = (tl.load(recent_fill + stream) // PAGE).to(tl.int32)
        first_slot = stream.to(tl.int64) * recent_slots
        _list_recent(
            recent_k, recent_v, first_slot, recent_pages, page_list + first_recent, num_pages, K, V, PAGE, BLOCK
        )
        if stream == num_streams - 1:
            tl.store(page_start + num_streams + 1, first_recent - tl.sum(recent_before, 0))
        pages += recent_pages
    end = first_split + tl.cdiv(pages, split_pages)
    tl.store(page_start + stream, first_page)
    tl.store(split_start + stream, first_split)
    last = end
    if stream == num_streams - 1:
        tl.store(page_start + num_streams, first_page + pages)
        tl.store(split_start + num_streams, end)
        last = num_splits
    for begin in range(first_split, last, BLOCK):
        split = begin + tl.arange(0, BLOCK)
        tl.store(split_stream + split, tl.where(split < end, stream, -1), mask=split < last)


@triton.jit(do_not_specialize=["num_streams", "num_pages"])
def page_list_fwd_kernel(
    slabs, page_start, page_list, num_streams, num_pages, key_bytes, value_bytes,
    FIELDS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the addresses of keys and values of a slab's pages to their stream's place in the list.

    `RECENT` is 1 if `page_start` ends with the number of pages that are not recent, and otherwise 0.
    """
    row = slabs + tl.program_id(1) * FIELDS
    page = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys, values = tl.load(row), tl.load(row + 1)
    owners = tl.load(row + 2).to(tl.pointer_type(tl.int32))
    ranks = tl.load(row + 3).to(tl.pointer_type(tl.int32))
    # Slabs are filled one after the other, so the number of pages in use shows how far.
    in_use = tl.load(page_start + num_streams + RECENT) - tl.load(row + 4)
    valid = (page < tl.load(row + 5)) & (page < in_use)
    owner = tl.load(owners + page, mask=valid, other=0)
    place = tl.load(page_start + owner, mask=valid, other=0) + tl.load(ranks + page, mask=valid, other=0)
    page = page.to(tl.int64)
    tl.store(page_list + place, keys + page * key_bytes, mask=valid)
    tl.store(page_list + num_pages + place, values + page * value_bytes, mask=valid)


@triton.jit(do_not_specialize=["num_pages", "split_pages", "rows"])
def ragged_decode_attention_fwd_kernel(
    q, page_list, page_start, split_start, split_stream, peak, total, partial, num_pages, split_pages, rows, scale,
    K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Softmax of a tile of a stream's rows over a split of its pages: maximum (base 2), sum, weighted values."""
    # The tiles of a split are consecutive, so that all but the first find its pages in the cache.
    tiles = tl.cdiv(rows, BLOCK_M)
    split = (tl.program_id(0) // tiles).to(tl.int64)
    stream = tl.load(split_stream + split).to(tl.int64)
    if stream < 0:
        return
    first = tl.load(page_start + stream) + (split.to(tl.int32) - tl.load(split_start + stream)) * split_pages
    last = tl.minimum(first + split_pages, tl.load(page_start + stream + 1))
    element = tl.pointer_type(q.dtype.element_ty)
    o_m, o_n = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_k, o_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    real = o_m < rows
    queries = tl.load(
        q + (stream * rows + o_m[:, None]) * K + o_k[None, :], mask=real[:, None] & (o_k < K)[None, :], other=0.0
    )
    m = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    norm = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for begin in range(first, last, BLOCK_N // PAGE):
        index = begin + o_n // PAGE
        used = index < last
        key_page = tl.load(page_list + index, mask=used, other=0)
        value_page = tl.load(page_list + num_pages + index, mask=used, other=0)
        slot = o_n % PAGE
        key_page = tl.multiple_of(key_page.to(element), [ALIGNMENT])
        keys = tl.load(
            key_page[:, None] + (slot[:, None] * K + o_k[None, :]), mask=used[:, None] & (o_k < K)[None, :], other=0.0
        )
        logits = _dot(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)) * scale
        logits = tl.where(used[None, :], logits, -float("inf"))
        # Each step begins with a page in use, so the maximum is finite.
        m_new = tl.maximum(m, tl.max(logits, 1))
        weights = tl.exp2(logits - m_new[:, None])
        decay = tl.exp2(m - m_new)
        value_page = tl.multiple_of(value_page.to(element), [ALIGNMENT])
        values = tl.load(
            value_page[:, None] + (slot[:, None] * V + o_v[None, :]),
            mask=used[:, None] & (o_v < V)[None, :],
            other=0.0,
        )
        norm = norm * decay + tl.sum(weights, 1)
        acc = _dot(weights.to(values.dtype), values, acc * decay[:, None])
        m = m_new
    row = split * rows + o_m
    tl.store(peak + row, m, mask=real)
    tl.store(total + row, norm, mask=real)
    tl.store(partial + row[:, None] * V + o_v[None, :], acc, mask=real[:, None] & (o_v < V)[None, :])


@triton.jit
def _add_keys(
    m, norm, acc, query, keys, values, slot, used, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Continues one query's softmax with the keys and values at the slots that are `used`."""
    o_k, o_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    keys = tl.load(keys + slot[:, None] * K + o_k[None, :], mask=used[:, None] & (o_k < K)[None, :], other=0.0)
    values = tl.load(values + slot[:, None] * V + o_v[None, :], mask=used[:, None] & (o_v < V)[None, :], other=0.0)
    logits = tl.where(used, tl.sum(query[None, :] * keys.to(tl.float32), 1), -float("inf"))
    m_new = tl.maximum(m, tl.max(logits, 0))
    weights = tl.exp2(logits - m_new)
    decay = tl.exp2(m - m_new)
    norm = norm * decay + tl.sum(weights, 0)
    acc = acc * decay + tl.sum(weights[:, None] * values.to(tl.float32), 0)
    return m_new, norm, acc


@triton.jit(do_not_specialize=["rows", "recent_slots"])
def ragged_decode_merge_fwd_kernel(
    q, k, v, keep, tail_k, tail_v, fill, recent_k, recent_v, recent_fill, recent_slots, near, near_lse,
    split_start, peak, total, partial, out, rows, scale,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: starts its softmax with the token itself, adds the open page, the earlier new tokens and the splits.

    `near`, if given, is the softmax over all of these but the splits, and `near_lse` the base-2 log of its sum. Recent
    tokens that fill pages are in the splits; the merge adds the rest.
    """
    stream, row = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    o_s, o_k, o_v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_v = o_v < V
    norm = tl.full([], 1.0, dtype=tl.float32)
    if near is not None:
        m = tl.load(near_lse + stream * rows + row)
        acc = tl.load(near + (stream * rows + row) * V + o_v, mask=in_v, other=0.0).to(tl.float32)
    else:
        token, first_token = row // G, stream * (rows // G)
        own = first_token + token
        query = tl.load(q + (stream * rows + row) * K + o_k, mask=o_k < K, other=0.0).to(tl.float32) * scale
        m = tl.sum(query * tl.load(k + own * K + o_k, mask=o_k < K, other=0.0).to(tl.float32), 0)
        acc = tl.load(v + own * V + o_v, mask=in_v, other=0.0).to(tl.float32)
        o_p = tl.arange(0, BLOCK_P)
        opened = o_p < tl.load(fill + stream)
        m, norm, acc = _add_keys(
            m, norm, acc, query, tail_k, tail_v, stream * PAGE + o_p, opened, K, V, BLOCK_K, BLOCK_V
        )
        if recent_fill is not None:
            recent = tl.load(recent_fill + stream)
            slot = recent // PAGE * PAGE + o_p
            place = stream * recent_slots + slot
            m, norm, acc = _add_keys(
                m, norm, acc, query, recent_k, recent_v, place, slot < recent, K, V, BLOCK_K, BLOCK_V
            )
        if BLOCK_T > 1:
            o_t = tl.arange(0, BLOCK_T)
            before = o_t < token
            before &= tl.load(keep + first_token + o_t, mask=before, other=0) != 0
            m, norm, acc = _add_keys(m, norm, acc, query, k, v, first_token + o_t, before, K, V, BLOCK_K, BLOCK_V)

    last = tl.load(split_start + stream + 1)
    for begin in range(tl.load(split_start + stream), last, BLOCK_S):
        split = begin + o_s
        used = split < last
        part = split.to(tl.int64) * rows + row
        peaks = tl.load(peak + part, mask=used, other=-float("inf"))
        m_new = tl.maximum(m, tl.max(peaks, 0))
        weights = tl.exp2(peaks - m_new)
        decay = tl.exp2(m - m_new)
        norm = norm * decay + tl.sum(weights * tl.load(total + part, mask=used, other=0.0), 0)
        parts = tl.load(partial + part[:, None] * V + o_v[None, :], mask=used[:, None] & in_v[None, :], other=0.0)
        acc = acc * decay + tl.sum(weights[:, None] * parts, 0)
        m = m_new
    tl.store(out + (stream * rows + row) * V + o_v, (acc / norm).to(out.dtype.element_ty), mask=in_v)


def index_pages(
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], num_streams: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
    """Makes an `index` for pages without one, by a sort; returns it and the ranks `[P]` per slab that it points to."""
    owner = torch.cat([owner for _, _, owner in pages]).long()
    order = owner.argsort(stable=True)
    pages_of = owner.new_zeros(num_streams).index_add_(0, owner, torch.ones_like(owner))
    rank = torch.empty_like(owner, dtype=torch.int32)
    before = pages_of.cumsum(0) - pages_of
    rank[order] = (torch.arange(len(owner), device=owner.device) - before[owner[order]]).int()
    ranks = list(rank.split([len(x) for _, _, x in pages]))
    slabs = slab_table([(*slab, rank) for slab, rank in zip(pages, ranks, strict=True)])
    return (slabs, pages_of * pages[0][0].shape[1]), ranks


def slab_table(slabs: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Table `[S, 6 + n]` int64 of slabs `(keys, values, owner, rank, ...)`, on their device, for the kernels.

    A row has the addresses of the four tensors, the pages in the slabs before, its own pages, and the addresses of `n`
    further tensors; `decode_mix_append` needs scores and positions. It is valid while the tensors live.
    """
    rows, before = [], 0
    for slab in slabs:
        addresses = [x.data_ptr() for x in slab]
        rows.append([*addresses[:4], before, len(slab[0]), *addresses[4:]])
        before += len(slab[0])
    device = slabs[0][0].device
    # A copy from pinned memory does not wait for the GPU.
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Splits(NamedTuple):
    """The softmax of each row over each split of its stream's pages.

    Attributes:
        start: `[N + 1]` int32, the first split of each stream.
        peak, total: `[splits, rows]` float32, the largest logit (in powers of 2) and the sum of the exponentials.
        partial: `[splits, rows, V]` float32, the sum of the values, each times its exponential.
    """

    start: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor
    partial: torch.Tensor


def head_blocks(key_dim: int, value_dim: int) -> dict[str, int]:
    """The powers of two, at least 16, that hold keys and values."""
    return {"BLOCK_K": max(16, triton.next_power_of_2(key_dim)), "BLOCK_V": max(16, triton.next_power_of_2(value_dim))}


def attend_pages(
    q: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    index: tuple[torch.Tensor, torch.Tensor] | None,
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> Splits:
    """Attention of `q` `[N, T, G, K]` over full pages, also those of recent tokens, by splits.

    `scale` is in powers of 2.
    """
    (streams, _, _, key_dim), rows = q.shape, q.shape[1] * q.shape[2]
    page, value_dim = tail[1].shape[1:]
    if not pages:
        counts = torch.zeros(streams, dtype=torch.long, device=q.device)
    elif index is None:
        (slabs, counts), _ranks = index_pages(pages, streams)  # the name keeps the ranks alive, addresses do not
    else:
        slabs, counts = index
    num_pages = sum(len(owner) for _, _, owner in pages)
    num_pages += 0 if recent is None else streams * (recent[0].shape[1] // page)
    blocks = head_blocks(key_dim, value_dim)
    tile = tile_shape(rows, page, max(blocks.values()), q.element_size())
    tiles = triton.cdiv(rows, tile["BLOCK_M"])
    split_pages, num_splits = split_sizes(num_pages, streams, rows, tiles)
    starts = torch.empty(2 * streams + 3, dtype=torch.int32, device=q.device)
    page_start, split_start = starts.split([streams + 2, streams + 1])
    split_stream = torch.empty(num_splits, dtype=torch.int32, device=q.device)
    page_list = torch.empty(2, num_pages, dtype=torch.long, device=q.device)
    peak, total = torch.empty(2, num_splits, rows, dtype=torch.float32, device=q.device)
    partial = torch.empty(num_splits, rows, value_dim, dtype=torch.float32, device=q.device)
    listed = (None,) * 6 if recent is None else (*recent, recent[0].shape[1], page_list, num_pages)
    split_plan_fwd_kernel[(streams,)](
        counts, page_start, split_start, split_stream, streams, split_pages, num_splits, *listed,
        K=key_dim, V=value_dim, PAGE=page, BLOCK=PLAN_BLOCK,
    )  # fmt: skip
    if pages:
        largest = max(len(owner) for _, _, owner in pages)
        key_bytes, value_bytes = (page * dim * q.element_size() for dim in (key_dim, value_dim))
        page_list_fwd_kernel[(triton.cdiv(largest, 256), len(slabs))](
            slabs, page_start, page_list, streams, num_pages, key_bytes, value_bytes,
            FIELDS=slabs.shape[1], RECENT=int(recent is not None), BLOCK=256,
        )  # fmt: skip
    ragged_decode_attention_fwd_kernel[(num_splits * tiles,)](
        q, page_list, page_start, split_start, split_stream, peak, total, partial, num_pages, split_pages, rows,
        scale, K=key_dim, V=value_dim, PAGE=page, ALIGNMENT=page_alignment(pages, recent, page), **blocks, **tile,
    )  # fmt: skip
    return Splits(split_start, peak, total, partial)


def ragged_decode_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    index: tuple[torch.Tensor, torch.Tensor] | None = None,
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Launches the kernels on arguments that `ragged_decode_attention` has checked."""
    (streams, length, groups, key_dim), rows = q.shape, q.shape[1] * q.shape[2]
    tail_k, tail_v, fill = tail
    page, value_dim = tail_v.shape[1:]
    q, k, v, keep, fill = (x.contiguous() for x in (q, k, v, keep, fill))
    near = near_lse = None
    if length > NEAR_TOKENS:
        near, near_lse = attend_near(q, k, v, keep, tail, scale)
    scale = scale * math.log2(math.e)  # the kernels' exponentials are powers of 2
    if pages or (recent is not None and recent[0].shape[1] >= page):
        splits = attend_pages(q, pages, tail, scale, index, recent)
    else:
        nothing = torch.zeros(streams + 1, dtype=torch.int32, device=q.device)
        splits = Splits(nothing, fill, fill, fill)  # the last three are never read without splits
    out = torch.empty(streams, length, groups, value_dim, dtype=v.dtype, device=q.device)
    in_window = (None,) * 4 if recent is None else (*recent, recent[0].shape[1])
    ragged_decode_merge_fwd_kernel[(streams * rows,)](
        q, k, v, keep.view(torch.uint8), tail_k, tail_v, fill, *in_window, near, near_lse, *splits, out,
        rows, scale, G=groups, K=key_dim, V=value_dim, PAGE=page, BLOCK_P=triton.next_power_of_2(page),
        BLOCK_T=1 if length == 1 else NEAR_TOKENS, BLOCK_S=16, **head_blocks(key_dim, value_dim), num_warps=4,
    )  # fmt: skip
    return out


def attend_near(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of many tokens over all but full pages, `[N, T, G, V]`, and the base-2 log of its sums `[N, T, G]`."""
    tail_k, tail_v, fill = tail
    page = tail_k.shape[1]
    # The open page comes first, rotated so that unused slots are in front: it and the kept tokens form one span.
    slot = ((torch.arange(page, device=q.device) + fill[:, None]) % page)[..., None]
    opened = (x.gather(1, slot.expand_as(x)) for x in (tail_k, tail_v))
    kept, before = compact_kept(keep[..., None], k[:, :, None], v[:, :, None], capacity=q.shape[1])
    keys, values = (torch.cat([x.unsqueeze(1), new], 2) for x, new in zip(opened, kept, strict=True))
    begin = (page - fill)[:, None, None].expand_as(before).contiguous()
    own = k[:, :, None], v[:, :, None]
    return sparse_prefix_attention_fwd(q, *own, keys, values, begin, page + before, None, scale)[:2]


def split_sizes(num_pages: int, num_streams: int, rows: int, tiles: int) -> tuple[int, int]:
    """Pages per split, and the largest number of splits for any distribution of the pages over streams.

    Args:
        rows: queries per stream; with more of them a split's partial result is larger, so a split may be longer.
        tiles: number of tiles of the rows.
    """
    wanted = triton.next_power_of_2(triton.cdiv(num_pages * tiles, WANTED_PROGRAMS))
    longest = MAX_SPLIT_PAGES * min(8, triton.next_power_of_2(triton.cdiv(rows, 8)))
    split_pages = min(longest, max(4, wanted))
    return split_pages, num_pages // split_pages + min(num_streams, num_pages)


def tile_shape(rows: int, page: int, width: int, element_size: int) -> dict[str, int]:
    """Rows, keys, warps and stages of a tile, for heads that fit into `width`, a power of two."""
    # As many as registers hold, which tests/ham_kernels/test_compile.py checks. Tensor cores do not multiply float32
    # exactly.
    largest = min(128, 128 * 128 // width) if element_size == 2 else min(32, 32 * 128 // width)
    block_m = max(16, min(largest, triton.next_power_of_2(rows)))
    # A power of two of keys, at least one page and 16, whose keys and values fill a tile.
    most = 128 if block_m * element_size <= 64 else 128 // element_size
    block_n = max(page, 16, min(most, TILE_BYTES // (2 * width * element_size)))
    num_warps = 8 if block_m * max(width, 128) > 64 * 128 else 4
    # With few rows memory is the limit, and many blocks per processor hide its latency; with many rows arithmetic is.
    # Triton needs 5 stages to load keys while it computes, because it must load their addresses first.
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 3 if block_m < 64 else 5}


def page_alignment(
    pages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    page: int,
) -> int:
    """Largest power of two up to 16 that divides the address of every page of `page` tokens, in bytes."""
    slabs = [x for keys, values, _ in pages for x in (keys, values)]
    windows = [] if recent is None else recent[:2]
    sizes = [page * x[0, 0].nbytes for x in (*slabs[:2], *windows)] + [x[0].nbytes for x in windows]
    return math.gcd(16, *sizes, *(x.data_ptr() for x in (*slabs, *windows)))


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
    """Softmax attention of new tokens over their stream's pages, the kept ones before them and themselves.

    It has no backward. It copies no pages, pads no stream and never waits. Beside the output it needs 16 bytes per
    page, and a query's float32 result once per stream and once more for every 512 to 4,096 keys (fewer where there is
    little work to share); for more than 16 tokens also copies of them and of the open pages.

    Args:
        q: `[N, T, G, K]` bfloat16, float16 or float32, the `G` queries of `T` tokens in each of `N` streams (a row and
            key/value head).
        k, v: `[N, T, K]` and `[N, T, V]`, the tokens' own keys and values.
        keep: `[N, T]` bool, true for tokens that later ones see.
        pages: per slab `(keys [P, p, K], values [P, p, V], owner [P] int32)`, contiguous: full pages and the stream
            each belongs to; `p` is a power of two.
        tail: `(keys [N, p, K], values [N, p, V], fill [N] int)`, contiguous: each stream's open page and the number of
            its slots in use.
        scale: factor of the logits; `K ** -0.5` if `None`.
        index: `(slab_table(...), counts [N] int64)`: where pages lie, and how many tokens each stream holds (those in
            the open page make no difference); a store knows both. Slabs must then be filled one after the other, and
            only the pages that the counts fill are read. If `None`, all pages are read, and a sort and a small copy
            from the host make the index.
        recent: `(keys [N, R, K], values [N, R, V], fill [N] int)`, contiguous: the tokens in the window of a single
            new token (`T` is 1), in any order, kept or not, and the number of slots in use; `None` without a window.

    Returns:
        `[N, T, G, V]` in the dtype of `v`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an argument that requires a gradient.
    """
    pages = [slab for slab in pages if len(slab[2])]
    _check_arguments(q, k, v, keep, pages, tail, index, recent)
    check_platform(q.device)
    if not q.numel():
        return v.new_empty(*q.shape[:3], v.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.cuda.device_of(q):
        return ragged_decode_attention_fwd(q, k, v, keep, pages, tail, scale, index, recent)


def _check_arguments(q, k, v, keep, pages, tail, index, recent) -> None:
    if q.ndim != 4 or q.dtype not in DTYPES:
        raise ValueError(
            f"`q` must be [N, T, G, K] of bfloat16, float16 or float32, got {list(q.shape)} of {q.dtype}."
        )
    (streams, length, _, key_dim), value_dim = q.shape, v.shape[-1]
    tail_k, tail_v, fill = tail
    page = tail_k.shape[1] if tail_k.ndim == 3 else 0
    if page < 1 or page & (page - 1):
        raise ValueError(f"`tail` must hold pages [N, p, K], `p` a power of two, got {list(tail_k.shape)}.")
    if keep.shape != (streams, length) or keep.dtype != torch.bool or keep.device != q.device:
        raise ValueError(
            f"`keep` must be {[streams, length]} of torch.bool on {q.device}, got {list(keep.shape)} of {keep.dtype} "
            f"on {keep.device}."
        )
    expected = [("q", q, q.shape), ("k", k, (streams, length, key_dim)), ("v", v, (streams, length, value_dim))]
    expected += [("tail[0]", tail_k, (streams, page, key_dim)), ("tail[1]", tail_v, (streams, page, value_dim))]
    for i, (keys, values, owner) in enumerate(pages):
        expected.append((f"pages[{i}][0]", keys, (len(owner), page, key_dim)))
        expected.append((f"pages[{i}][1]", values, (len(owner), page, value_dim)))
        _check_integers(f"pages[{i}][2]", owner, (len(owner),), (torch.int32,), q.device)
    if recent is not None:
        slots = _check_window(recent, length)
        expected.append(("recent[0]", recent[0], (streams, slots, key_dim)))
        expected.append(("recent[1]", recent[1], (streams, slots, value_dim)))
        _check_integers("recent[2]", recent[2], (streams,), (torch.int32, torch.int64), q.device)
    for name, x, shape in expected:
        if x.shape != shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"`{name}` must be {list(shape)} of {q.dtype} on {q.device}, got {list(x.shape)} of {x.dtype} on "
                f"{x.device}."
            )
        if name[0] in "ptr" and not x.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous, got strides {x.stride()}.")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"`{name}` requires a gradient, got grad mode on; the op takes tensors without.")
    _check_integers("tail[2]", fill, (streams,), (torch.int32, torch.int64), q.device)
    if index is not None:
        fields = max(SLAB_FIELDS, index[0].shape[-1])
        _check_integers("index[0]", index[0], (len(index[0]), fields), (torch.int64,), q.device)
        _check_integers("index[1]", index[1], (streams,), (torch.int64,), q.device)


def _check_window(recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor], length: int) -> int:
    """The number of slots of `recent`, which a single new token may have."""
    if length != 1:
        raise ValueError(f"`recent` is what a single new token sees, so `T` must be 1, got {length}.")
    if recent[0].ndim != 3 or not recent[0].shape[1]:
        raise ValueError(f"`recent[0]` must be [N, R, K] with a slot or more, got {list(recent[0].shape)}.")
    return recent[0].shape[1]


def _check_integers(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if x.shape != shape or x.dtype not in dtypes or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"`{name}` must be {list(shape)} of {' or '.join(map(str, dtypes))} on {device}, contiguous; got "
            f"{list(x.shape)} of {x.dtype} on {x.device}, strides {x.stride()}."
        )
