# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The seam between PyTorch and the kernels; norms, rotary position embedding and short convolution."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_torchdynamo_exporting

from .routing_ham import widened

try:
    import ham_kernels
except ImportError as error:
    ham_kernels = None  # type: ignore[assignment]
    NO_KERNELS_BECAUSE = str(error)

# Largest head that the kernels take: they hold a whole head in registers.
MAX_KERNEL_HEAD_DIM = 256
# Version of the kernels' arguments that these files use: they travel with a checkpoint, and kernels are installed.
KERNEL_INTERFACE = 3


def exporting() -> bool:
    """True if `torch.export` traces this call in non-strict mode; older Dynamos report an export at every compile."""
    return is_torchdynamo_exporting() and not torch.compiler.is_dynamo_compiling()


def kernel_for(op: str, *tensors: torch.Tensor) -> Callable[..., Any] | None:
    """The kernel that runs `op` on tensors like these, or `None` for PyTorch.

    Falls back to PyTorch on CPU, in float64, for heads wider than `MAX_KERNEL_HEAD_DIM` and under `torch.export`.
    """
    if exporting():
        return None
    device = tensors[0].device
    if device.type != "cuda" or any(x.dtype == torch.float64 or x.shape[-1] > MAX_KERNEL_HEAD_DIM for x in tensors):
        return None
    problem = NO_KERNELS_BECAUSE if ham_kernels is None else _kernel_problem(device)
    if problem is None:
        return getattr(ham_kernels, op)
    _warn_without_kernels(problem)
    return None


def _kernel_problem(device: torch.device) -> str | None:
    """The reason why the installed kernels do not serve these files on a GPU; `None` if they do."""
    if hasattr(ham_kernels, "INTERFACE"):
        return ham_kernels.platform_problem(device, KERNEL_INTERFACE)
    return f"the installed version of `ham_kernels` is older than version {KERNEL_INTERFACE}, which this code calls"


@functools.cache
def _warn_without_kernels(problem: str) -> None:
    warnings.warn(f"`ham_kernels` is not used on the GPU, PyTorch is, which is slower: {problem}.", stacklevel=4)


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """L2-normalises the last dimension of `x` in float32 or wider; a zero vector stays zero."""
    x = widened(x)
    if _in_own_passes(x):
        return _Normalise.apply(x, None, 1, eps)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides `x` `[..., D]` by the root mean square of its last dimension, and multiplies by `weight` `[D]`."""
    if _in_own_passes(x):
        return _Normalise.apply(x, weight, x.shape[-1], eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _in_own_passes(x: torch.Tensor) -> bool:
    """True if `_Normalise` is used: on a CPU PyTorch's own norm consists of operations that each fill a tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not exporting()


class _Normalise(torch.autograd.Function):
    """`x / sqrt(sum(x^2) / count + eps)` over the last dimension, times a weight; saves its input and one number each.

    Passes write in place where they can: on a CPU new memory costs more than arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, count: int, eps: float) -> torch.Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(count).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.count = count
        out = x * inverse
        return out if weight is None else out.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed, dweight = x * inverse, None
        product = grad * normed
        if weight is not None:
            dweight = product.flatten(0, -2).sum(0)
            product *= weight
        along = product.sum(-1, keepdim=True).div_(ctx.count)
        dx = product.copy_(grad) if weight is None else torch.mul(grad, weight, out=product)
        return dx.addcmul_(normed, along, value=-1).mul_(inverse), dweight, None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: Transformers' `apply_rotary_pos_emb`, with one new tensor instead of five.

    Args:
        x: `[B, T, H, K]`.
        cos, sin: `[B or 1, T, 1, K]`, with equal halves of `K`.

    Returns:
        `[B, T, H, K]`.
    """
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution followed by SiLU, over the real tokens of each row.

    Args:
        x: `[B, T, C]` inputs.
        weight: `[C, W]`; `weight[:, W - 1]` multiplies the current token.
        initial_state: `[B, W - 1, C]` last real inputs before this call, oldest first; zeros if `None`.
        real: `[B, T]` bool, false for padding; `None` if every token is real.
        seq_idx: `[B, T]` int, the document of each token; `None` if each row is one document.

    Returns:
        `[B, T, C]` outputs (unspecified for padding) and `[B, W - 1, C]` final state (unspecified for packed rows).
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, channels)
    new, x = x, torch.cat([initial_state, x], dim=1)
    final_state = x[:, length:].clone() if real is None else convolution_state(new, initial_state, real)
    if real is None and seq_idx is None:
        return _ShortConvolution.apply(x, weight), final_state

    # Entry `r + i` of `order` is the i-th oldest input that the r-th real token reads: the state counts as real.
    real = x.new_ones(batch, length, dtype=torch.bool) if real is None else real
    order = _real_first(real, width - 1)
    rank = (real.cumsum(1) - 1).clamp(min=0)
    out = torch.zeros_like(x[:, :length])
    for i in range(width):
        source = order.gather(1, rank + i)
        tap = x.gather(1, source[..., None].expand(-1, -1, channels))
        if seq_idx is not None:
            document = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=1).gather(1, source)
            tap = tap.masked_fill((document != seq_idx)[..., None], 0)
        out = torch.addcmul(out, tap, weight[:, i])
    return F.silu(out), final_state


