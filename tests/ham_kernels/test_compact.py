# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compaction of kept tokens: values, counts and gradients against boolean indexing."""

import pytest
import torch

pytest.importorskip("triton")

from ham_kernels import compact


@pytest.fixture(params=[64, None], ids=["small tiles", "shipped tiles"])
def tiles(request, monkeypatch):
    """Small tiles make several chunks of a hundred tokens."""
    if request.param:
        monkeypatch.setattr(compact, "TILE_ELEMENTS", request.param)


def random_keep(length, device, heads=3):
    """Two rows with heads that keep about half, all and nothing."""
    keep = torch.rand(2, length, heads, device=device) < 0.5
    keep[:, :, 1], keep[0, :, 2] = True, False
    return keep


def assert_compacted(x, keep, out, columns):
    """Kept rows in order, zeros behind them."""
    assert out.shape == (keep.shape[0], keep.shape[2], columns, x.shape[3])
    assert out.dtype == x.dtype
    for b in range(keep.shape[0]):
        for h in range(keep.shape[2]):
            rows = x[b, keep[b, :, h], h][:columns]
            torch.testing.assert_close(out[b, h, : len(rows)], rows, rtol=0, atol=0)
            assert not out[b, h, len(rows) :].any()


@pytest.mark.parametrize("length", [1, 31, 97])
def test_kept_tokens_in_order(length, tiles, device, poisoned):
    keep = random_keep(length, device)
    k = poisoned(torch.randn(2, length, 3, 48, device=device).bfloat16())
    v = poisoned(torch.randn(2, length, 3, 17, device=device))
    position = torch.arange(length, device=device).view(1, -1, 1, 1).expand(2, -1, 3, 1)
    outs, before = compact.compact_kept(keep, k, v, position)
    assert before.dtype == torch.int64
    assert torch.equal(before, keep.cumsum(1) - keep.long())
    for x, out in zip((k, v, position), outs, strict=True):
        assert_compacted(x, keep, out, length)


def test_tiles_of_the_test_make_several_chunks(tiles):
    block_t, _ = compact._tile(3)
    assert block_t in (16, 1024)


@pytest.mark.parametrize("capacity", [0, 5, 40, 70])
def test_a_capacity_is_the_number_of_columns(capacity, tiles, device, monkeypatch):
    keep = random_keep(50, device)
    x = torch.randn(2, 50, 3, 16, device=device, requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "max", None)  # the host would wait for it
    (out,), before = compact.compact_kept(keep, x, capacity=capacity)
    assert_compacted(x, keep, out, capacity)
    if capacity:
        (grad,) = torch.autograd.grad(out.sum(), x)
        expected = keep & (before < capacity)
        assert torch.equal(grad, expected[..., None].expand_as(x).float())


@pytest.mark.parametrize("length", [1, 97])
def test_gradients_return_to_the_kept_tokens(length, tiles, device):
    keep = random_keep(length, device)
    x = torch.randn(2, length, 3, 24, device=device, requires_grad=True)
    y = torch.randn(2, 3, length, 5, device=device).transpose(1, 2).requires_grad_()
    score = torch.randn(2, length, 3, 1, device=device)
    (x_kept, y_kept, _), before = compact.compact_kept(keep, x, y, score)
    gx = torch.randn(x_kept.shape[:2] + x_kept.shape[:1:-1], device=device).transpose(2, 3)
    gy = torch.randn_like(y_kept)
    dx, dy = torch.autograd.grad((x_kept, y_kept), (x, y), (gx, gy))
    for grad, given in ((dx, gx), (dy, gy)):
        expected = torch.zeros_like(grad)
        for b, t, h in keep.nonzero().tolist():
            expected[b, t, h] = given[b, h, before[b, t, h]]
        torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_a_tensor_whose_output_is_not_used_has_no_gradient(device):
    keep = random_keep(9, device)
    x, y = (torch.randn(2, 9, 3, 4, device=device, requires_grad=True) for _ in range(2))
    (x_kept, _), _ = compact.compact_kept(keep, x, y)
    x_kept.sum().backward()
    assert torch.equal(x.grad, keep[..., None].expand_as(x).float())
    assert y.grad is None


def test_nothing_kept_and_no_tokens(device):
    x = torch.randn(2, 7, 3, 8, device=device, requires_grad=True)
    (out,), before = compact.compact_kept(torch.zeros(2, 7, 3, dtype=torch.bool, device=device), x)
    assert out.shape == (2, 3, 0, 8)
    assert not before.any()
    (out * 2).sum().backward()
    assert not x.grad.any()
    (out,), before = compact.compact_kept(torch.zeros(2, 0, 3, dtype=torch.bool, device=device), x[:, :0], capacity=4)
    assert out.shape == (2, 3, 4, 8)
    assert before.shape == (2, 0, 3)


def test_tokens_that_lie_two_billion_elements_apart(tiles, device):
    """The last token's offset does not fit 32 bits; only the tokens' own storage is ever touched.

    As much storage lies before the first token: a negative offset must find a wrong value, not crash.
    """
    stride = 2**29
    storage = torch.empty(8 * stride + 16, dtype=torch.int8, device=device)
    x = storage.as_strided((1, 5, 1, 16), (0, stride, 16, 1), 4 * stride)
    x.copy_(torch.arange(80).view(1, 5, 1, 16))
    keep = torch.tensor([True, False, True, True, True], device=device).view(1, 5, 1)
    (compacted,), _ = compact.compact_kept(keep, x)
    assert torch.equal(compacted[0, 0], x[0, keep[0, :, 0], 0])


def test_bad_input(device):
    keep, x = torch.ones(1, 4, 2, dtype=torch.bool, device=device), torch.zeros(1, 4, 2, 8, device=device)
    with pytest.raises(TypeError, match=r"`keep` must be a bool tensor, got torch.int64"):
        compact.compact_kept(keep.long(), x)
    with pytest.raises(ValueError, match=r"`keep` must be \[B, T, Hk\], got \[4, 2\]"):
        compact.compact_kept(keep[0], x)
    with pytest.raises(ValueError, match=r"`tensors\[1\]` must be \[1, 4, 2, 'D'\], got \[1, 3, 2, 8\]"):
        compact.compact_kept(keep, x, x[:, :3])
    with pytest.raises(TypeError, match=r"`tensors\[0\]` must be a tensor, got list"):
        compact.compact_kept(keep, [x])
    with pytest.raises(TypeError, match=r"`capacity` must be an int or None, got 2.5"):
        compact.compact_kept(keep, x, capacity=2.5)
    with pytest.raises(ValueError, match=r"`capacity` must not be negative, got -1"):
        compact.compact_kept(keep, x, capacity=-1)
