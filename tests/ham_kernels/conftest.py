# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures of the kernels' tests: the device, bfloat16, poisoned and huge buffers, tiles, the bound on an error."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def device() -> str:
    """The GPU if there is one; otherwise the CPU, under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="session")
def interpreter_without_idle_work() -> Iterator[None]:
    """More than halves the time of Triton's interpreter without changing its results.

    It patches the functions of the language once per launch and module, not at every call of a device function; makes
    the types once; and skips the checks of overflow, whose outcome only debug mode reads.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language import block_type
    from triton.runtime import interpreter

    plain_launch, plain_replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    builder, done = interpreter.interpreter_builder, set()

    def launch(self, *args, **kwargs):
        done.clear()
        plain_launch(self, *args, **kwargs)

    def replace(function):
        module = id(function.__globals__)
        if module in done:
            return None
        done.add(module)
        return plain_replace(function)

    # Types compare by value, but only scalars have a hash.
    numpy_types, block_types, plain_numpy_type = {}, {}, interpreter._get_np_dtype

    def numpy_type(kind):
        if kind.name not in numpy_types:
            numpy_types[kind.name] = plain_numpy_type(kind)
        return numpy_types[kind.name]

    def with_element_type(block, element):
        key = block.shape, element.name, getattr(element, "address_space", None), getattr(element, "const", None)
        if key not in block_types:
            block_types[key] = block_type(element, block.shape)
        return block_types[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        monkeypatch.setattr(interpreter, "_patch_lang", replace)
        monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type)
        monkeypatch.setattr(block_type, "with_element_ty", with_element_type)
        if not builder.options.debug:
            monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture
