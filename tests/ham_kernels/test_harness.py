# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checks the tests' own tools: a kernel that errs must fail its test."""

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
    x = poisoned(torch.randn(40, size, device=device))
    assert_error_within(row_sum(x, True), x.double().sum(1), x.sum(1))


def test_a_kernel_that_reads_out_of_bounds_fails(device, poisoned, assert_error_within):
    plain = torch.randn(40, 5, device=device)
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


def off_by(exact, size):
    """`exact` in float32, with errors of this size and of either sign."""
    return (exact + size * (2 * torch.randint(0, 2, exact.shape) - 1)).float()


def test_the_bound_follows_the_error_of_the_baseline(assert_error_within):
    exact = torch.rand(100, dtype=torch.float64)
    baseline = off_by(exact, 0.01)
    assert_error_within(off_by(exact, 0.019), exact, baseline)
    with pytest.raises(AssertionError, match="on average"):
        assert_error_within(off_by(exact, 0.021), exact, baseline)
    with pytest.raises(AssertionError, match="on average"):
        assert_error_within(off_by(exact, 0.011), exact, baseline, factor=1.0)


def test_one_large_error_is_found_among_many_small_ones(assert_error_within):
    exact = torch.rand(10_000, dtype=torch.float64)
    baseline, actual = off_by(exact, 0.01), off_by(exact, 0.01)
    actual[77] = exact[77] + 0.07
    assert_error_within(actual, exact, baseline)
    actual[77] = exact[77] + 0.09
    with pytest.raises(AssertionError, match="off by 9"):
        assert_error_within(actual, exact, baseline)


def test_an_exact_baseline_leaves_a_unit_in_the_last_place(assert_error_within):
    exact = torch.ones(64, dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps
    assert_error_within(off_by(exact, 0.9 * ulp), exact, exact)
    with pytest.raises(AssertionError, match="on average"):
        assert_error_within(off_by(exact, 2 * ulp), exact, exact)


@pytest.mark.parametrize("actual", [torch.zeros(65), torch.full((64,), torch.nan)], ids=["shape", "NaN"])
def test_the_bound_refuses_wrong_shapes_and_nan(actual, assert_error_within):
    with pytest.raises(AssertionError):
        assert_error_within(actual, torch.zeros(64, dtype=torch.float64), torch.ones(64))


def test_few_numbers_tell_nothing(assert_error_within):
    exact = torch.zeros(31, dtype=torch.float64)
    with pytest.raises(AssertionError, match="31 numbers are too few"):
        assert_error_within(exact.float(), exact, exact.float())
    assert_error_within(*(x.new_empty(0) for x in (exact.float(), exact, exact.float())))


def cut(x, bits):
    """`x` rounded to `bits` after the leading one: 10 for TF32, 7 for bfloat16."""
    scale = 2.0 ** (bits - x.abs().clamp(min=1e-30).log2().floor())
    return (x * scale).round() / scale


def attention(q, k, v, visible, logits_of=torch.matmul, values_of=torch.matmul):
    """Masked softmax attention in parts, so that a test can plant a mistake in one."""
    logits = logits_of(q, k.mT) * q.shape[-1] ** -0.5
    return values_of(logits.masked_fill(~visible, -torch.inf).softmax(-1), v)


def in_another_order(a, b):
    """A product that adds up its terms one by one from the last, unlike BLAS."""
    return sum(a[..., i, None] * b[..., i, None, :] for i in reversed(range(a.shape[-1])))


MISTAKES = {
    "a product in TF32": {"logits_of": lambda q, k: cut(q, 10) @ cut(k, 10)},
    "a product in bfloat16": {"values_of": lambda w, v: cut(w, 7) @ cut(v, 7)},
    "one factor in TF32": {"values_of": lambda w, v: cut(w, 10) @ v},
    "a scale off by 1e-5": {"logits_of": lambda q, k: q @ k * (1 + 1e-5)},
    "outputs off by 1e-5": {"values_of": lambda w, v: w @ v * (1 + 1e-5)},
}


@pytest.mark.parametrize("seed", range(25))
def test_other_sums_pass_and_mistakes_do_not(seed, assert_error_within):
    """Holds at every seed: a bound that fails now and then would be loosened sooner or later."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 4, 40, 24)
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    exact = attention(q.double(), k.double(), v.double(), visible)
    baseline = attention(q, k, v, visible)

    def check(mask=visible, **parts):
        assert_error_within(attention(q, k, v, mask, **parts), exact, baseline)

    check(logits_of=in_another_order, values_of=in_another_order)
    for parts in MISTAKES.values():
        with pytest.raises(AssertionError, match="off by"):
            check(**parts)
    leaking = visible.clone()
    leaking[11, 12] = True
    with pytest.raises(AssertionError, match="off by"):
        check(leaking)
