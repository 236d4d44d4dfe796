# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The control loop that moves learned thresholds in training until usage meets its target; routers' loss."""

from collections.abc import Sequence
from typing import Any

import torch

from .configuration_ham import HAMConfig


def usage_errors(usage: torch.Tensor, target: float | list[float], scope: str) -> torch.Tensor:
    """Usage minus target, per head; `scope` says over which heads usage is averaged.

    Args:
        usage: `[L, Hk]` measured fraction kept.
        target: fraction to keep, or one per layer.
        scope: `"head"`, `"layer"` (the mean of a layer's heads) or `"model"` (the mean of all).
    """
    if scope == "layer":
        usage = usage.mean(1, keepdim=True).expand_as(usage)
    elif scope == "model":
        usage = usage.mean().expand_as(usage)
    return usage - (usage.new_tensor(target)[:, None] if isinstance(target, list) else target)


def logit_unit(thresholds: torch.Tensor) -> torch.Tensor:
    """Length of a step at a threshold: the sigmoid's slope, 1 at 0.5, and 0.1 near 0 and 1 and beyond.

    Learned scores saturate: where most lie close to 1, a step that does well at 0.5 passes nearly all of them. Steps
    of one length in logits pass about as many everywhere.
    """
    return (4 * thresholds * (1 - thresholds)).clamp(min=0.1)


def threshold_gradients(
    thresholds: torch.Tensor, usage: torch.Tensor, target: float | list[float] | None, scope: str
) -> torch.Tensor:
    """The gradient of each threshold `[L, Hk]`, with which any optimizer closes the loop: `target - usage`, in logits.

    If too many tokens are kept, the gradient is negative, descent raises the threshold, and fewer are kept. Gradients
    of several batches or ranks average to that of all of them.

    Steps have one length in logits, see `logit_unit`. A threshold at 0 or below is not lowered, nor one above 1
    raised: no score lies there, so nothing would be gained, and a mean over heads that asks for it would carry the
    threshold far off.

    Args:
        thresholds: `[L, Hk]` float32 in force.
        usage: `[L, Hk]` fraction of this batch that each head kept.
        target: fraction to keep, or one per layer; `None` holds the thresholds: every gradient is 0.
        scope: unit whose usage meets the target, see `usage_errors`.
    """
    if target is None:
        return torch.zeros_like(usage)
    gradients = -usage_errors(usage, target, scope) * logit_unit(thresholds)
    beyond = ((thresholds <= 0) & (gradients > 0)) | ((thresholds > 1) & (gradients < 0))
    return gradients.masked_fill(beyond, 0)


class AddGradient(torch.autograd.Function):
    """Returns `x`, and gives `lever` the gradient `gradient` when a loss of any scale reaches `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lever: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, *ctx.saved_tensors, None


def real_tokens(real: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Real tokens of each row among the new ones, `[B]` float32; `real` `[B, T]` is `None` if all are."""
    if real is None:
        return torch.full((batch,), float(length), device=device)
    return real.sum(1).to(device, torch.float32)


def control_loop(
    controls: Sequence[torch.Tensor], weights: torch.Tensor, config: HAMConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros connected to the thresholds, and the thresholds' gradients, `[L, Hk]`; layers may be on any device.

    With the loss of learned routers both are `[2 L, Hk]`: the other half are zeros that move the routers as the loss
    does, the mean over tokens and heads times `config.router_aux_loss_coef`.

    Args:
        controls: those of every hybrid layer, see `HAMMixer.forward`.
        weights: `[B]` weight of one token of each row; usage is the weighted sum of those kept.
    """
    stacked = torch.stack([x.to(weights.device) for x in controls])
    levers, thresholds, by_row = stacked[:, 0], stacked[:, 1].detach(), stacked[:, 2:]
    # `[L, 1 or 2, Hk]`: usage, and the loss of learned routers.
    means = (weights[:, None] * by_row.unflatten(1, (-1, len(weights)))).sum(2)
    usage = means[:, 0].detach()
    gradients = threshold_gradients(thresholds, usage, config.target_kv_usage, config.threshold_scope)
    if means.shape[1] == 1:
        return levers, gradients
    losses = means[:, 1]
    shares = torch.full_like(gradients, config.router_aux_loss_coef / losses.shape[1])
    return torch.cat([levers, losses - losses.detach()]), torch.cat([gradients, shares])


def labels_by_row(labels: torch.Tensor | None, loss_kwargs: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Number of labels of each row that the loss counts, `[B]` float32."""
    shifted = loss_kwargs.get("shift_labels")
    counted = labels[:, 1:] if shifted is None and labels is not None else shifted
    return (counted != loss_kwargs.get("ignore_index", -100)).sum(1).to(device, torch.float32)


def batch_share(
    counted: torch.Tensor, seen: torch.Tensor, num_items: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """This call's part in the control loop: weights `[B]` of kept tokens in its usage, and the share of its gradient.

    A call with `num_items_in_batch` may be a part of a batch, and knows only the batch's number of labels. So each
    row's usage is weighted by its labels, as its loss is: then the parts of a batch add up to the whole. A call
    without it is a whole batch, in which every token has the same weight. Both agree if the rows' labels are in
    proportion to their tokens, as in rows of one length that are learned whole.

    A call without a label has no share: its loss moves nothing.

    Args:
        counted: `[B]` float32 labels of each row that count.
        seen: `[B]` float32 real tokens of each row.
        num_items: labels of the whole batch.
    """
    total = counted.sum()
    if num_items is None:
        return (1 / seen.sum().clamp(min=1)).expand_as(seen), (total > 0).float()
    weights = counted / (total.clamp(min=1) * seen.clamp(min=1))
    # Without labels the number of items may be 0, too.
    return weights, torch.where(total > 0, total / num_items, 0.0)


__all__ = [
    "batch_share",
    "control_loop",
    "labels_by_row",
    "logit_unit",
    "real_tokens",
    "threshold_gradients",
    "usage_errors",
]
