# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The public function, its autograd function, and the check of their arguments."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..tuning import check_platform
from .backward import output_and_state_bwd, prediction_bwd, with_next_keys, wy_bwd
from .chunks import MAX_HEAD_DIM, Chunks, split_documents, split_rows
from .output import output_fwd, step_fwd
from .state import state_fwd
from .wy import wy_fwd

CHUNK_SIZES = (16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCORES = ("cosine", "l2", "residual")
# A decay in log space from which nothing is left. Sums of decays stay finite above it.
FORGETS_ALL = -1000.0


class GatedDeltaRuleWithPredictionFunction(torch.autograd.Function):
    """Saves the inputs, the gates' sums and the inverses; backward computes `w`, `u` and the states again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        scale: float,
        chunks: Chunks,
        score: str | None,
        predict: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Runs the three stages."""
        gc, inverse = wy_fwd(k, g, beta, v, chunks)
        _, u, states, final_state = state_fwd(k, v, beta, gc, inverse, initial_state, chunks)
        o, prediction = output_fwd(q, k, v, beta, u, gc, states, scale, chunks, score, predict)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, gc, inverse, chunks.borders, chunks.table)
        ctx.scale, ctx.chunks = scale, chunks._replace(borders=None, table=None)
        if prediction is not None and score is not None:
            ctx.mark_non_differentiable(prediction)
        ctx.set_materialize_grads(False)
        return o, prediction, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dprediction: torch.Tensor | None, dfinal_state: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Runs the stages backwards; an output that was not used has a gradient of zero."""
        q, k, v, g, beta, initial_state, gc, inverse, borders, table = ctx.saved_tensors
        chunks = ctx.chunks._replace(borders=borders, table=table)
        do = v.new_zeros(*q.shape[:3], v.shape[3]) if do is None else do.contiguous()
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        dinitial_state = None if initial_state is None else torch.empty_like(initial_state)
        if dprediction is not None:
            dprediction = dprediction * g.exp()[..., None]
            q, do = with_next_keys(q, k, do, dprediction / ctx.scale, chunks)
        w, u, states = state_fwd(k, v, beta, gc, inverse, initial_state, chunks)[:3]
        dq, dk, dw, du, dg_parts = output_and_state_bwd(
            q, k, w, u, gc, states, do, dfinal_state, dinitial_state, ctx.scale, chunks
        )
        dv, dg, dbeta = wy_bwd(k, v, beta, gc, inverse, dw, du, dk, dg_parts, chunks)
        if dprediction is not None:
            dq = prediction_bwd(dprediction, dq, k, initial_state, dk, dg, dinitial_state)
        return dq, dk, dv, dg, dbeta, dinitial_state, None, None, None, None


def _check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    chunk_size: int,
) -> None:
    if v.ndim != 4 or 0 in v.shape:
        raise ValueError(f"`v` must be [B, T, Hk, V] with no empty dimension, got {list(v.shape)}")
    if v.dtype not in DTYPES:
        raise ValueError(f"`v` must be float32, float16 or bfloat16, got {v.dtype}")
    batch, length, kv_heads, value_dim = v.shape
    if k.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"`k` must be [{batch}, {length}, {kv_heads}, K], got {list(k.shape)}")
    key_dim = k.shape[3]
    if not (1 <= key_dim <= MAX_HEAD_DIM and value_dim <= MAX_HEAD_DIM):
        raise ValueError(
            f"head dimensions must be at most {MAX_HEAD_DIM}, got K={key_dim} of `k`, V={value_dim} of `v`"
        )
    if q.ndim != 4 or q.shape[:2] != v.shape[:2] or q.shape[3] != key_dim or q.shape[2] % kv_heads or not q.shape[2]:
        raise ValueError(f"`q` must be [{batch}, {length}, a multiple of {kv_heads}, {key_dim}], got {list(q.shape)}")
    shapes = {
        "g": (g, [batch, length, kv_heads]),
        "beta": (beta, [batch, length, kv_heads]),
        "initial_state": (initial_state, [batch, kv_heads, key_dim, value_dim]),
        "seq_idx": (seq_idx, [batch, length]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"`{name}` must be {shape}, got {list(tensor.shape)}")
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"`chunk_size` must be one of {CHUNK_SIZES}, got {chunk_size!r}")


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _check_score(score: str | None, predict: bool) -> None:
    if score is not None and score not in SCORES:
        raise ValueError(f"`score` must be one of {', '.join(map(repr, SCORES))} or None, got {score!r}")
    if score is not None and not predict:
        raise ValueError(f"`predict` must be True with `score` {score!r}, got {predict!r}")


def gated_delta_rule_with_prediction(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_size: int = 64,
    score: str | None = None,
    predict: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gated delta rule (arXiv 2412.06464), with the state's prediction of each value before it is stored.

    Differentiable, also through the prediction, but not through a score. Computes in the dtype of `v` with float32
    sums, the recurrence in float32. The prediction is exactly zero while nothing is stored. Backward stores the states
    twice, `K * V / chunk_size` numbers per token and key/value head each; a gradient of the prediction costs as much
    as another query head. One token without gradients takes a single launch, and one more for a score.

    Args:
        q: `[B, T, H, K]`, L2-normalised by the caller; `H` is a multiple of `Hk`.
        k: `[B, T, Hk, K]`, L2-normalised by the caller; `K` at most 256.
        v: `[B, T, Hk, V]` float32, float16 or bfloat16; `V` at most 256.
        g: `[B, T, Hk]` decay in log space, from `-inf` to 0; 0 for padding.
        beta: `[B, T, Hk]` write strength in (0, 1); 0 for padding.
        scale: factor of the output; `K ** -0.5` if `None`.
        initial_state: `[B, Hk, K, V]` float32; zeros if `None`.
        seq_idx: `[B, T]` int, document of each token, constant over padding; the state is cleared where it changes.
            With it the host waits for the device once.
        chunk_size: tokens solved at once, 16, 32 or 64; float32 with `K` above 128 takes at most 32.
        score: `"cosine"`, `"l2"` or `"residual"` returns that score of each prediction instead, computed from its
            float32; the prediction is then never written. NaN counts as 1.
        predict: `False` computes and returns no prediction, for callers that read neither it nor a score.

    Returns:
        `o` `[B, T, H, V]` in the dtype of `v`; `prediction` `[B, T, Hk, V]` float32, or the scores `[B, T, Hk]`
        float32 in `[0, 1]`, or `None` without `predict`; the final state `[B, Hk, K, V]` float32.

    Raises:
        ValueError: for shapes that do not fit, head dimensions above 256, other dtypes, chunk sizes or scores, a score
            without `predict`, or a CPU tensor outside Triton's interpreter.
    """
    _check_arguments(q, k, v, g, beta, initial_state, seq_idx, chunk_size)
    _check_score(score, predict)
    check_platform(v.device)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(v.dtype).contiguous() for x in (q, k, v))
    g, beta = g.float().clamp(min=FORGETS_ALL).contiguous(), beta.float().contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    if v.shape[1] == 1 and not _needs_gradient(q, k, v, g, beta, initial_state):
        with torch.cuda.device_of(v):
            return step_fwd(q, k, v, g, beta, initial_state, scale, score, predict)
    if v.dtype == torch.float32 and k.shape[3] > 128:
        chunk_size = min(chunk_size, 32)  # a block of threads could not hold a longer chunk
    chunks = (
        split_rows(v.shape[0], v.shape[1], chunk_size) if seq_idx is None else split_documents(seq_idx, chunk_size)
    )
    arguments = q, k, v, g, beta, initial_state, scale, chunks, score, predict
    with torch.cuda.device_of(v):  # autograd sees to the device of the backward pass
        return GatedDeltaRuleWithPredictionFunction.apply(*arguments)
