# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The public function, its autograd function, and the check of their arguments."""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..tuning import check_platform
from .backward import sparse_prefix_attention_bwd
from .forward import sparse_prefix_attention_fwd
from .tiles import LOG2E

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**24  # rows of a group, counted in 32 bits


class SparsePrefixAttentionFunction(torch.autograd.Function):
    """`sparse_prefix_attention` for at least one query, with the kernels' base-2 log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_kept: torch.Tensor,
        v_kept: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        until: torch.Tensor | None,
        scale: float,
        window_start: torch.Tensor | None,
        shown_until: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns outputs and log-sum-exp; saves the inputs and all sums for the backward pass."""
        q, k, v, k_kept, v_kept, begin, end = (x.contiguous() for x in (q, k, v, k_kept, v_kept, begin, end))
        until, window_start, shown_until = (
            None if x is None else x.contiguous() for x in (until, window_start, shown_until)
        )
        o, *sums = sparse_prefix_attention_fwd(
            q, k, v, k_kept, v_kept, begin, end, until, scale, window_start, shown_until
        )
        ctx.save_for_backward(q, k, v, k_kept, v_kept, begin, end, until, window_start, shown_until, o, *sums)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o, sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the five differentiable tensors."""
        o = ctx.saved_tensors[10]
        do = torch.zeros_like(o) if do is None else do.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        grads = sparse_prefix_attention_bwd(*ctx.saved_tensors, do, dlse, ctx.scale)  # type: ignore[call-arg]
        return *grads, *(None,) * 6


def _check(floats: dict[str, Any], ints: dict[str, Any], real: torch.Tensor | None) -> None:
    q, arguments = floats["q"], floats | ints | {"real": real}
    for name, x in arguments.items():
        if name in ("until", "window_start", "real") and x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")
        if name in floats and (x.dtype not in DTYPES or x.dtype != q.dtype):
            raise TypeError(f"`{name}` must be float32, float16 or bfloat16 like `q`, {q.dtype}, got {x.dtype}.")
        if name in ints and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise TypeError(f"`{name}` must be an integer tensor, got {x.dtype}.")
        if name == "real" and x.dtype != torch.bool:
            raise TypeError(f"`real` must be a bool tensor, got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"`{name}` must be on the device of `q`, {q.device}, got {x.device}.")
        dimensions = 4 if name in floats else 2 if name in ("window_start", "real") else 3
        if x.ndim != dimensions:
            raise ValueError(f"`{name}` must have {dimensions} dimensions, got {list(x.shape)}.")
    if real is not None and ints["window_start"] is None:
        raise ValueError("`real` tells which tokens of a window are real and needs `window_start`, got None.")
    batch, length, heads, key_dim = q.shape
    kv_heads, columns, value_dim = floats["k"].shape[2], floats["k_kept"].shape[2], floats["v"].shape[3]
    tokens = length if ints["window_start"] is None else floats["k"].shape[1]
    if tokens < length:
        raise ValueError(f"`k` must have at least the {length} tokens of `q`, got {tokens}.")
    shapes = {
        "k": (batch, tokens, kv_heads, key_dim),
        "v": (batch, tokens, kv_heads, value_dim),
        "k_kept": (batch, kv_heads, columns, key_dim),
        "v_kept": (batch, kv_heads, columns, value_dim),
        "begin": (batch, length, kv_heads),
        "end": (batch, length, kv_heads),
        "until": (batch, kv_heads, columns),
        "window_start": (batch, length),
        "real": (batch, tokens),
    }
    for name, shape in shapes.items():
        x = arguments[name]
        if x is not None and x.shape != shape:
            raise ValueError(
                f"`{name}` must be {list(shape)} to go with `q`, `k`, `v` and `k_kept`, got {list(x.shape)}."
            )
    if kv_heads == 0 or heads % kv_heads or heads == 0:
        raise ValueError(f"`q` must have a multiple of the {kv_heads} heads of `k`, got {heads}.")
    if not (0 < key_dim <= MAX_HEAD_DIM and 0 < value_dim <= MAX_HEAD_DIM):
        raise ValueError(
            f"`q` and `v` must have head dimensions of 1 to {MAX_HEAD_DIM}, got {key_dim} and {value_dim}."
        )
    if max(tokens, columns) > MAX_LENGTH:
        raise ValueError(f"`k` and `k_kept` must have at most {MAX_LENGTH} tokens, got {tokens} and {columns}.")


def sparse_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    until: torch.Tensor | None = None,
    scale: float | None = None,
    window_start: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each query over a span of compacted kept tokens, a window of the last ones, and itself.

    Work is proportional to the spans and the windows, memory to `L`. Differentiable in `q`, `k`, `v`, `k_kept` and
    `v_kept`, also through the log-sum-exp. Columns outside `begin[:, 0] <= c < end[:, -1]`, and tokens before
    `window_start[:, 0]` that no query owns, are never read and may hold anything.

    Args:
        q: `[B, T, H, K]` queries in float32, float16 or bfloat16; `H` is a multiple of `Hk`; `K` is at most 256.
        k, v: `[B, L, Hk, K]` and `[B, L, Hk, V]`, the tokens' own keys and values, in the dtype of `q`; under autocast
            all five are cast. Query `t` always sees its own token `L - T + t`. `L` is `T` without `window_start`.
        k_kept, v_kept: `[B, Hk, M, K]` and `[B, Hk, M, V]` compacted keys and values, in the dtype of `q`.
        begin, end: `[B, T, Hk]` int, query `t` sees columns `begin <= c < min(end, M)`; both must not fall along `T`.
        until: `[B, Hk, M]` int, only queries `t < until` see column `c`; `None` if nothing is ever evicted.
        scale: positive factor of the logits; `K ** -0.5` if `None`.
        window_start: `[B, T]` int, query `t` also sees the tokens `window_start <= j < L - T + t` of `k` and `v`, none
            of which may be among the columns that it sees; it must not fall along `T`; `None` for no window.
        real: `[B, L]` bool, false for tokens that no window shows; `None` if all are real.
        return_lse: True to return the log-sum-exp as well.

    Returns:
        `[B, T, H, V]` in the dtype of `v`; with `return_lse` also `[B, T, H]` float32, the natural logarithm of the
        sum of each query's exponentials.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or scale; the message names the argument.
    """
    if isinstance(q, torch.Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, k_kept, v_kept = (x.to(dtype) for x in (q, k, v, k_kept, v_kept))
    floats = {"q": q, "k": k, "v": v, "k_kept": k_kept, "v_kept": v_kept}
    _check(floats, {"begin": begin, "end": end, "until": until, "window_start": window_start}, real)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be positive and finite, got {scale}.")
    check_platform(q.device)
    # A tile that the last column ends within would take what lies behind it for columns.
    begin, end = begin.long(), end.long().clamp(max=k_kept.shape[2])
    until, window_start = (None if x is None else x.long() for x in (until, window_start))
    shown_until = None if real is None else real.int() * q.shape[1]
    if q.shape[0] * q.shape[1] == 0:
        o, lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        with torch.cuda.device_of(q):
            o, lse = SparsePrefixAttentionFunction.apply(
                q, k, v, k_kept, v_kept, begin, end, until, float(scale), window_start, shown_until
            )
    return (o, lse / LOG2E.value) if return_lse else o
