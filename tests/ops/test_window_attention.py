# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention with a window equals the dense masked softmax, over new tokens and over a store."""

import pytest
import torch

from ham_hf import prefix_attention_ham
from ham_hf.attention_ham import attend_new, ragged_decode_attention, window_starts
from ham_hf.cache_layer_ham import HAMCacheLayer
from ham_hf.layer_step_ham import LayerStep
from ham_hf.reference import naive_ragged_decode_attention, naive_sparse_attention, naive_surviving_tokens
from tests.ops.comparison import DTYPES, assert_close, assert_same_function
from tests.ops.inputs import attention_inputs, documents, masked_attention

KEPT = {"nothing": 0.0, "everything": 1.0, "some": torch.tensor([0.05, 0.9])}
WINDOWS = [0, 1, 2, 5, 64, 1000]


def padded(batch, length, where):
    """`[B, T]` bool, false for padding on the left, on the right or anywhere."""
    real = torch.ones(batch, length, dtype=torch.bool)
    if where == "left":
        real[0, : length // 3] = False
    elif where == "inside":
        real[:, 1:-1] = torch.rand(batch, max(0, length - 2)) < 0.7
    return real


@DTYPES
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("length", [1, 7, 150])
def test_equals_the_dense_softmax(length, kept, window, dtype, monkeypatch):
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 16)
    inputs = attention_inputs(length)
    keep = torch.rand(2, length, 2) < KEPT[kept]
    scores = torch.ones(2, length, 2)
    assert_same_function(
        lambda q, k, v: [attend_new(q, k, v, keep, scores, window=window)],
        lambda q, k, v: [naive_sparse_attention(q, k, v, keep, window=window)[0]],
        inputs,
        dtype,
        ["out"],
    )


@pytest.mark.parametrize("where", ["left", "inside"])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_padding_is_neither_seen_nor_counted(window, where, monkeypatch):
    monkeypatch.setattr(prefix_attention_ham, "QUERY_BLOCK", 16)
    length = 70
    inputs, real = attention_inputs(length), padded(2, length, where)
    keep = (torch.rand(2, length, 2) < 0.3) & real[..., None]
    scores = torch.ones(2, length, 2)
    assert_same_function(
        lambda q, k, v: [attend_new(q, k, v, keep, scores, window=window, real=real)[real]],
        lambda q, k, v: [naive_sparse_attention(q, k, v, keep, window=window, real=real)[0][real]],
        inputs,
        torch.float64,
        ["out"],
    )


@pytest.mark.parametrize("window", [1, 5, 64])
def test_no_window_reaches_into_the_document_before(window):
    seq_idx = documents([20, 1, 30, 4], 2)
    inputs, keep = attention_inputs(55), torch.rand(2, 55, 2) < 0.3
    scores = torch.ones(2, 55, 2)
    assert_same_function(
        lambda q, k, v: [attend_new(q, k, v, keep, scores, seq_idx=seq_idx, window=window)],
        lambda q, k, v: [naive_sparse_attention(q, k, v, keep, seq_idx=seq_idx, window=window)[0]],
        inputs,
        torch.float64,
        ["out"],
    )


def test_the_last_queries_alone_have_the_outputs_of_all():
    inputs, keep, scores = attention_inputs(60), torch.rand(2, 60, 2) < 0.3, torch.rand(2, 60, 2)
    for budget in (None, 20):
        whole = attend_new(**inputs, keep=keep, scores=scores, budget=budget, window=6)
        last = attend_new(inputs["q"][:, -7:], inputs["k"], inputs["v"], keep, scores, budget, window=6)
        assert_close(last, whole[:, -7:], 1e-6)


@pytest.mark.parametrize("where", ["nowhere", "left", "inside"])
@pytest.mark.parametrize("window", [1, 4, 11])
def test_a_budget_evicts_what_leaves_the_window(window, where):
    length, budget = 40, 14
    inputs, real = attention_inputs(length), padded(2, length, where)
    keep = (torch.rand(2, length, 2) < 0.7) & real[..., None]
    scores = torch.rand(2, length, 2)
    visible = torch.zeros(2, 2, length, length, dtype=torch.bool)
    for b in range(2):
        tokens = real[b].nonzero()[:, 0]
        for head in range(2):
            held = naive_surviving_tokens(scores[b, tokens, head], keep[b, tokens, head], budget, window)
            for i in range(1, len(tokens)):
                visible[b, head, tokens[i], tokens[held[i - 1]]] = True
            assert (held.sum(1) <= budget).all()
    visible |= torch.eye(length, dtype=torch.bool)
    out = attend_new(**inputs, keep=keep, scores=scores, budget=budget, window=window, real=real)
    expected = masked_attention(*inputs.values(), visible)
    assert_close(out[real], expected[real], 1e-5)


