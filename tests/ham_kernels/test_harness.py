# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds the tests' own tools to what they promise: a kernel that errs must fail its test."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def row_sum_kernel(x, out, stride, size, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if MASKED:
        values = tl.load(x + row * stride + column, mask=column < size, other=0.0)
    else:
        values = tl.load(x + row * stride + column)
    tl.store(out + row, tl.sum(values, 0))


def row_sum(x, masked):
    out = torch.empty(x.shape[0], device=x.device)
    row_sum_kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], triton.next_power_of_2(x.shape[1]), masked)
    return out


@pytest.mark.parametrize("size", [5, 13, 16])
def test_a_kernel_within_its_bounds_passes(size, device, poisoned, assert_error_within):
    x = poisoned(torch.randn(3, size, device=device))
    assert_error_within(row_sum(x, True), x.double().sum(1), x.sum(1))


def test_a_kernel_that_reads_out_of_bounds_fails(device, poisoned, assert_error_within):
    plain = torch.randn(3, 5, device=device)
    x = poisoned(plain)
    with pytest.raises(AssertionError, match="off by nan"):
        assert_error_within(row_sum(x, False), x.double().sum(1), x.sum(1))


def test_poison_surrounds_every_slice(poisoned):
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16).requires_grad_()
    view = poisoned(x)
    assert torch.equal(view, x)
    assert view.requires_grad
    assert view.is_leaf
    assert view.stride(-1) == 1
    assert all(step % 16 == 0 for step in (*view.stride()[:-1], view.storage_offset()))
    buffer = view.detach().as_strided((view.untyped_storage().nbytes() // 2,), (1,), 0)
    assert buffer.isnan().sum() == buffer.numel() - x.numel()
    first = view.detach()[1, 2].storage_offset()
    assert buffer[first - 1].isnan()
    assert buffer[first + 16].isnan()


@pytest.mark.parametrize("tensor", [torch.arange(3), torch.tensor(1.0)], ids=["integer", "no dimension"])
def test_poison_refuses_what_nan_cannot_fill(tensor, poisoned):
    with pytest.raises(TypeError, match="floating-point"):
        poisoned(tensor)


def test_the_bound_follows_the_error_of_the_baseline(assert_error_within):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    baseline = (exact + 0.01).float()
    assert_error_within((exact + 0.019).float(), exact, baseline)
    with pytest.raises(AssertionError, match="off by"):
        assert_error_within((exact + 0.021).float(), exact, baseline)
    with pytest.raises(AssertionError, match="off by"):
        assert_error_within((exact + 0.011).float(), exact, baseline, factor=1.0)
    assert_error_within((exact + 0.5).float(), exact, exact, floor=0.6)


def test_an_exact_baseline_leaves_a_few_units_in_the_last_place(assert_error_within):
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps * 4
    assert_error_within((exact + 3 * ulp).float(), exact, exact)
    with pytest.raises(AssertionError, match="off by"):
        assert_error_within((exact + 6 * ulp).float(), exact, exact)


@pytest.mark.parametrize("actual", [torch.zeros(3), torch.full((2,), torch.nan)], ids=["shape", "NaN"])
def test_the_bound_refuses_wrong_shapes_and_nan(actual, assert_error_within):
    with pytest.raises(AssertionError):
        assert_error_within(actual, torch.zeros(2, dtype=torch.float64), torch.zeros(2), floor=9.0)
