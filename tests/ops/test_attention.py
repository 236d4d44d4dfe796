# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds attention over kept tokens to dense masked attention."""

import functools
import itertools

import pytest
import torch

from ham_hf import prefix_attention_ham
from ham_hf.attention_ham import KeptColumns, attend_new
from ham_hf.prefix_attention_ham import compact_kept, sparse_prefix_attention
from ham_hf.reference import naive_surviving_tokens
from tests.ops.comparison import DTYPES, assert_close, assert_same_function
from tests.ops.inputs import attention_inputs, dense_attention, documents, masked_attention, sparse_attention


def test_compact_kept_is_a_stable_gather_of_each_head():
    keep = torch.rand(3, 20, 2) < torch.tensor([0.2, 0.9])
    keep[1, :, 0] = False
    x, y = torch.randn(3, 20, 2, 5), torch.randn(3, 20, 2, 1)
    (x_kept, y_kept), before = compact_kept(keep, x, y)
    assert x_kept.shape[2] == keep.sum(1).max()
    for b, h in itertools.product(range(3), range(2)):
        count = int(keep[b, :, h].sum())
        assert torch.equal(x_kept[b, h, :count], x[b, keep[b, :, h], h])
        assert torch.equal(y_kept[b, h, :count], y[b, keep[b, :, h], h])
        assert before[b, :, h].tolist() == [int(keep[b, :t, h].sum()) for t in range(20)]


@DTYPES
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_sparse_attention_and_all_gradients_equal_dense_masked_softmax(length, fraction, dtype):
    inputs = attention_inputs(length) | {"keep": torch.rand(2, length, 2) < fraction, "scale": 0.4}
    assert_same_function(sparse_attention, dense_attention, inputs, dtype, ["out"])


@DTYPES
def test_sparse_attention_in_several_blocks_and_groups(dtype, blocks, monkeypatch):
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 16)
    monkeypatch.setattr(prefix_attention_ham, "MANY_COLUMNS", 50)
    length, fractions = 70, torch.tensor([[0.02, 1.0, 0.9], [0.5, 0.45, 0.0]])
    keep = torch.rand(2, length, 3) < fractions[:, None]
    counts = keep.sum(1).flatten()
    groups = prefix_attention_ham.group_alike(counts.tolist())
    assert len(groups) >= 3, "the heads must be too different for one group"
    assert any(len(group) > 1 for group in groups), "some heads must share a group"
    inputs = attention_inputs(length, heads=6, kv_heads=3) | {"keep": keep}
    sparse_attention(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    many = sum(max(counts[n] for n in group) > 50 for group in groups)
    assert many >= 1, "some groups must have many columns"
    assert len(blocks) == 3 * many + 5 * (len(groups) - many), "blocks of 32 queries with many columns, else of 16"
    assert sum(streams * rows for streams, rows, _ in blocks) == 6 * length, "every query of every stream exactly once"
    assert_same_function(sparse_attention, dense_attention, inputs, dtype, ["out"])


def test_group_alike_is_a_partition_that_bounds_padding():
    for counts in ([], [0], [0, 0, 0], [5, 5, 5], [100, 1, 75, 74, 0], torch.randint(0, 1000, (40,)).tolist()):
        groups = prefix_attention_ham.group_alike(counts)
        assert sorted(itertools.chain(*groups)) == list(range(len(counts)))
        for group in groups:
            largest = max(counts[n] for n in group)
            assert min(counts[n] for n in group) >= prefix_attention_ham.GROUP_RATIO * largest


@DTYPES
def test_sparse_attention_does_not_cross_documents(dtype, monkeypatch, blocks):
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 8)
    lengths = [1, 20, 9, 13]
    keep = torch.rand(4, sum(lengths), 2) < 0.6
    inputs = attention_inputs(sum(lengths), batch=4) | {"keep": keep, "seq_idx": documents(lengths, 4)}
    assert_same_function(sparse_attention, dense_attention, inputs, dtype, ["out"])
    assert max(columns for _, _, columns in blocks) < keep.sum(1).max(), "blocks must skip the documents before theirs"


def test_sparse_attention_gradcheck():
    keep = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)[None, :, None]
    q, k, v = (x.double().requires_grad_() for x in attention_inputs(6, 1, 2, 1, 2, 3).values())
    assert torch.autograd.gradcheck(lambda q, k, v: sparse_attention(q, k, v, keep)[0], (q, k, v))