@pytest.mark.parametrize("window", [2, 6, 40, 300])
@pytest.mark.parametrize("cuts", [[100, 1, 1, 1], [3, 2, 60, 5, 30], [1] * 50], ids=str)
@pytest.mark.parametrize("budget", [None, 350])
def test_a_layer_in_pieces_attends_as_over_the_whole(cuts, window, budget):
    length = sum(cuts)
    inputs = attention_inputs(length)
    real = torch.ones(2, length, dtype=torch.bool)
    real[1, : cuts[0] - 1] = False
    real[1, -1] = len(cuts) != 4  # the last single step of the second row is padding
    keep = (torch.rand(2, length, 2) < torch.tensor([0.1, 0.8])) & real[..., None]
    scores, positions = torch.rand(2, length, 2), real.cumsum(1) - 1
    expected, _ = naive_sparse_attention(*inputs.values(), keep, window=window, real=real)
    layer, start = HAMCacheLayer(window), 0
    for cut in cuts:
        part = slice(start, start + cut)
        q, k, v = (x[:, part] for x in inputs.values())
        out = layer.attend(q, k, v, keep[:, part], scores[:, part], budget, real[:, part])
        assert_close(out[real[:, part]], expected[:, part][real[:, part]], 1e-5)
        step = LayerStep(
            positions[:, part].clamp(min=0),
            real[:, part],
            keys=k,
            values=v,
            scores=scores[:, part],
            keep=keep[:, part],
        )
        layer.update(step, budget)
        start += cut
    kept = [x.tolist() for x in layer.kept_positions()]
    assert kept == [positions[b, keep[b, :, h]].tolist() for b in range(2) for h in range(2)]
    assert layer.kept_tokens().flatten().tolist() == [len(x) for x in kept]
    last = real.sum(1)[:, None] - torch.tensor([min(window - 1, int(n)) for n in real.sum(1)])[:, None]
    held = keep.sum(1) + (~keep & real[..., None] & (positions >= last)[..., None]).sum(1)
    assert torch.equal(layer.held_tokens(), held)


@pytest.mark.parametrize("new", [1, 4])
def test_gradients_on_a_filled_layer_outlive_its_growth(new):
    inputs = {name: x.double() for name, x in attention_inputs(30 + new).items()}
    keep, scores = torch.rand(2, 30 + new, 2) < 0.5, torch.rand(2, 30 + new, 2)
    layer = HAMCacheLayer(6)

    def step(part):
        tokens = {"keys": inputs["k"][:, part], "values": inputs["v"][:, part]}
        tokens |= {"scores": scores[:, part], "keep": keep[:, part]}
        return LayerStep(torch.arange(30 + new)[part].expand(2, -1), **tokens)

    def cached(**x):
        out = layer.attend(*x.values(), keep[:, -new:], scores[:, -new:], None)
        layer.update(step(slice(30, 30 + new)))
        layer.update(step(slice(0, 30)))
        return [out]

    def dense(**x):
        joined = (torch.cat([inputs[name][:, :30], y], 1) for name, y in x.items())
        return [naive_sparse_attention(*joined, keep, window=6)[0][:, -new:]]

    layer.update(step(slice(0, 30)))
    last = {name: x[:, 30:].clone() for name, x in inputs.items()}
    assert_same_function(cached, dense, last, torch.float64, ["out"])


@pytest.mark.parametrize("fill", [[0, 0, 0], [3, 0, 7], [7, 7, 7]], ids=str)
def test_one_token_reads_its_window_beside_the_pages(fill):
    q, k, v = torch.randn(3, 1, 2, 8).double(), torch.randn(3, 1, 8).double(), torch.randn(3, 1, 5).double()
    pages = [(torch.randn(2, 4, 8).double(), torch.randn(2, 4, 5).double(), torch.tensor([2, 0]))]
    tail = (torch.randn(3, 4, 8).double(), torch.randn(3, 4, 5).double(), torch.tensor([0, 3, 1]))
    recent = (torch.randn(3, 7, 8).double(), torch.randn(3, 7, 5).double(), torch.tensor(fill))
    keep = torch.ones(3, 1, dtype=torch.bool)
    expected = naive_ragged_decode_attention(q, k, v, keep, pages, tail, recent=recent)
    # Whatever lies in slots that are not in use is never read.
    for x, n in ((x, recent[2]) for x in recent[:2]):
        x[torch.arange(7) >= n[:, None]] = 1e30
    assert_close(ragged_decode_attention(q, k, v, keep, pages, tail, recent=recent), expected, 1e-10)
    with pytest.raises(ValueError, match="`recent` must be None for more than one new token, got 2 tokens"):
        ragged_decode_attention(
            *(x.repeat(1, 2, *[1] * (x.ndim - 2)) for x in (q, k, v, keep)), pages, tail, recent=recent
        )


@pytest.mark.parametrize("window", [1, 3, 100])
def test_where_windows_start(window):
    real = torch.rand(3, 30) < 0.6
    seq_idx = documents([9, 21], 3)
    start = window_starts(window, 3, 30, torch.device("cpu"), real, seq_idx)
    for b in range(3):
        for t in range(30):
            own = [j for j in range(t) if real[b, j] and seq_idx[b, j] == seq_idx[b, t]]
            last = own[len(own) - (window - 1) :] if window > 1 and real[b, t] else []
            shown = [j for j in range(int(start[b, t]), t) if real[b, j]]
            if real[b, t]:
                assert shown == last
    assert (start.diff(dim=1) >= 0).all()
    assert (start <= torch.arange(30)).all()
