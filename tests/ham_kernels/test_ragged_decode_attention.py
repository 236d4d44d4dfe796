# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares the decoding kernel with the dense softmax over each stream's tokens, wherever its pages lie."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from ham_hf.attention_ham import ragged_decode_attention as torch_ragged_decode_attention
from ham_hf.paged_store_ham import KeptTokens, PagedStore
from ham_hf.reference import naive_ragged_decode_attention
from ham_kernels.ragged_decode_attention import (
    MAX_SPLIT_PAGES,
    NEAR_TOKENS,
    attend_near,
    index_pages,
    ragged_decode_attention,
    slab_table,
    split_sizes,
)

# The package gives the function this name.
module = importlib.import_module("ham_kernels.ragged_decode_attention")
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def inside_nan(x):
    """A contiguous copy of `x` with NaN before and after it, at an address that is a multiple of 16 bytes."""
    margin = 64
    buffer = torch.full((x.numel() + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[margin : margin + x.numel()].view(x.shape)
    return view.copy_(x)


def make(device, owners, fill, groups=1, key_dim=16, value_dim=16, page=16, dtype=torch.float32, length=1):
    """Arguments of the op: one slab per list of `owners`, NaN in every unused slot and around every buffer."""
    streams = len(fill)

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    fill = torch.tensor(fill, device=device, dtype=torch.long)
    tail_k, tail_v = randn(streams, page, key_dim), randn(streams, page, value_dim)
    unused = torch.arange(page, device=device) >= fill[:, None]
    tail_k[unused], tail_v[unused] = torch.nan, torch.nan
    pages = []
    for owner in owners:
        keys, values = randn(len(owner), page, key_dim), randn(len(owner), page, value_dim)
        pages.append((inside_nan(keys), inside_nan(values), torch.tensor(owner, dtype=torch.int32, device=device)))
    q = 2 * randn(streams, length, groups, key_dim)
    k, v = randn(streams, length, key_dim), randn(streams, length, value_dim)
    # Some streams keep everything, some nothing.
    keep = (
        torch.rand(streams, length, device=device)
        < torch.tensor([0.5, 1.0, 0.0], device=device).repeat(streams // 3 + 1)[:streams, None]
    )
    new = (inside_nan(q), inside_nan(k), inside_nan(v), keep)
    return *new, pages, (inside_nan(tail_k), inside_nan(tail_v), fill)


def exact(*arguments, scale=None, recent=None):
    """The definition of the op, in float64."""

    def double(x):
        return type(x)(map(double, x)) if isinstance(x, (list, tuple)) else x.double() if x.is_floating_point() else x

    return naive_ragged_decode_attention(
        *map(double, arguments), scale=scale, recent=None if recent is None else double(recent)
    )


def without_nan(*arguments):
    """The same arguments without NaN, for PyTorch, which multiplies unused slots by zero."""
    *others, (tail_k, tail_v, fill) = arguments
    return *others, (tail_k.nan_to_num(), tail_v.nan_to_num(), fill)


SHAPES = {
    "empty streams": ([], [0, 0, 0]),
    "open pages only": ([], [0, 15, 1, 16]),
    "exactly full pages": ([[1, 0, 1]], [0, 0, 0]),
    "several slabs": ([[0, 1, 0, 3], [3], [1, 1, 0, 3, 0, 0, 1]], [3, 0, 7, 15]),
    "one long stream": ([[2] * 9 + [0] + [2] * 20, [2] * 11], [2, 0, 5, 0]),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("owners", "fill"), SHAPES.values(), ids=SHAPES)
def test_equals_the_dense_softmax(owners, fill, groups, device, assert_error_within):
    arguments = make(device, owners, fill, groups)
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, exact(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "key_dim", "value_dim", "page"),
    [(1, 24, 16, 16), (3, 16, 40, 4), (2, 20, 7, 2), (17, 8, 8, 8), (4, 5, 3, 1)],
)
def test_odd_sizes_and_dtypes(groups, key_dim, value_dim, page, dtype, device, assert_error_within):
    owners, fill = [[0, 2, 2, 0, 2], [2, 2, 1, 2, 2, 0, 2]], [page - 1, 0, page // 2]
    arguments = make(device, owners, fill, groups, key_dim, value_dim, page, dtype)
    out = ragged_decode_attention(*arguments, scale=0.3)
    baseline = torch_ragged_decode_attention(*without_nan(*arguments), scale=0.3)
    assert out.dtype == dtype
    assert_error_within(out, exact(*arguments, scale=0.3), baseline)


@pytest.mark.parametrize(("length", "groups"), [(2, 4), (NEAR_TOKENS, 1), (NEAR_TOKENS + 1, 2), (45, 1)])
@pytest.mark.parametrize(("owners", "fill"), SHAPES.values(), ids=SHAPES)
def test_several_tokens(owners, fill, length, groups, device, monkeypatch, assert_error_within):
    """Drafts and longer calls: rows that fill a tile in part, and several tiles."""
    compacted = []
    monkeypatch.setattr(module, "attend_near", lambda *x: compacted.append(True) or attend_near(*x))
    arguments = make(device, owners, fill, groups, length=length)
    out = ragged_decode_attention(*arguments)
    assert bool(compacted) == (length > NEAR_TOKENS)
    assert_error_within(out, exact(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "groups", "key_dim", "value_dim", "page"),
    [(3, 3, 24, 40, 4), (3, 17, 16, 8, 2), (19, 2, 5, 3, 1), (67, 3, 20, 24, 8)],
)
def test_several_tokens_of_odd_sizes_and_dtypes(
    length, groups, key_dim, value_dim, page, dtype, device, assert_error_within, arithmetic_as_on_a_gpu
):
    owners, fill = [[0, 2, 2, 0, 2], [2, 2, 1, 2, 2, 0, 2]], [page - 1, 0, page // 2]
    arguments = make(device, owners, fill, groups, key_dim, value_dim, page, dtype, length)
    out = ragged_decode_attention(*arguments, scale=0.3)
    baseline = torch_ragged_decode_attention(*without_nan(*arguments), scale=0.3)
    assert out.dtype == dtype
    assert_error_within(out, exact(*arguments, scale=0.3), baseline)


def test_several_tokens_in_several_splits(device, monkeypatch, assert_error_within):
    monkeypatch.setattr(module, "WANTED_PROGRAMS", 1)
    long = MAX_SPLIT_PAGES * 4 + 3
    owners = torch.tensor([1] * long + [0] + [2] * 3)[torch.randperm(long + 4)].tolist()
    arguments = make(device, [owners[:40], owners[40:]], [1, 0, 1], 2, page=2, length=13)
    assert split_sizes(len(owners), 3, 26, 1)[0] == 4 * MAX_SPLIT_PAGES
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, exact(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


def test_more_splits_while_there_are_few_tiles():
    """With one tile per split, splits are short enough to fill the chip; with many they may be longer."""
    pages, streams = 4096, 16
    assert split_sizes(pages, streams, 1, 1)[0] == 8
    assert split_sizes(pages, streams, 128, 1)[0] == 8
    assert split_sizes(pages, streams, 1024, 8)[0] == 64
    assert split_sizes(pages, streams, 2**16, 2**9)[0] == 8 * MAX_SPLIT_PAGES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype, device, assert_error_within):
    """Logits far beyond the range of exp; in some streams one wins."""
    q, *others = make(device, [[0, 1, 0, 0, 0, 0, 0, 0]], [3, 4, 0], dtype=dtype)
    arguments = (100 * q, *others)
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, exact(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))
    assert torch.equal(out[2, 0], others[1][2]), "a stream that holds nothing reads the token itself"


def test_logits_beneath_the_tokens_own(device):
    """Stored keys whose weights vanish beside the token's own, and the other way round."""
    q, k, v, *others = make(device, [[0, 1, 1, 0]], [5, 0])
    q.fill_(1.0)
    k[0], k[1] = 1000.0, -1000.0
    out = ragged_decode_attention(q, k, v, *others)
    assert torch.equal(out[0, 0], v[0])
    torch.testing.assert_close(out.double(), exact(q, k, v, *others), atol=1e-6, rtol=0)


def test_several_splits_a_stream(device, monkeypatch, assert_error_within):
    """With few splits each has the largest length, except the last of a stream; pages lie in any order."""
    monkeypatch.setattr(module, "WANTED_PROGRAMS", 1)
    long = 2 * MAX_SPLIT_PAGES + 5
    owners = [1] * long + [0] + [3] * (MAX_SPLIT_PAGES + 1)
    owners = torch.tensor(owners)[torch.randperm(len(owners))].tolist()
    arguments = make(device, [owners[:40], owners[40:41], owners[41:]], [1, 0, 1, 0], 2, page=2)
    assert split_sizes(len(owners), 4, 2, 1)[0] == MAX_SPLIT_PAGES
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, exact(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


def test_there_are_never_more_splits_than_planned():
    for streams, rows in ((1, 1), (3, 70), (50, 5000)):
        for trial in range(50):
            pages = torch.randint(0, 2 + 5 * trial, (streams,)) * (torch.rand(streams) < 0.7)
            split_pages, num_splits = split_sizes(int(pages.sum()), streams, rows, rows // 64 + 1)
            assert int((pages / split_pages).ceil().sum()) <= num_splits


def test_many_streams(device, monkeypatch, assert_error_within):
    """More streams than the plan adds up at once; most of them hold no tokens."""
    monkeypatch.setattr(module, "PLAN_BLOCK", 16)
    arguments = make(device, [[0, 49, 49, 33, 32, 31, 17]], [n % 3 for n in range(50)], 1, 8, 8, page=4)
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, exact(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


def test_an_index_spares_the_sort(device):
    """Ranks and counts from a store give the same, also when its last slab has free pages."""
    *new, pages, tail = make(device, [[0, 1, 0], [1, 0, 1, 2, 2, 0, 0]], [3, 4, 5])
    expected = ragged_decode_attention(*new, pages, tail)
    (_, counts), ranks = index_pages(pages, 3)
    assert ranks[0].tolist() == [0, 0, 1]
    assert ranks[1].tolist() == [1, 2, 2, 0, 1, 3, 4]
    assert counts.tolist() == [5 * 16, 3 * 16, 2 * 16]
    index = slab_table([(*slab, rank) for slab, rank in zip(pages, ranks, strict=True)]), counts
    assert torch.equal(ragged_decode_attention(*new, pages, tail, index=index), expected)
    # Three pages fewer: the pages behind them in the last slab must not be read.
    owner, rank = pages[1][2], ranks[1]
    counts = counts - 16 * torch.bincount(owner[4:].long(), minlength=3)
    owner[4:], rank[4:] = 10**6, 10**6
    used = [pages[0], tuple(x[:4] for x in pages[1])]
    expected = ragged_decode_attention(*new, used, tail)
    assert torch.equal(ragged_decode_attention(*new, used, tail, index=(index[0], counts)), expected)


def append(store, counts, start):
    """Appends `counts[n]` random tokens to stream `n`."""
    streams = torch.repeat_interleave(torch.tensor(counts))
    total = len(streams)
    fields = (torch.randn(total, store.key_dim), torch.randn(total, store.value_dim), torch.rand(total))
    positions = start + torch.arange(total, dtype=torch.int32)
    store.append(KeptTokens(*(x.to(store.device) for x in (*fields, positions, streams))))


def assert_reads(store):
    """Checks that the kernel reads exactly the store's tokens, with the store's own index."""
    streams, device = store.num_streams, store.device
    pages = [(x["keys"], x["values"], x["owner"]) for x in store.pages()]
    fields = ("keys", "values", "owner", "rank")
    index = slab_table([tuple(slab[x] for x in fields) for slab in store.slabs]), store.counts
    tail = (store.tail["keys"], store.tail["values"], store.fill)
    held = store.tokens()
    for length in (1, 3):
        q, k = torch.randn(2, streams, length, 1, store.key_dim, device=device)
        k, v = k.squeeze(2), torch.randn(streams, length, store.value_dim, device=device)
        keep = torch.ones(streams, length, dtype=torch.bool, device=device)
        out = ragged_decode_attention(q, k, v, keep, pages, tail, index=index)
        for n in range(streams):
            keys = torch.cat([held.keys[held.streams == n], k[n]]).double()
            values = torch.cat([held.values[held.streams == n], v[n]]).double()
            expected = (q[n, -1].double() @ keys.T * store.key_dim**-0.5).softmax(-1) @ values
            torch.testing.assert_close(out[n, -1].double(), expected, atol=2e-6, rtol=0)


def test_reads_what_a_store_holds(device):
    """After a prefill, turns, single tokens and a rollback: pages of a stream in several slabs, a slab with room."""
    store = PagedStore(3, 8, 12, torch.float32, torch.device(device))
    append(store, [70, 3, 33], 0)
    assert_reads(store)
    for step in range(60):
        append(store, [1, 0, step % 2], 100 + step)
    append(store, [16, 14, 100], 200)
    assert len(store.slabs) > 2
    assert_reads(store)
    mark = store.mark()
    append(store, [40, 40, 0], 400)
    assert_reads(store)
    store.rollback(mark)
    append(store, [0, 100, 1], 400)
    assert_reads(store)
    append(store, [50, 0, 50], 600)
    append(store, [16, 0, 0], 700)
    assert len(store.slabs[-1]["owner"]) > store.used[-1]
    assert_reads(store.selected(torch.tensor([2, 0, 2, 1], device=device)))
    assert_reads(store)


def test_the_same_bits_every_time(device):
    arguments = make(device, [[0, 1, 0, 1, 1, 1, 1, 0, 1, 1]], [3, 4], 2)
    first = ragged_decode_attention(*arguments)
    assert torch.equal(first, ragged_decode_attention(*arguments))


def test_no_streams(device):
    out = ragged_decode_attention(*make(device, [], [], 2, 16, 24))
    assert out.shape == (0, 1, 2, 24)


@pytest.mark.parametrize("length", [1, 3, 17])
def test_new_tokens_of_any_strides(length, device, poisoned):
    q, k, v, keep, *stored = make(device, [[0, 1, 1]], [3, 4], 2, length=length)
    expected = ragged_decode_attention(q, k, v, keep, *stored)
    strided = keep.mT.contiguous().mT
    assert torch.equal(ragged_decode_attention(poisoned(q), poisoned(k), poisoned(v), strided, *stored), expected)


def changed(arguments, name, change):
    """The arguments with one tensor changed; `tail.0` is the first of the open pages, `pages.0` of the first slab."""
    *new, pages, tail = arguments
    named = dict(zip(("q", "k", "v", "keep"), new, strict=True))
    if name in named:
        named[name] = change(named[name])
    part = int(name[-1]) if "." in name else -1
    tail = tuple(change(x) if name == f"tail.{part}" and i == part else x for i, x in enumerate(tail))
    slab = tuple(change(x) if name == f"pages.{part}" and i == part else x for i, x in enumerate(pages[0]))
    return (*named.values(), [slab, *pages[1:]], tail)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"`q` must be \[N, T, G, K\]"),
        ("q", torch.Tensor.double, "`q` must be .* got .*float64"),
        ("k", lambda x: x[:1], r"`k` must be \[2, 1, 16\]"),
        ("v", torch.Tensor.bfloat16, "`v` must be .*bfloat16"),
        ("v", lambda x: x.clone().requires_grad_(), "`v` requires a gradient"),
        ("keep", torch.Tensor.int, r"`keep` must be \[2, 1\] of torch.bool.* got \[2, 1\] of torch.int32"),
        ("keep", lambda x: x[:, :0], r"`keep` must be \[2, 1\].* got \[2, 0\]"),
        ("tail.0", lambda x: x[:, :3].contiguous(), "`p` a power of two"),
        ("tail.1", lambda x: x[..., 1:], r"`tail\[1\]` must be"),
        ("tail.2", torch.Tensor.float, r"`tail\[2\]` must be \[2\] of torch.int32 or torch.int64"),
        ("pages.0", lambda x: x.transpose(1, 2), r"`pages\[0\]\[0\]` must be contiguous"),
        ("pages.1", lambda x: x[:1], r"`pages\[0\]\[1\]` must be"),
        ("pages.2", torch.Tensor.long, r"`pages\[0\]\[2\]` must be \[3\] of torch.int32"),
    ],
)
def test_bad_arguments_are_refused(name, change, message, device):
    arguments = make(device, [[0, 1, 1]], [3, 4])
    with pytest.raises(ValueError, match=message):
        ragged_decode_attention(*changed(arguments, name, change))


def test_a_bad_index_is_refused(device):
    *new, pages, tail = make(device, [[0, 1, 1]], [3, 4])
    (slabs, counts), _ = index_pages(pages, 2)
    with pytest.raises(ValueError, match=r"`index\[0\]` must be \[1, 6\]"):
        ragged_decode_attention(*new, pages, tail, index=(slabs[:, :5], counts))
    with pytest.raises(ValueError, match=r"`index\[1\]` must be \[2\] of torch.int64"):
        ragged_decode_attention(*new, pages, tail, index=(slabs, counts.int()))


def make_recent(arguments, slots, fill):
    """The argument `recent`, with NaN in its unused slots and around it."""
    _, k, v, *_ = arguments
    keys, values = (torch.randn(len(x), slots, x.shape[2], device=x.device).to(x.dtype) for x in (k, v))
    fill = torch.tensor(fill, device=k.device)
    unused = torch.arange(slots, device=k.device) >= fill[:, None]
    keys[unused], values[unused] = torch.nan, torch.nan
    return inside_nan(keys), inside_nan(values), fill


def with_recent_in_the_tail(arguments, recent):
    """The same tokens for PyTorch, whose open pages may be of any size."""
    *others, tail = arguments
    slots = tail[0].shape[1] + recent[0].shape[1]
    keys, values = (x.new_zeros(len(x), slots, x.shape[2]) for x in tail[:2])
    for n in range(len(tail[2])):
        for out, *parts in ((keys, tail[0], recent[0]), (values, tail[1], recent[1])):
            used = torch.cat([x[n, : part[2][n]] for x, part in zip(parts, (tail, recent), strict=True)])
            out[n, : len(used)] = used
    return *others, (keys, values, tail[2] + recent[2])


def check_recent(arguments, recent, assert_error_within, scale=None):
    out = ragged_decode_attention(*arguments, scale=scale, recent=recent)
    baseline = torch_ragged_decode_attention(*with_recent_in_the_tail(arguments, recent), scale=scale)
    assert out.dtype == arguments[0].dtype
    assert_error_within(out, exact(*arguments, scale=scale, recent=recent), baseline)


@pytest.mark.parametrize("slots", [1, 4, 63, 600])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stored", ["nothing", "open pages only", "several slabs", "one long stream"])
def test_recent_tokens_are_seen(stored, groups, slots, device, assert_error_within):
    """Windows that are empty, in part filled and full, beside streams of very different lengths."""
    owners, fill = SHAPES.get(stored, ([], [0, 0, 0, 0]))
    arguments = make(device, owners, fill, groups)
    check_recent(arguments, make_recent(arguments, slots, [slots, 0, slots // 2, slots - 1]), assert_error_within)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "key_dim", "value_dim", "page", "slots"),
    [(1, 24, 16, 16, 40), (3, 16, 40, 4, 63), (2, 20, 7, 2, 5), (7, 8, 8, 8, 100), (4, 5, 3, 1, 9)],
)
def test_recent_tokens_of_odd_sizes_and_dtypes(
    groups, key_dim, value_dim, page, slots, dtype, device, assert_error_within, arithmetic_as_on_a_gpu
):
    owners, fill = [[0, 2, 2, 0, 2], [2, 2, 1, 2, 2, 0, 2]], [page - 1, 0, page // 2]
    arguments = make(device, owners, fill, groups, key_dim, value_dim, page, dtype)
    recent = make_recent(arguments, slots, [slots, slots // 3, slots - 1])
    check_recent(arguments, recent, assert_error_within, scale=0.3)


@pytest.mark.parametrize("plan_block", [2, 1024])
def test_a_window_of_several_splits(plan_block, device, monkeypatch, assert_error_within):
    """Splits that hold stored and recent pages, and a plan that lists and adds up few at once."""
    monkeypatch.setattr(module, "WANTED_PROGRAMS", 1)
    monkeypatch.setattr(module, "PLAN_BLOCK", plan_block)
    arguments = make(device, [[1, 3, 1, 0, 1], [3, 3]], [1, 0, 1, 1, 0], 2, page=2)
    slots = 4 * MAX_SPLIT_PAGES + 11
    recent = make_recent(arguments, slots, [slots, 3, 0, slots - 1, 90])
    check_recent(arguments, recent, assert_error_within)


def test_an_empty_window_changes_nothing(device):
    arguments = make(device, [[0, 1, 1]], [3, 4], 2)
    empty = make_recent(arguments, 63, [0, 0])
    expected = ragged_decode_attention(*arguments)
    torch.testing.assert_close(ragged_decode_attention(*arguments, recent=empty), expected, atol=1e-6, rtol=0)


def test_the_order_in_a_window_shows_nowhere(device):
    arguments = make(device, [[0, 1, 1]], [3, 4], 2)
    recent = make_recent(arguments, 50, [50, 50])
    turned = (*(x.roll(17, 1) for x in recent[:2]), recent[2].int())
    found, expected = (ragged_decode_attention(*arguments, recent=x) for x in (turned, recent))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_free_pages_are_not_read_beside_a_window(device):
    """The window's pages must not count as pages of the slabs."""
    *new, pages, tail = make(device, [[0, 1, 0, 1], [1, 0, 1, 0]], [3, 4])
    recent = make_recent(new, 70, [70, 33])
    (_, counts), ranks = index_pages(pages, 2)
    owner, rank = pages[1][2], ranks[1]
    index = slab_table([(*slab, rank) for slab, rank in zip(pages, ranks, strict=True)]), counts - 16
    owner[2:], rank[2:] = 10**6, 10**6
    used = [pages[0], tuple(x[:2] for x in pages[1])]
    expected = ragged_decode_attention(*new, used, tail, recent=recent)
    found = ragged_decode_attention(*new, pages, tail, index=index, recent=recent)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, lambda x: x[:, :0], r"`recent\[0\]` must be \[N, R, K\] with a slot or more, got \[2, 0, 16\]"),
        (0, lambda x: x[..., :8].contiguous(), r"`recent\[0\]` must be \[2, 20, 16\] of .*got \[2, 20, 8\]"),
        (0, torch.Tensor.half, r"`recent\[0\]` must be .*got .*float16"),
        (1, lambda x: x[:, 1:].contiguous(), r"`recent\[1\]` must be \[2, 20, 16\]"),
        (1, lambda x: x.mT.contiguous().mT, r"`recent\[1\]` must be contiguous"),
        (2, torch.Tensor.float, r"`recent\[2\]` must be \[2\] of torch.int32 or torch.int64"),
    ],
)
def test_a_bad_window_is_refused(part, change, message, device):
    arguments = make(device, [[0, 1, 1]], [3, 4])
    recent = [change(x) if i == part else x for i, x in enumerate(make_recent(arguments, 20, [20, 5]))]
    with pytest.raises(ValueError, match=message):
        ragged_decode_attention(*arguments, recent=tuple(recent))


def test_a_window_of_several_new_tokens_is_refused(device):
    arguments = make(device, [[0, 1, 1]], [3, 4], length=2)
    with pytest.raises(ValueError, match="`recent` is what a single new token sees, so `T` must be 1, got 2"):
        ragged_decode_attention(*arguments, recent=make_recent(arguments, 20, [20, 5]))


# Times 16 rows, or 16 tokens of a page, of 256 numbers: more than 2^31.
MANY = 2**19 + 2


def test_addresses_of_pages_have_64_bits(last_of):
    base, page_bytes = 10**12, 16 * 256 * 2
    owner, rank = torch.zeros(MANY, dtype=torch.int32), torch.arange(MANY, dtype=torch.int32)
    slabs = torch.tensor([[base, 3 * base, owner.data_ptr(), rank.data_ptr(), 0, MANY]])
    page_list = torch.zeros(2, MANY, dtype=torch.long)
    module.page_list_fwd_kernel[(-(-MANY // 256), 1)](
        slabs, torch.tensor([0, MANY]).int(), page_list, 1, MANY, page_bytes, page_bytes,
        FIELDS=6, RECENT=0, BLOCK=256,
    )  # fmt: skip
    assert page_list[:, -1].tolist() == [x + (MANY - 1) * page_bytes for x in (base, 3 * base)]


def test_addresses_of_streams_and_splits_have_64_bits(last_of):
    """The last of very many streams, with a page in the last of very many splits, gives the same as alone."""
    length, page, dim = 16, 16, 256
    sizes = {"K": dim, "V": dim, "PAGE": page, "BLOCK_K": dim, "BLOCK_V": dim}
    q, k, v, tail_k, tail_v = torch.randn(5, 1, length, dim).half()
    keys, values = torch.randn(2, page, dim).half()
    page_list = torch.tensor([[keys.data_ptr()], [values.data_ptr()]])

    def results(n):
        first_page, first_split = torch.zeros(n + 1, dtype=torch.int32), torch.full((n + 1,), n - 1, dtype=torch.int32)
        first_page[-1], first_split[-1] = 1, n
        streams, fill = torch.full((n,), n - 1, dtype=torch.int32), torch.full((n,), 5)
        queries, (peak, total) = last_of(n, q), torch.empty(2, n, length)
        partial, out = torch.empty(n, length, dim), torch.empty(n, length, dim, dtype=torch.half)
        module.ragged_decode_attention_fwd_kernel[(n,)](
            queries, page_list, first_page, first_split, streams, peak, total, partial, 1, 4, length, 0.1,
            ALIGNMENT=16, BLOCK_M=length, BLOCK_N=page, **sizes,
        )  # fmt: skip
        module.ragged_decode_merge_fwd_kernel[(n * length,)](
            queries, last_of(n, k), last_of(n, v), torch.ones(n, length, dtype=torch.uint8), last_of(n, tail_k),
            last_of(n, tail_v), fill, *[None] * 6, first_split, peak, total, partial, out, length, 0.1,
            G=1, BLOCK_P=page, BLOCK_T=length, BLOCK_S=16, **sizes,
        )  # fmt: skip
        return peak[-1], total[-1], partial[-1], out[-1, -1]

    alone = results(1)
    assert all(x.isfinite().all() for x in alone)
    for far, near in zip(results(MANY), alone, strict=True):
        assert torch.equal(far, near)


def test_addresses_of_windows_have_64_bits(last_of):
    """The last of very many streams has the whole pages of its window listed, and reads the rest of it."""
    page, dim, slots, used = 16, 256, 528, 521
    sizes = {"K": dim, "V": dim, "PAGE": page}
    q, k, v = torch.randn(3, 1, 1, dim).half()
    keys, values = torch.randn(2, 1, slots, dim).half()

    def results(n):
        list_, fill, none = torch.zeros(2, used // page, dtype=torch.long), *torch.zeros(2, n, dtype=torch.long)
        fill[-1] = used
        window = (last_of(n, keys), last_of(n, values), fill, slots)
        page_start, split_start, streams = torch.zeros(3, n + 2).int()
        module.split_plan_fwd_kernel[(n,)](
            none,
            page_start,
            split_start,
            streams,
            n,
            used // page,
            1,
            *window,
            list_,
            used // page,
            BLOCK=1024,
            **sizes,
        )
        at = [(x - y[-1].data_ptr()).tolist() for x, y in zip(list_, window[:2], strict=True)]
        tail, out = torch.empty(n, page, dim).half(), torch.empty(n, 1, dim).half()
        module.ragged_decode_merge_fwd_kernel[(n,)](
            last_of(n, q), last_of(n, k), last_of(n, v), fill, tail, tail, none, *window, None, None, streams[:-1] * 0,
            none, none, none, out, 1, 0.1, G=1, BLOCK_P=page, BLOCK_T=1, BLOCK_S=16, BLOCK_K=dim, BLOCK_V=dim, **sizes,
        )  # fmt: skip
        return at, out[-1]

    (at, alone), (far_at, far) = results(1), results(2**14 + 1)
    assert at == far_at == [[x * page * dim * 2 for x in range(used // page)]] * 2
    assert torch.equal(far, alone)
    assert alone.isfinite().all()
