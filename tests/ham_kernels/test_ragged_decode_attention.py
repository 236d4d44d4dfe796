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
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def exact(*arguments, scale=None):
    """The definition of the op, in float64."""

    def double(x):
        return type(x)(map(double, x)) if isinstance(x, (list, tuple)) else x.double() if x.is_floating_point() else x

    return naive_ragged_decode_attention(*map(double, arguments), scale=scale)


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


# Times 16 rows, or 16 tokens of a page, of 256 numbers: more than 2^31.
MANY = 2**19 + 2


def test_addresses_of_pages_have_64_bits(last_of):
    base, page_bytes = 10**12, 16 * 256 * 2
    owner, rank = torch.zeros(MANY, dtype=torch.int32), torch.arange(MANY, dtype=torch.int32)
    slabs = torch.tensor([[base, 3 * base, owner.data_ptr(), rank.data_ptr(), 0, MANY]])
    page_list = torch.zeros(2, MANY, dtype=torch.long)
    module.page_list_fwd_kernel[(-(-MANY // 256), 1)](
        slabs, torch.tensor([0, MANY]).int(), page_list, 1, MANY, page_bytes, page_bytes, FIELDS=6, BLOCK=256
    )
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
            last_of(n, tail_v), fill, None, None, first_split, peak, total, partial, out, length, 0.1,
            G=1, BLOCK_P=page, BLOCK_T=length, BLOCK_S=16, **sizes,
        )  # fmt: skip
        return peak[-1], total[-1], partial[-1], out[-1, -1]

    alone = results(1)
    assert all(x.isfinite().all() for x in alone)
    for far, near in zip(results(MANY), alone, strict=True):
        assert torch.equal(far, near)
