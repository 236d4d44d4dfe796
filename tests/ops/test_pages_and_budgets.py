# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds attention over pages and the eviction of tokens to their definitions."""

import itertools
import math
from collections import Counter

import pytest
import torch

from ham_hf import attention_ham, prefix_attention_ham
from ham_hf.attention_ham import KeptColumns, eviction_times, kth_largest_of_prefixes, ragged_decode_attention
from ham_hf.cache_layer_ham import HAMCacheLayer
from ham_hf.layer_step_ham import LayerStep
from ham_hf.paged_store_ham import PagedStore
from ham_hf.prefix_attention_ham import compact_kept
from ham_hf.reference import naive_ragged_decode_attention, naive_surviving_tokens
from tests.ops.comparison import DTYPES, FORWARD, assert_close, assert_same_function
from tests.ops.inputs import dense_attention, filled_layer

# --------------------------------------------------------------------------- decoding over pages


def paged_inputs(slabs, length, dtype=torch.float64):
    """Arguments of `ragged_decode_attention`; stream 0 holds nothing, and unused slots hold large numbers."""
    streams, groups, page, key_dim, value_dim = 5, 3, 4, 6, 2
    tail_k, tail_v = (50 * torch.randn(streams, page, size, dtype=dtype) for size in (key_dim, value_dim))
    fill = torch.tensor([0, 3, 0, 1, 2])
    for n in range(streams):
        tail_k[n, : fill[n]], tail_v[n, : fill[n]] = torch.randn(2, 1).to(dtype)
    pages = []
    for slab in range(slabs):
        count = 2 + 3 * slab
        owner = torch.randint(1, streams, (count,), dtype=torch.int32)
        owner[0] = 2  # full pages but an empty tail
        keys, values = (torch.randn(count, page, size, dtype=dtype) for size in (key_dim, value_dim))
        pages.append((keys, values, owner))
    return {
        "q": 2 * torch.randn(streams, length, groups, key_dim, dtype=dtype),
        "k": torch.randn(streams, length, key_dim, dtype=dtype),
        "v": torch.randn(streams, length, value_dim, dtype=dtype),
        "keep": torch.rand(streams, length) < torch.tensor([0.5, 0.0, 1.0, 0.5, 0.2])[:, None],
        "pages": pages,
        "tail": (tail_k, tail_v, fill),
    }


