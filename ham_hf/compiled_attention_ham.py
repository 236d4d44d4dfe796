# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention of new tokens as one operator of `torch.compile`, to which the number of kept tokens is data."""

from typing import Any

import torch

from .attention_ham import attend_new

# Of this module alone: a checkpoint's remote code may load a second one, and an operator is defined once.
NAMESPACE = __name__.replace(".", "_").replace("-", "_")
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@torch.library.custom_op(f"{NAMESPACE}::attend_new", mutates_args=())
def attend_in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    budget: int | None,
    seq_idx: torch.Tensor | None,
    window: int,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """`attend_new` without cached columns, for a compiled model; its backward pass computes it a second time."""
    return attend_new(q, k, v, keep, scores, budget, None, seq_idx, window, real).contiguous()


@attend_in_graph.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> torch.Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


def _gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    budget: int | None,
    seq_idx: torch.Tensor | None,
    window: int,
    real: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `k` and `v` for that of `attend_in_graph`'s output."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = attend_new(q, k, v, keep, scores, budget, None, seq_idx, window, real)
    dq, dk, dv = (x.contiguous() for x in torch.autograd.grad(out, (q, k, v), gradient))
    return dq, dk, dv


# Not a `custom_op`, within which PyTorch records nothing to differentiate.
_library.define("attend_new_backward" + torch.library.infer_schema(_gradients, mutates_args=()))
_library.impl("attend_new_backward", _gradients, "CompositeExplicitAutograd")
attend_in_graph_backward = getattr(torch.ops, NAMESPACE).attend_new_backward


@torch.library.register_fake(f"{NAMESPACE}::attend_new_backward")
def _(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, v, keep, scores, ctx.budget, seq_idx, ctx.window, real = inputs
    ctx.save_for_backward(q, k, v, keep, scores, seq_idx, real)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, keep, scores, seq_idx, real = ctx.saved_tensors
    gradients = attend_in_graph_backward(gradient, q, k, v, keep, scores, ctx.budget, seq_idx, ctx.window, real)
    return *gradients, None, None, None, None, None, None


attend_in_graph.register_autograd(_backward, setup_context=_save_inputs)

__all__ = ["attend_in_graph"]
