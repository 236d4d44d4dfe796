# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares an operation with its definition in `reference`, in values and in gradients."""

import pytest
import torch

# Absolute tolerances for values of order one. In float32 an operation is compared with its definition in float64.
FORWARD = {torch.float64: 1e-10, torch.float32: 1e-5}
BACKWARD = {torch.float64: 1e-10, torch.float32: 5e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def largest(x):
    """The largest absolute value, 0 for an empty tensor."""
    return x.abs().max().item() if x.numel() else 0.0


def assert_close(actual, expected, tolerance, name=""):
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    error = largest(actual.double() - expected.double())
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed {tolerance:.0e}"  # also false for NaN


def gradients(function, inputs, dtype, seed=0):
    """Outputs of `function(**inputs)` in `dtype` and the gradients of a random projection of all of them.

    The float32 inputs are exact in float64, so both precisions see the same numbers.
    """
    leaves = {
        name: x.to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in outputs)
    names = [name for name, x in leaves.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    if not loss.requires_grad:  # a row of padding only: nothing depends on anything
        return [x.detach() for x in outputs], {name: torch.zeros_like(leaves[name]) for name in names}
    grads = torch.autograd.grad(loss, [leaves[name] for name in names], materialize_grads=True)
    return [x.detach() for x in outputs], dict(zip(names, grads, strict=True))


def assert_same_function(function, reference, inputs, dtype, labels):
    """Outputs and the gradient of every floating-point input agree with a reference in float64."""
    actual, actual_grads = gradients(function, inputs, dtype)
    expected, expected_grads = gradients(reference, inputs, torch.float64)
    for label, x, y in zip(labels, actual, expected, strict=True):
        assert_close(x, y, FORWARD[dtype] * max(1, largest(y)), label)
    for name, grad in actual_grads.items():
        expected_grad = expected_grads[name]
        assert_close(grad, expected_grad, BACKWARD[dtype] * max(1, largest(expected_grad)), f"d{name}")