def in_float64(x):
    """Nested floating-point tensors in float64."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(in_float64, x))
    return x.double() if x.is_floating_point() else x


def test_the_reference_of_decoding_over_pages_equals_the_formula():
    """One stream, a page [10, 20] and an open page [30]; of the new tokens 1, 2, 3 the second is not kept."""
    values = [torch.tensor(x, dtype=torch.float64)[..., None] for x in ([[10, 20]], [[30, 0]], [[1, 2, 3]])]
    keys = [x / 10 for x in values]
    pages, tail = [(keys[0], values[0], torch.tensor([0]))], (keys[1], values[1], torch.tensor([1]))
    q, keep = torch.ones(1, 3, 1, 1, dtype=torch.float64), torch.tensor([[True, False, True]])
    out = naive_ragged_decode_attention(q, keys[2], values[2], keep, pages, tail, scale=2.0)
    for t, seen in enumerate([(10, 20, 30, 1), (10, 20, 30, 1, 2), (10, 20, 30, 1, 3)]):
        weights = [math.exp(2.0 * x / 10) for x in seen]
        expected = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
        assert out[0, t, 0, 0].item() == pytest.approx(expected, rel=1e-12)


@DTYPES
@pytest.mark.parametrize("slabs", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 5, 6, 40])
def test_attention_over_pages_equals_its_definition(length, slabs, dtype, monkeypatch):
    forms = []
    for name in ("_attend_page_by_page", "attend_stream_by_stream"):
        form = getattr(attention_ham, name)
        monkeypatch.setattr(attention_ham, name, lambda *x, name=name, form=form: forms.append(name) or form(*x))
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 16)
    inputs = paged_inputs(slabs, length, dtype)
    for factor in (1, 100):  # 100: logits beyond what exp can take
        inputs["q"] = factor * inputs["q"]
        out = ragged_decode_attention(**inputs, scale=0.3)
        expected = naive_ragged_decode_attention(**{name: in_float64(x) for name, x in inputs.items()}, scale=0.3)
        assert_close(out, expected, FORWARD[dtype] * factor)
        assert_close(out[0, 0], inputs["v"][0, 0].expand(3, -1), 0.0, "a stream that holds nothing")
    assert set(forms) == {"_attend_page_by_page" if length <= 5 else "attend_stream_by_stream"}


@pytest.mark.parametrize("length", [1, 5, 40])
def test_only_attention_over_pages_without_a_gradient_goes_to_the_kernel(length, choose_kernels):
    inputs, calls = paged_inputs(1, length), []
    kernels = {"ragged_decode_attention": lambda *arguments: calls.append(arguments)}
    choose_kernels(lambda op, *tensors: kernels.get(op))
    for name in ("q", "k", "v"):
        out = ragged_decode_attention(**inputs | {name: inputs[name].clone().requires_grad_()})
        assert out.requires_grad
    assert not calls
    ragged_decode_attention(**inputs)
    with torch.no_grad():
        ragged_decode_attention(**inputs | {"q": inputs["q"].clone().requires_grad_()})
    assert len(calls) == 2


@pytest.mark.parametrize("length", [1, 5, 40])
def test_gradients_of_attention_over_pages(length):
    inputs = paged_inputs(2, length)

    def op(**inputs):
        return [ragged_decode_attention(**inputs)]

    def reference(**inputs):
        return [naive_ragged_decode_attention(**inputs)]

    assert_same_function(op, reference, inputs, torch.float64, ["out"])


@pytest.mark.parametrize("new", [1, 8, 9])
def test_a_backward_pass_may_follow_the_append(new):
    """A call is appended before anyone asks for its gradient, also to the very slab that it has read."""
    layer, q, k, v, keep = filled_layer([16, 15], new)
    keep, scores, slabs = torch.ones_like(keep[:, -new:]), torch.ones(1, new, 2), layer.store.slabs
    found = []
    for append in (False, True):
        q_new, k_new, v_new = (x[:, -new:].clone().requires_grad_() for x in (q, k, v))
        out = layer.attend(q_new, k_new, v_new, keep, scores, None)
        if append:
            layer.update(LayerStep(torch.arange(new)[None], keys=k_new, values=v_new, scores=scores, keep=keep))
            assert len(slabs) == 1
            assert layer.store.used == [2]
        found.append(torch.autograd.grad(out.square().sum(), (q_new, k_new, v_new)))
    for after, before in zip(*reversed(found), strict=True):
        assert torch.equal(after, before)


@pytest.mark.parametrize("new", [1, 8, 9, 150])
@pytest.mark.parametrize("counts", [[0, 0], [16, 32], [1, 100], [17, 400]], ids=str)
def test_attention_over_a_store_equals_prefill_attention(counts, new):
    """The op's view of what `PagedStore` really lays out, and the gradients of a call on a filled cache."""
    layer, q, k, v, keep = filled_layer(counts, new)

    def cached(**x):
        return [layer.attend(*x.values(), keep[:, -new:], torch.ones(1, new, 2), None)]

    def dense(q_new, k_new, v_new):
        joined = (torch.cat([x[:, :-new], y], 1) for x, y in ((q, q_new), (k, k_new), (v, v_new)))
        return [dense_attention(*joined, keep)[0][:, -new:]]

    inputs = {"q_new": q[:, -new:], "k_new": k[:, -new:], "v_new": v[:, -new:]}
    assert_same_function(cached, dense, inputs, torch.float64, ["out"])