def test_columns_that_nobody_may_see_have_no_influence():
    # `compact_kept` leaves arbitrary tokens past a head's own count; they must be as good as absent, also in backward.
    inputs = {name: x.double() for name, x in attention_inputs(12).items()}
    keep = torch.rand(2, 12, 2) < torch.tensor([0.2, 0.8])
    (k_kept, v_kept), end = compact_kept(keep, inputs["k"], inputs["v"])
    beyond = torch.arange(k_kept.shape[2]) >= keep.sum(1)[..., None]
    assert beyond.any()
    results = []
    for filler in (0.0, 1e3):
        leaves = [k_kept.masked_fill(beyond[..., None], filler), v_kept.masked_fill(beyond[..., None], filler)]
        leaves = [x.requires_grad_() for x in leaves]
        out = sparse_prefix_attention(
            **inputs, k_kept=leaves[0], v_kept=leaves[1], begin=torch.zeros_like(end), end=end
        )
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert all(torch.equal(x[beyond], torch.zeros_like(x[beyond])) for x in grads)
        results.append((out, *grads))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_heads_whose_columns_lie_apart_share_a_block(blocks):
    """As two heads of a cache do, one right-aligned behind the other, when nothing new is kept."""
    inputs = {name: x.double() for name, x in attention_inputs(5, batch=1).items()}
    k_kept, v_kept = torch.randn(1, 2, 10, 4).double(), torch.randn(1, 2, 10, 6).double()
    begin, end = (torch.tensor(x).expand(1, 5, 2) for x in ([0, 4], [6, 10]))
    out = sparse_prefix_attention(**inputs, k_kept=k_kept, v_kept=v_kept, begin=begin, end=end)
    assert blocks == [(2, 5, 10)], "one block of both heads over all columns"
    column = torch.arange(10)
    kept = (column >= begin.transpose(1, 2)[..., None]) & (column < end.transpose(1, 2)[..., None])
    visible = torch.cat([kept, torch.eye(5, dtype=torch.bool).expand(1, 2, -1, -1)], -1)
    k = torch.cat([k_kept.transpose(1, 2), inputs["k"]], 1)
    v = torch.cat([v_kept.transpose(1, 2), inputs["v"]], 1)
    assert_close(out, masked_attention(inputs["q"], k, v, visible), 1e-12)


def test_sparse_attention_is_stable_for_large_logits():
    inputs = {name: 100 * x for name, x in attention_inputs(40).items()}
    keep = torch.rand(2, 40, 2) < 0.5
    expected = dense_attention(**{name: x.double() for name, x in inputs.items()}, keep=keep)[0]
    assert_close(
        sparse_attention(**inputs, keep=keep)[0], expected, 5e-2
    )  # logits of 1e5: the values, of 1e2, to 5e-4


@DTYPES
@pytest.mark.parametrize("budget", [1, 3, 8])
def test_attention_under_a_budget_equals_the_survivors_of_each_moment(budget, dtype, monkeypatch):
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 16)
    batch, length, kv_heads = 2, 40, 2
    keep, scores = torch.rand(batch, length, kv_heads) < 0.7, torch.rand(batch, length, kv_heads)
    visible = torch.zeros(batch, kv_heads, length, length, dtype=torch.bool)
    for b, h in itertools.product(range(batch), range(kv_heads)):
        held = naive_surviving_tokens(scores[b, :, h], keep[b, :, h], budget)
        visible[b, h] = torch.cat([torch.zeros(1, length, dtype=torch.bool), held[:-1]])
    assert (visible.sum(-1) == budget).any(), "the budget must bind"
    visible |= torch.eye(length, dtype=torch.bool)

    def op(q, k, v):
        return [attend_new(q, k, v, keep, scores, budget)]

    def reference(q, k, v):
        return [masked_attention(q, k, v, visible)]

    assert_same_function(op, reference, attention_inputs(length), dtype, ["out"])


@DTYPES
@pytest.mark.parametrize("number", [1, 9, 17, 40])
@pytest.mark.parametrize("setting", ["row", "packed", "budget", "cached"])
def test_the_last_queries_alone_get_what_they_get_among_all(setting, number, dtype, monkeypatch):
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 8)
    length, width = 40, 6
    keep, scores = torch.rand(2, length, 2) < 0.6, torch.rand(2, length, 2)
    budget = 7 if setting in ("budget", "cached") else None
    seq_idx = documents([3, 20, 17], 2) if setting == "packed" else None
    inputs, cached = attention_inputs(length), None
    if setting == "cached":
        inputs |= {"k_held": torch.randn(2, 2, width, 4), "v_held": torch.randn(2, 2, width, 6)}
        cached = torch.rand(2, 2, width), torch.tensor([[0, 3], [6, 5]])

    assert budget is None or keep.sum(1).min() > budget, "the budget must bind"

    def op(q, k, v, k_held=None, v_held=None, first=length - number):
        held = None if cached is None else KeptColumns(k_held, v_held, *cached)
        return [attend_new(q[:, first:], k, v, keep, scores, budget, held, seq_idx)[:, -number:]]

    assert_same_function(op, functools.partial(op, first=0), inputs, dtype, ["out"])
