# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds rotation, norms and the short convolution to their formulas."""

import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ham_hf.ops_ham import l2norm, rms_norm, rotated, short_convolution
from ham_hf.reference import naive_short_convolution
from tests.ops.comparison import BACKWARD, DTYPES, FORWARD, assert_close, assert_same_function, gradients
from tests.ops.inputs import documents


@DTYPES
@pytest.mark.parametrize("rows", [1, 3], ids=["shared-positions", "positions-of-each-row"])
def test_rotation_is_transformers(rows, dtype):
    """Values and gradients, of queries and keys; the input stays as it was."""
    angles = torch.randn(rows, 7, 4, dtype=torch.float64).repeat(1, 1, 2)
    q, k = torch.randn(3, 7, 4, 8), torch.randn(3, 7, 2, 8)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def ours(q, k):
        return tuple(rotated(x, cos.unsqueeze(2), sin.unsqueeze(2)) for x in (q, k))

    def theirs(q, k):
        return apply_rotary_pos_emb(q, k, angles.cos(), angles.sin(), unsqueeze_dim=2)

    before = q.clone(), k.clone()
    (out, grads), (expected, expected_grads) = (
        gradients(function, {"q": q, "k": k}, precision)
        for function, precision in ((ours, dtype), (theirs, torch.float64))
    )
    for x, y in zip(out, expected, strict=True):
        assert_close(x, y, FORWARD[dtype])
    for name in grads:
        assert_close(grads[name], expected_grads[name], BACKWARD[dtype], name)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 5, 7)])
def test_norms_equal_their_formulas_forward_and_backward(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.double)
    x[0] *= 1e-3  # where eps weighs
    weight = torch.randn(shape[-1], dtype=torch.double)
    inputs, upstream = (x.requires_grad_(), weight.requires_grad_()), torch.randn(shape, dtype=torch.double)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    actual = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(actual, expected)
    of_formula = torch.autograd.grad(expected, inputs, upstream)
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, upstream), of_formula, strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    actual = l2norm(x)
    torch.testing.assert_close(actual, expected)
    ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (actual, expected))
    torch.testing.assert_close(ours, theirs)


def test_l2norm_gives_unit_vectors_and_leaves_zero_alone():
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    x[2] = 0
    y = l2norm(x)
    assert y.dtype == torch.float32
    assert_close(y[[0, 1, 3, 4]].norm(dim=-1), torch.ones(4), 1e-5)
    assert torch.equal(y[2], torch.zeros(7))


PADDINGS = {
    "none": None,
    "left": lambda b, t: torch.arange(t) >= torch.arange(b)[:, None],
    "right": lambda b, t: torch.arange(t) < t - torch.arange(b)[:, None],
    "anywhere": lambda b, t: torch.rand(b, t) < 0.5,
    "everything": lambda b, t: torch.zeros(b, t, dtype=torch.bool),
}


@DTYPES
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_convolution_equals_the_token_loop(width, padding, dtype):
    batch, channels = 4, 5
    for length, with_state in itertools.product([1, 2, 3, 4, 17], [False, True]):
        real = PADDINGS[padding] and PADDINGS[padding](batch, length)
        inputs = {
            "x": torch.randn(batch, length, channels),
            "weight": torch.randn(channels, width),
            "initial_state": torch.randn(batch, width - 1, channels) if with_state else None,
            "real": real,
        }

        def op(x, weight, initial_state, real):
            out, state = short_convolution(x, weight, initial_state, real)
            return (out if real is None else out * real[..., None]), state  # outputs of padding are unspecified

        assert_same_function(op, naive_short_convolution, inputs, dtype, ["out", "final_state"])


@DTYPES
@pytest.mark.parametrize("padding", ["none", "right", "anywhere"])
def test_short_convolution_does_not_cross_documents(padding, dtype):
    batch, channels, lengths = 3, 4, [1, 2, 6, 3]
    real = PADDINGS[padding] and PADDINGS[padding](batch, sum(lengths))
    inputs = {
        "x": torch.randn(batch, sum(lengths), channels),
        "weight": torch.randn(channels, 4),
        "real": real,
        "seq_idx": documents(lengths, batch),
    }

    def op(x, weight, real, seq_idx):
        out = short_convolution(x, weight, None, real, seq_idx)[0]
        return [out if real is None else out * real[..., None]]

    def reference(x, weight, real, seq_idx):
        return [naive_short_convolution(x, weight, None, real, seq_idx)[0]]

    assert_same_function(op, reference, inputs, dtype, ["out"])


def test_short_convolution_ignores_what_padding_holds():
    x, weight, state = torch.randn(3, 9, 4), torch.randn(4, 4), torch.randn(3, 3, 4)
    real = torch.rand(3, 9) < 0.6
    poisoned = x.masked_fill(~real[..., None], torch.nan)
    expected, expected_state = short_convolution(x, weight, state, real)
    actual, actual_state = short_convolution(poisoned, weight, state, real)
    assert torch.equal(actual[real], expected[real])
    assert torch.equal(actual_state, expected_state)


def test_short_convolution_in_pieces_equals_one_call():
    x, weight = torch.randn(2, 11, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    real = torch.rand(2, 11) < 0.7
    whole, whole_state = short_convolution(x, weight, None, real)
    pieces, state = [], None
    for part, mask in zip(x.split([1, 2, 5, 1, 2], 1), real.split([1, 2, 5, 1, 2], 1), strict=True):
        out, state = short_convolution(part, weight, state, mask)
        pieces.append(out)
    assert_close(torch.cat(pieces, 1)[real], whole[real], 1e-14)
    assert torch.equal(state, whole_state)