class _ShortConvolution(torch.autograd.Function):
    """`short_convolution` of `[B, W - 1 + T, C]`, for rows of real tokens of one document.

    It saves no `[B, T, C]` output for the backward pass: convolving again is faster than filling new memory.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.silu(_convolve(x, weight.T.contiguous()), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        taps, length = weight.T.contiguous(), grad.shape[1]
        product = _convolve(x, taps)
        grad = torch.ops.aten.silu_backward(grad, product)
        dx, dtaps = grad.new_zeros(x.shape), torch.empty_like(taps)
        for i, tap in enumerate(taps):
            span = slice(i, i + length)
            dx[:, span].addcmul_(grad, tap)
            dtaps[i] = torch.mul(x[:, span], grad, out=product).sum((0, 1))
        return dx, dtaps.T


def _convolve(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """`[B, T, C]` sums of `W` neighbours in `[B, W - 1 + T, C]`, weighted by taps `[W, C]`."""
    length = x.shape[1] - len(taps) + 1
    out = x[:, :length] * taps[0]
    for i in range(1, len(taps)):
        out.addcmul_(x[:, i : i + length], taps[i])
    return out


def convolution_state(x: torch.Tensor, initial_state: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The last `W - 1` real inputs `[B, W - 1, C]` after `x` `[B, T, C]` follows `initial_state` `[B, W - 1, C]`."""
    width = initial_state.shape[1]
    extended = torch.cat([initial_state, x[:, -width:] if real is None else x], dim=1)
    if real is None:
        return extended[:, extended.shape[1] - width :].clone()
    last = real.sum(1, keepdim=True) + torch.arange(width, device=x.device)
    source = _real_first(real, width).gather(1, last)
    return extended.gather(1, source[..., None].expand(-1, -1, x.shape[2]))


def _real_first(real: torch.Tensor, width: int) -> torch.Tensor:
    """Indices `[B, width + T]` into state and tokens, real ones first and in order; all of the state is real."""
    padding = ~F.pad(real, (width, 0), value=True)
    return padding.to(torch.uint8).argsort(dim=1, stable=True)


def decode_kernel(op: str, state: torch.Tensor) -> Callable[..., Any] | None:
    """A kernel that runs one token through a part of a layer in place, or `None` for PyTorch.

    It has no backward and no mixed precision.

    Args:
        op: `"decode_update"`, the part before attention, or `"decode_mix_append"`, the part after it.
        state: `[B, Hk, K, V]` recurrent state of the layer.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(state.device.type):
        return None
    return kernel_for(op, state, state.mT)


__all__ = [
    "convolution_state",
    "decode_kernel",
    "exporting",
    "kernel_for",
    "l2norm",
    "rms_norm",
    "rotated",
    "short_convolution",
]
