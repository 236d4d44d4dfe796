# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the kernels share: where they run, poisoned buffers, and the bound on a kernel's error."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The GPU if there is one; otherwise the CPU, under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
