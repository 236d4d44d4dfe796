# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Tuning of tile shapes, and the check that a GPU and a version of Triton work together."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Version of the arguments of the public functions; another signature is another version.
INTERFACE = 3
# Triton reads the variable when it decorates a kernel, so changing it after the import has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# HAM_KERNELS_TUNING=0 takes every kernel's first tile shape unmeasured, so results are the same bits on every run.
TUNING = not INTERPRETED and os.environ.get("HAM_KERNELS_TUNING", "1") != "0"

SMALLEST_BUCKET = 16


def triton_version() -> tuple[int, ...]:
    """Major, minor and patch number of the installed Triton."""
    numbers = triton.__version__.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in x if c.isdigit()) or 0) for x in numbers)


if triton_version() < (3, 4):
    raise ImportError(
        f"`ham_kernels` needs Triton 3.4 or newer, found {triton.__version__}: older versions need a GPU when a "
        "kernel is defined, so a machine without one could not import it."
    )


def next_bucket(n: int) -> int:
    """Smallest power of two that is at least 16 and at least `n`.

    A kernel whose tuning and compilation depend on the bucket, not on the length, is neither tuned nor compiled again
    while a sequence grows within the bucket.
    """
    return max(SMALLEST_BUCKET, triton.next_power_of_2(n))


def tuned(configs: list[triton.Config], key: list[str], **kwargs: Any) -> Callable[[Any], Any]:
    """Applies `triton.autotune`, but measures nothing under the interpreter or with HAM_KERNELS_TUNING=0.

    Triton's cache keeps the measurements beside the compiled kernels, so another process does not repeat them.

    Args:
        configs: the tile shapes to try; the first is used where nothing is measured.
        key: names of the kernel's arguments; a new value of one starts a new measurement. Do not list a length: pass
            its `next_bucket` as another argument, and list both in `do_not_specialize` of `triton.jit`.
        kwargs: `reset_to_zero`, `restore_value` and the like, as `triton.autotune` takes them.
    """

    def decorate(function: Any) -> Any:
        chosen = configs if TUNING else configs[:1]
        kernel = triton.autotune(configs=chosen, key=key, cache_results=True, **kwargs)(function)
        kernel.tiles = configs  # the tests compare every one with the reference
        return kernel

    return decorate


@dataclass(frozen=True)
class BadPair:
    """GPUs of compute capability `first` to `last` do not work with `since <= triton < fixed`."""

    first: tuple[int, int]
    last: tuple[int, int]
    since: tuple[int, int, int]
    fixed: tuple[int, int, int]
    reason: str


ANY_VERSION, NO_VERSION = (0, 0, 0), (99, 0, 0)
# Hopper with Triton 3.4.0 to 3.7.0 is not listed. That pair silently computes a wrong `tl.dot(tl.trans(x), y)` where
# `x` is a rounded product (flash-linear-attention, issue 640 and pull request 983, which refuses the pair). No kernel
# here has such a product: tests/ham_kernels/test_compile.py searches the compiled code for one.
BAD_PAIRS = (
    BadPair((0, 0), (7, 9), ANY_VERSION, NO_VERSION, "the kernels need compute capability 8.0 or newer"),
    # Products in a recurrence race at 8 warps: flash-linear-attention, issue 1228 and `BLACKWELL_8_WARP_RACE` in its
    # ops/common/chunk_o.py; Triton, issue 10590.
    BadPair((10, 0), (12, 9), ANY_VERSION, (3, 8, 0), "Blackwell GPUs need Triton 3.8 or newer, older versions race"),
    BadPair((13, 0), (99, 9), ANY_VERSION, NO_VERSION, "the kernels know no GPU of this kind"),
)


def known_problem(capability: tuple[int, ...], version: tuple[int, ...]) -> str | None:
    """The reason why a compute capability and a version of Triton do not work together; `None` if they do."""
    for pair in BAD_PAIRS:
        if pair.first <= capability <= pair.last and pair.since <= version < pair.fixed:
            return pair.reason
    return None


@functools.cache
def platform_problem(device: torch.device, interface: int = 1) -> str | None:
    """The reason why the kernels do not serve a caller on this GPU with the installed Triton; `None` if they do.

    Args:
        device: the GPU.
        interface: version of the ops' arguments that the caller uses. Checkpoints carry code that may be older than
            the installed kernels; the oldest gives no version.
    """
    if interface != INTERFACE:
        return (
            f"the model's code calls version {interface} of the kernels, installed is version {INTERFACE}; `import "
            "ham_hf` before the model is loaded, which then runs the package's code"
        )
    if torch.version.hip is not None:
        # Products that ask for a precision do not compile there, and tiles do not fit 64 KiB of shared memory.
        return f"the kernels do not run on AMD GPUs yet (this is {torch.cuda.get_device_name(device)})"
    problem = known_problem(torch.cuda.get_device_capability(device), triton_version())
    return problem and f"{problem} (this is {torch.cuda.get_device_name(device)} with Triton {triton.__version__})"


def check_platform(device: torch.device) -> None:
    """Raises an error for a device on which the kernels cannot run, or would compute wrong numbers.

    Raises:
        ValueError: for a CPU, unless Triton's interpreter is on.
        RuntimeError: for a GPU and a version of Triton that do not work together.
    """
    if INTERPRETED:
        return
    if device.type != "cuda":
        raise ValueError(
            f"`ham_kernels` takes tensors on a CUDA device, got {str(device)!r}; on a CPU it runs only under Triton's "
            "interpreter (set TRITON_INTERPRET=1 before importing triton)."
        )
    problem = platform_problem(device, INTERFACE)
    if problem is not None:
        raise RuntimeError(f"`ham_kernels` does not run here: {problem}.")
