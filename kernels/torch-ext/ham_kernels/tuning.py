# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Which tile shapes a kernel runs with, when they are measured, and where the kernels refuse to run."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Triton reads the variable when a kernel is decorated, so what held at import holds for good.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# HAM_KERNELS_TUNING=0 takes every kernel's first tile shape: nothing is measured, and roundings never differ.
TUNING = not INTERPRETED and os.environ.get("HAM_KERNELS_TUNING", "1") != "0"

SMALLEST_BUCKET = 16


def triton_version() -> tuple[int, ...]:
    """Major, minor and patch number of the installed Triton."""
    numbers = triton.__version__.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in x if c.isdigit()) or 0) for x in numbers)


if triton_version() < (3, 4):
    raise ImportError(
        f"`ham_kernels` needs Triton 3.4 or newer, found {triton.__version__}: older ones ask for a GPU when a "
        "kernel is defined, so a machine without one could not import it."
    )


def next_bucket(n: int) -> int:
    """The power of two, at least 16, that stands for every length from above its half up to itself.

    A kernel that is tuned, or compiled, by the bucket of a length instead of the length does neither again when a
    sequence grows within the bucket.
    """
    return max(SMALLEST_BUCKET, triton.next_power_of_2(n))


def tuned(configs: list[triton.Config], key: list[str], **kwargs: Any) -> Callable[[Any], Any]:
    """`triton.autotune`, except that nothing is measured under the interpreter or with HAM_KERNELS_TUNING=0.

    What was measured is kept with what was compiled, in Triton's cache: another process does not measure it again.

    Args:
        configs: the tile shapes to try; the first is the one taken unmeasured.
        key: the kernel's arguments whose values ask for a new measurement. A length is not among them: pass its
            `next_bucket` as an argument of its own, and list both in `do_not_specialize` of `triton.jit`.
        kwargs: `reset_to_zero`, `restore_value` and the like, as `triton.autotune` takes them.
    """

    def decorate(function: Any) -> Any:
        chosen = configs if TUNING else configs[:1]
        kernel = triton.autotune(configs=chosen, key=key, cache_results=True, **kwargs)(function)
        kernel.tiles = configs  # for the tests, which hold every one of them to the reference
        return kernel

    return decorate


@dataclass(frozen=True)
class BadPair:
    """GPUs of compute capability `first` to `last` are not to be used with `since <= triton < fixed`."""

    first: tuple[int, int]
    last: tuple[int, int]
    since: tuple[int, int, int]
    fixed: tuple[int, int, int]
    reason: str


ANY_VERSION, NO_VERSION = (0, 0, 0), (99, 0, 0)
# Hopper with Triton 3.4.0 to 3.7.0 is not among them. That pair computes `tl.dot(tl.trans(x), y)` wrongly, and without
# an error, where `x` is a rounded product (flash-linear-attention, issue 640 and pull request 983, which refuses it).
# No kernel here has such a product: tests/ham_kernels/test_compile.py looks for one in what is compiled.
BAD_PAIRS = (
    BadPair((0, 0), (7, 9), ANY_VERSION, NO_VERSION, "the kernels need compute capability 8.0 or newer"),
    # Products in a recurrence race at 8 warps: flash-linear-attention, issue 1228 and `BLACKWELL_8_WARP_RACE` in its
    # ops/common/chunk_o.py; Triton, issue 10590.
    BadPair((10, 0), (12, 9), ANY_VERSION, (3, 8, 0), "Blackwell GPUs need Triton 3.8 or newer, others race"),
)


def known_problem(capability: tuple[int, ...], version: tuple[int, ...]) -> str | None:
    """Why a GPU of this compute capability and this version of Triton do not work together; `None` if they do."""
    for pair in BAD_PAIRS:
        if pair.first <= capability <= pair.last and pair.since <= version < pair.fixed:
            return pair.reason
    return None


@functools.cache
def platform_problem(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU with this version of Triton; `None` if they do."""
    if torch.version.hip is not None:
        return None  # compute capabilities are NVIDIA's
    problem = known_problem(torch.cuda.get_device_capability(device), triton_version())
    return problem and f"{problem} (this is {torch.cuda.get_device_name(device)} with Triton {triton.__version__})"


def check_platform(device: torch.device) -> None:
    """Refuses devices on which the kernels cannot run, or are known to compute wrong numbers.

    Raises:
        ValueError: for a CPU, unless Triton's interpreter is on.
        RuntimeError: for a GPU and a version of Triton that do not work together.
    """
    if INTERPRETED:
        return
    if device.type != "cuda":
        raise ValueError(
            f"`ham_kernels` takes tensors on a CUDA device, got {str(device)!r}; on a CPU it runs under Triton's "
            "interpreter only (TRITON_INTERPRET=1, set before triton is imported)."
        )
    problem = platform_problem(device)
    if problem is not None:
        raise RuntimeError(f"`ham_kernels` does not run here: {problem}.")