# --------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
def test_eviction_times_follow_the_survivors(levels):
    batch, heads, length, past = 2, 3, 30, 12
    scores = torch.randint(0, levels, (batch, past + length, heads)) / levels
    keep = torch.rand(batch, past + length, heads) < torch.tensor([0.1, 0.5, 1.0])
    outcomes = Counter()
    for budget, cut in itertools.product([1, 4, 11, 29, 100], [0, past]):
        tables = {}
        for b, h in itertools.product(range(batch), range(heads)):
            tables[b, h] = naive_surviving_tokens(scores[b, :, h], keep[b, :, h], budget)
        cached = None
        if cut:
            held = torch.stack([torch.stack([tables[b, h][cut - 1] for h in range(heads)]) for b in range(batch)])
            counts, width = held.sum(-1), int(held.sum(-1).max())
            columns = torch.zeros(batch, heads, width)
            for b, h in tables:
                columns[b, h, width - counts[b, h] :] = scores[b, held[b, h], h]
            cached = KeptColumns(
                torch.zeros(batch, heads, width, 1), torch.zeros(batch, heads, width, 1), columns, counts
            )
        new = keep[:, cut:]
        (compacted,), _ = compact_kept(new, scores[:, cut:, :, None])
        until = eviction_times(new, compacted[..., 0], budget, cached)
        outcomes["none" if until is None else "cached" if cut else "fresh"] += 1
        for (b, h), table in tables.items():
            sources = (
                [] if cached is None else [-1] * (width - int(counts[b, h])) + held[b, h].nonzero()[:, 0].tolist()
            )
            sources += [cut + t for t in new[b, :, h].nonzero()[:, 0].tolist()]
            for column, token in enumerate(sources):
                if token < 0:
                    continue  # the gap in front of a shorter head
                for t in range(max(cut, token + 1), past + length):
                    sees = until is None or t - cut < until[b, h, column]
                    assert sees == bool(table[t - 1, token]), (budget, cut, b, h, token, t)
    assert all(outcomes[name] for name in ("none", "cached", "fresh")), outcomes


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 40])
def test_the_kth_largest_of_every_prefix(size):
    ranks = torch.stack([torch.randperm(size) for _ in range(3)])
    for k, first in itertools.product({1, 2, size // 2 + 1, size, size + 1}, {1, size // 2 + 1, size}):
        found = kth_largest_of_prefixes(ranks, k, first)
        assert found.shape == (3, size - first + 1)
        for row, numbers in zip(found.tolist(), ranks.tolist(), strict=True):
            prefixes = (sorted(numbers[:n], reverse=True) for n in range(first, size + 1))
            assert row == [prefix[k - 1] if len(prefix) >= k else -1 for prefix in prefixes]


def test_eviction_takes_no_operation_per_token():
    def operations(length):
        keep, scores = torch.ones(1, length, 2, dtype=torch.bool), torch.rand(1, 2, length)
        with torch.profiler.profile() as profile:
            assert eviction_times(keep, scores, 5) is not None
        return len(profile.events())

    operations(64)  # warms up
    assert operations(2048) < 2 * operations(64), "they grow with the logarithm of the length"


@pytest.mark.parametrize(
    ("cuts", "levels"),
    [
        pytest.param(
            cuts, levels, id=f"{name}-{ties}", marks=pytest.mark.slow if (name, levels) == ("steps", 1000) else []
        )
        for name, cuts in (("prefill", [60]), ("steps", [1] * 60), ("mixed", [20, 1, 1, 17, 1, 20]))
        for ties, levels in (("many ties", 2), ("few ties", 1000))
    ],
)
def test_a_budgeted_cache_layer_holds_the_survivors(cuts, levels, monkeypatch):
    batch, heads, length = 2, 2, 60
    replaced = []
    original = PagedStore.replace_lowest
    monkeypatch.setattr(PagedStore, "replace_lowest", lambda s, x: replaced.append(len(x.scores)) or original(s, x))
    scores = torch.randint(0, levels, (batch, length, heads)) / levels
    keep = torch.rand(batch, length, heads) < torch.tensor([0.3, 0.9])
    marks = torch.arange(batch * length * heads).view(batch, length, heads, 1).double()
    for budget in (1, 5, 17, 40):
        layer, start = HAMCacheLayer(), 0
        for size in cuts:
            cut = slice(start, start + size)
            layer.update(
                LayerStep(
                    positions=torch.arange(start, start + size).expand(batch, -1),
                    keys=marks[:, cut],
                    values=-marks[:, cut],
                    scores=scores[:, cut],
                    keep=keep[:, cut],
                ),
                budget,
            )
            start += size
            tokens = layer.store.tokens()
            for b, h in itertools.product(range(batch), range(heads)):
                survivors = naive_surviving_tokens(scores[b, :start, h], keep[b, :start, h], budget)[-1].nonzero()[
                    :, 0
                ]
                mine = tokens.select(tokens.streams == b * heads + h)
                order = mine.positions.argsort()
                assert mine.positions[order].tolist() == survivors.tolist()
                assert torch.equal(mine.keys[order], marks[b, survivors, h]), "keys must travel with their positions"
                assert torch.equal(mine.values[order], -marks[b, survivors, h])
                assert torch.equal(mine.scores[order], scores[b, survivors, h])
    assert bool(sum(replaced)) == (1 in cuts), "single steps replace in place, longer ones rebuild"
