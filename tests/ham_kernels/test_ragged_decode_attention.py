# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds the decoding kernel to the dense softmax over each stream's tokens, wherever its pages lie."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from ham_hf.cache_ham import KeptTokens, PagedStore
from ham_hf.ops_ham import ragged_decode_attention as torch_ragged_decode_attention
from ham_kernels.ragged_decode_attention import (
    MAX_SPLIT_PAGES,
    index_pages,
    ragged_decode_attention,
    slab_table,
    split_sizes,
)

# The package names its op as the file is named.
module = importlib.import_module("ham_kernels.ragged_decode_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inside_nan(x):
    """A contiguous copy of `x` with NaN before and after it, at an address that is a multiple of 16 bytes."""
    margin = 64
    buffer = torch.full((x.numel() + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[margin : margin + x.numel()].view(x.shape)
    return view.copy_(x)


def make(device, owners, fill, groups=1, key_dim=16, value_dim=16, page=16, dtype=torch.float32):
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
    q, k, v = 2 * randn(streams, groups, key_dim), randn(streams, key_dim), randn(streams, value_dim)
    return inside_nan(q), inside_nan(k), inside_nan(v), pages, (inside_nan(tail_k), inside_nan(tail_v), fill)


def dense(q, k, v, pages, tail, scale=None):
    """The softmax in float64 over a stream's tokens, one stream at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tail_k, tail_v, fill = tail
    out = []
    for n in range(len(q)):
        parts = [(keys[owner == n].flatten(0, 1), values[owner == n].flatten(0, 1)) for keys, values, owner in pages]
        parts += [(tail_k[n, : fill[n]], tail_v[n, : fill[n]]), (k[n : n + 1], v[n : n + 1])]
        keys, values = (torch.cat(x).double() for x in zip(*parts, strict=True))
        out.append((q[n].double() @ keys.T * scale).softmax(-1) @ values)
    return torch.stack(out)


def without_nan(q, k, v, pages, tail):
    """The same arguments for PyTorch, which multiplies unused slots by zero."""
    return q, k, v, pages, (tail[0].nan_to_num(), tail[1].nan_to_num(), tail[2])


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
    assert_error_within(out, dense(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


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
    assert_error_within(out, dense(*arguments, scale=0.3), baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype, device, assert_error_within):
    """Logits far beyond what exp can take, of which one wins in some streams."""
    q, *others = make(device, [[0, 1, 0, 0, 0, 0, 0, 0]], [3, 4, 0], dtype=dtype)
    arguments = (100 * q, *others)
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, dense(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))
    assert torch.equal(out[2, 0], others[1][2]), "a stream that holds nothing reads the token itself"


def test_logits_beneath_the_tokens_own(device):
    """Stored keys whose weights vanish beside the token's own, and the other way round."""
    q, k, v, pages, tail = make(device, [[0, 1, 1, 0]], [5, 0])
    q.fill_(1.0)
    k[0], k[1] = 1000.0, -1000.0
    out = ragged_decode_attention(q, k, v, pages, tail)
    assert torch.equal(out[0, 0], v[0])
    torch.testing.assert_close(out.double(), dense(q, k, v, pages, tail), atol=1e-6, rtol=0)


def test_several_splits_a_stream(device, monkeypatch, assert_error_within):
    """With room for few splits each is as long as one may be, the last of a stream shorter; pages lie in any order."""
    monkeypatch.setattr(module, "WANTED_SPLITS", 1)
    long = 2 * MAX_SPLIT_PAGES + 5
    owners = [1] * long + [0] + [3] * (MAX_SPLIT_PAGES + 1)
    owners = torch.tensor(owners)[torch.randperm(len(owners))].tolist()
    arguments = make(device, [owners[:40], owners[40:41], owners[41:]], [1, 0, 1, 0], 2, page=2)
    assert split_sizes(len(owners), 4)[0] == MAX_SPLIT_PAGES
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, dense(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


def test_there_are_never_more_splits_than_planned():
    for streams in (1, 3, 50):
        for trial in range(50):
            pages = torch.randint(0, 2 + 5 * trial, (streams,)) * (torch.rand(streams) < 0.7)
            split_pages, num_splits = split_sizes(int(pages.sum()), streams)
            assert int((pages / split_pages).ceil().sum()) <= num_splits


def test_many_streams(device, monkeypatch, assert_error_within):
    """More streams than the plan adds up at once; most of them hold nothing but themselves."""
    monkeypatch.setattr(module, "PLAN_BLOCK", 16)
    arguments = make(device, [[0, 49, 49, 33, 32, 31, 17]], [n % 3 for n in range(50)], 1, 8, 8, page=4)
    out = ragged_decode_attention(*arguments)
    assert_error_within(out, dense(*arguments), torch_ragged_decode_attention(*without_nan(*arguments)))


def test_an_index_spares_the_sort(device):
    """Ranks and counts that a store knows give the same, also when its last slab has room left over."""
    q, k, v, pages, tail = make(device, [[0, 1, 0], [1, 0, 1, 2, 2, 0, 0]], [3, 4, 5])
    expected = ragged_decode_attention(q, k, v, pages, tail)
    (_, counts), ranks = index_pages(pages, len(q))
    assert ranks[0].tolist() == [0, 0, 1]
    assert ranks[1].tolist() == [1, 2, 2, 0, 1, 3, 4]
    assert counts.tolist() == [5 * 16, 3 * 16, 2 * 16]
    index = slab_table([(*slab, rank) for slab, rank in zip(pages, ranks, strict=True)]), counts
    assert torch.equal(ragged_decode_attention(q, k, v, pages, tail, index=index), expected)
    # Three pages fewer: those of the last slab behind them must not be looked at.
    owner, rank = pages[1][2], ranks[1]
    counts = counts - 16 * torch.bincount(owner[4:].long(), minlength=3)
    owner[4:], rank[4:] = 10**6, 10**6
    used = [pages[0], tuple(x[:4] for x in pages[1])]
    expected = ragged_decode_attention(q, k, v, used, tail)
    assert torch.equal(ragged_decode_attention(q, k, v, used, tail, index=(index[0], counts)), expected)


def append(store, counts, start):
    """Puts `counts[n]` random tokens more into stream `n`."""
    streams = torch.repeat_interleave(torch.tensor(counts))
    total = len(streams)
    fields = (torch.randn(total, store.key_dim), torch.randn(total, store.value_dim), torch.rand(total))
    positions = start + torch.arange(total, dtype=torch.int32)
    store.append(KeptTokens(*(x.to(store.device) for x in (*fields, positions, streams))))


def assert_reads(store):
    """The kernel reads exactly what the store holds, by what the store itself knows of its pages."""
    q, k = torch.randn(2, store.num_streams, 1, store.key_dim, device=store.device)
    v = torch.randn(store.num_streams, store.value_dim, device=store.device)
    pages = [(x["keys"], x["values"], x["owner"]) for x in store.pages()]
    fields = ("keys", "values", "owner", "rank")
    index = slab_table([tuple(slab[x] for x in fields) for slab in store.slabs]), store.counts
    tail = (store.tail["keys"], store.tail["values"], store.fill)
    out = ragged_decode_attention(q, k[:, 0], v, pages, tail, index=index)
    held = store.tokens()
    for n in range(store.num_streams):
        keys = torch.cat([held.keys[held.streams == n], k[n]]).double()
        values = torch.cat([held.values[held.streams == n], v[n : n + 1]]).double()
        expected = (q[n].double() @ keys.T * store.key_dim**-0.5).softmax(-1) @ values
        torch.testing.assert_close(out[n].double(), expected, atol=2e-6, rtol=0)


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
    assert out.shape == (0, 2, 24)


def test_q_k_and_v_of_any_strides(device, poisoned):
    q, k, v, pages, tail = make(device, [[0, 1, 1]], [3, 4], 2)
    expected = ragged_decode_attention(q, k, v, pages, tail)
    assert torch.equal(ragged_decode_attention(poisoned(q), poisoned(k), poisoned(v), pages, tail), expected)


def changed(arguments, name, change):
    """The arguments with one tensor changed: `q`, `k`, `v`, `tail.0` or `pages.0` for the first entry of the first."""
    q, k, v, pages, tail = arguments
    named = {"q": q, "k": k, "v": v}
    if name in named:
        named[name] = change(named[name])
    part = int(name[-1]) if "." in name else -1
    tail = tuple(change(x) if name == f"tail.{part}" and i == part else x for i, x in enumerate(tail))
    slab = tuple(change(x) if name == f"pages.{part}" and i == part else x for i, x in enumerate(pages[0]))
    return (*named.values(), [slab, *pages[1:]], tail)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"`q` must be \[N, G, K\]"),
        ("q", torch.Tensor.double, "`q` must be .* got .*float64"),
        ("k", lambda x: x[:1], r"`k` must be \[2, 16\]"),
        ("v", torch.Tensor.bfloat16, "`v` must be .*bfloat16"),
        ("v", lambda x: x.clone().requires_grad_(), "`v` requires a gradient"),
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
    q, k, v, pages, tail = make(device, [[0, 1, 1]], [3, 4])
    (slabs, counts), _ = index_pages(pages, len(q))
    with pytest.raises(ValueError, match=r"`index\[0\]` must be \[1, 6\]"):
        ragged_decode_attention(q, k, v, pages, tail, index=(slabs[:, :5], counts))
    with pytest.raises(ValueError, match=r"`index\[1\]` must be \[2\] of torch.int64"):
        ragged_decode_attention(q, k, v, pages, tail, index=(slabs, counts.int()))
