# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the kernels share: where they run, bfloat16, poisoned buffers, and the bound on an error."""

from collections.abc import Callable

import numpy as np
import pytest
import torch


@pytest.fixture
def device() -> str:
    """The GPU if there is one; otherwise the CPU, under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off to bfloat16, and multiplies the integers that it keeps bfloat16 in."""
    import triton
    from triton.runtime import interpreter

    builder, bfloat16, float32 = interpreter.InterpreterBuilder, triton.language.bfloat16, triton.language.float32
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == float32 and dst_type.scalar == bfloat16:
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, bfloat16)
        return plain_cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == bfloat16:
            a, b = (plain_cast(self, x, float32) for x in (a, b))
        return plain_dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_fp_trunc", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def poisoned() -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that copies a tensor into the middle of a buffer of NaN and returns the view.

    NaN lies before and after every slice of every dimension, so whatever a kernel reads out of bounds spoils what it
    writes. The last dimension stays contiguous; strides and the first address stay multiples of 16 elements if the
    last size is one.
    """

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.ndim == 0:
            raise TypeError(f"`tensor` must be floating-point with a dimension, got {tensor.dtype}, {tensor.ndim}")
        margins = [1] * (tensor.ndim - 1) + [16]
        shape = [size + 2 * margin for size, margin in zip(tensor.shape, margins, strict=True)]
        buffer = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
        inside = tuple(slice(margin, margin + size) for size, margin in zip(tensor.shape, margins, strict=True))
        view = buffer[inside]
        view.copy_(tensor)
        return view.detach().requires_grad_(tensor.requires_grad)

    return poison


@pytest.fixture
def assert_error_within() -> Callable[..., None]:
    """A function that bounds a kernel's error by that of the same maths in PyTorch, both against float64.

    Its arguments: `actual`, what the kernel wrote; `reference64`, the exact result; `baseline`, PyTorch's result at
    the kernel's precision; `factor`, how much more the kernel may err; `floor`, what it may err in any case (four
    units in the last place of the largest number, unless given); `name`, for the message.
    """

    def check(
        actual: torch.Tensor,
        reference64: torch.Tensor,
        baseline: torch.Tensor,
        factor: float = 2.0,
        floor: float | None = None,
        name: str = "",
    ) -> None:
        assert reference64.dtype == torch.float64, f"{name}: the reference is {reference64.dtype}, not float64"
        assert actual.shape == reference64.shape, f"{name}: {list(actual.shape)}, not {list(reference64.shape)}"
        if not actual.numel():
            return
        actual, baseline = (x.detach().to(reference64.device) for x in (actual, baseline))
        reference64 = reference64.detach()
        if floor is None:
            floor = 4 * torch.finfo(actual.dtype).eps * reference64.abs().max().item()
        error = (actual.double() - reference64).abs().max().item()
        allowed = factor * (baseline.double() - reference64).abs().max().item() + floor
        assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"  # also false for NaN

    return check