def arithmetic_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives Triton's interpreter the arithmetic of a GPU where its own differs.

    The interpreter truncates float32 to bfloat16, multiplies the bits of bfloat16 as integers, and leaves the order of
    a product's sums to BLAS. That order depends on the processor, and on which factor is a transpose, so a backward
    pass would compute other logits than the forward did. With this fixture every product is a chain of fused
    multiply-adds in order, as Triton's float32 products are on a GPU.
    """
    import triton
    from triton.runtime import interpreter

    builder, bfloat16, float32 = interpreter.InterpreterBuilder, triton.language.bfloat16, triton.language.float32
    plain_cast = builder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == float32 and dst_type.scalar == bfloat16:
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, bfloat16)
        return plain_cast(self, src, dst_type)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar == bfloat16:
            a, b = (plain_cast(self, x, float32) for x in (a, b))
        total, left, right = d.data, a.data.astype(np.float64), b.data.astype(np.float64)
        for i in range(left.shape[-1]):
            total = (total + left[..., i, None] * right[..., i, None, :]).astype(d.data.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_fp_trunc", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def poisoned() -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that copies a tensor into the middle of a buffer of NaN and returns the view.

    NaN lies before and after every slice of every dimension, so that a read out of bounds spoils the kernel's output.
    The last dimension stays contiguous; strides and the first address stay multiples of 16 elements if the last size
    is one.
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
def amid_nan() -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that copies a tensor, contiguous and with NaN before and behind it, to differentiate by."""

    def surround(tensor: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((tensor.numel() + 64,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        return buffer[32:-32].view(tensor.shape).copy_(tensor.detach()).detach().requires_grad_()

    return surround


@pytest.fixture
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives sparse prefix attention tiles so small that a hundred tokens need several; on a GPU the shipped ones."""
    from ham_kernels.sparse_prefix_attention import backward, tiles

    if "gpu" not in request.keywords:
        for name, shapes in tiles.TILES.items():
            monkeypatch.setitem(tiles.TILES, name, {key: [(32, 16, 4, 2)] for key in shapes})
            monkeypatch.setitem(tiles.HOPPER_TILES, name, {})
        monkeypatch.setattr(backward, "SELF_ELEMENTS", 512)
    tiles.with_tiles.cache_clear()
    yield
    tiles.with_tiles.cache_clear()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """Records the steps of the loops of sparse prefix attention: (name, start, masked)."""
    from ham_kernels.sparse_prefix_attention import backward, forward
    from ham_kernels.tuning import INTERPRETED

    if not INTERPRETED:
        pytest.skip("only the interpreter's steps can be recorded")
    taken = []

    def recorded(module, name, start, masked):
        step = getattr(module, name)

        def wrapper(*args):
            taken.append((name, int(args[start]), bool(args[masked])))
            return step(*args)

        return wrapper

    for module, name, start, masked in (
        (forward, "_attend", 7, 12),
        (backward, "_add_dq", 9, 14),
        (backward, "_add_dkv", 9, 13),
    ):
        monkeypatch.setattr(module, name, recorded(module, name, start, masked))
    return taken


@pytest.fixture
def last_of(device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A function that makes `[n, ...]` with a tensor `[1, ...]` as its last entry, and never touches the rest.

    Triton's interpreter then runs only the last program of every grid, so that buffers of gigabytes and grids of
    millions, whose last addresses do not fit 32 bits, cost next to nothing.
    """
    if device != "cpu":
        pytest.skip("needs the interpreter: a GPU runs all programs and holds all memory")
    import triton
    from triton.runtime import interpreter

    plain_call = interpreter.GridExecutor.__call__

    def run_last(self, *args, **kwargs):
        last, self.grid = [size - 1 for size in self.grid], (1,)

        def program_id(builder, axis):
            return interpreter.TensorHandle(np.array([last[axis]], dtype=np.int32), triton.language.int32)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program_id)
        plain_call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last)

    def enlarge(n: int, x: torch.Tensor) -> torch.Tensor:
        try:
            out = torch.empty(n, *x.shape[1:], dtype=x.dtype)
        except RuntimeError as error:
            pytest.skip(f"this machine does not reserve so much memory, touched or not: {error}")
        out[-1:] = x
        return out

    return enlarge


# With fewer errors than this their spread means little: one number may be exact by luck.
FEWEST_NUMBERS = 32
# The largest of a few thousand normal errors is about this many times their root mean square.
LARGEST_BY_SPREAD = 4.0


@pytest.fixture
def assert_error_within() -> Callable[..., None]:
    """A function that bounds a kernel's error by that of the same maths in PyTorch, both against float64.

    The baseline's error is a sample too, drawn by the order in which this machine's BLAS adds up. Its largest error
    alone, over few numbers, is luck; the spread of many is not. So the root mean square of the kernel's errors may be
    `factor` times that of the baseline's, and its largest error `factor` times the baseline's largest, or what the
    largest is expected to be at that spread if this is more. The first bound finds what is a little wrong
    everywhere, the second what is wrong somewhere. Errors that share a cause (the running sum of a head's gates)
    count once, so a test needs many numbers from several rows or heads.

    Its arguments: `actual`, what the kernel wrote; `reference64`, the exact result; `baseline`, PyTorch's result at
    the kernel's precision; `factor`, how much more the kernel may err; `name`, for the message. An exact baseline
    leaves one unit in the last place of the root mean square, and four of the largest number.
    """

    def check(
        actual: torch.Tensor,
        reference64: torch.Tensor,
        baseline: torch.Tensor,
        factor: float = 2.0,
        name: str = "",
    ) -> None:
        assert reference64.dtype == torch.float64, f"{name}: the reference is {reference64.dtype}, not float64"
        assert actual.shape == reference64.shape, f"{name}: {list(actual.shape)}, not {list(reference64.shape)}"
        count = actual.numel()
        assert not 0 < count < FEWEST_NUMBERS, f"{name}: {count} numbers are too few, {FEWEST_NUMBERS} are not"
        if not count:
            return
        reference64 = reference64.detach()
        error, usual = (x.detach().to(reference64.device).double() - reference64 for x in (actual, baseline))
        unit = torch.finfo(actual.dtype).eps
        spread = factor * _rms(usual) + unit * _rms(reference64)
        largest = factor * max(_largest(usual), LARGEST_BY_SPREAD * _rms(usual)) + 4 * unit * _largest(reference64)
        # Also false for NaN.
        assert _rms(error) <= spread, f"{name}: off by {_rms(error):.3e} on average, allowed {spread:.3e}"
        assert _largest(error) <= largest, f"{name}: off by {_largest(error):.3e}, allowed {largest:.3e}"

    return check


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()
