# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The loss from which a learned router learns, in training, how much attention each token would get."""

import torch

# Queries of a call that look at all tokens before them; with more, a random choice of as many.
MOST_QUERIES = 128
# Scores this close to 0 or 1 count as this far away, so that the loss stays finite.
SMALLEST_SCORE = 1e-6


@torch.no_grad()
def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    real: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """The most attention that each token would get from a later one that does not see it anyway, were all kept.

    Dropped tokens count as kept ones do: a router otherwise never learns what it misses.

    Args:
        q: `[B, T, H, K]` queries as attention sees them; k: `[B, T, Hk, K]` keys.
        real: `[B, T]` bool, False for padding; `None` if all tokens are real.
        seq_idx: `[B, T]` int, the document of each token; `None` if each row is one document.
        window: number of last tokens, itself included, that a token sees in any case.

    Returns:
        `[B, T, Hk]` float32 in `[0, 1]`; 0 for padding.
    """
    length, heads = q.shape[1], k.shape[2]
    time = torch.arange(length, device=q.device)
    asking = time if length <= MOST_QUERIES else torch.randperm(length, device=q.device)[:MOST_QUERIES]
    visible = (asking[:, None] >= time)[None]
    if seq_idx is not None:
        visible = visible & (seq_idx[:, asking, None] == seq_idx[:, None])
    if real is not None:
        visible = visible & (real[:, asking, None] & real[:, None])
    visible = visible[:, None, None]
    q = q[:, asking].transpose(1, 2).unflatten(1, (heads, -1))
    logits = (q @ k.transpose(1, 2).unsqueeze(2).mT).float() * k.shape[3] ** -0.5
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    # A query does not count as asking for itself, and padding asks for nothing: its weights are no numbers.
    asked_for = visible & (asking[:, None] - time >= max(1, window))
    return weights.masked_fill(~asked_for, 0).amax((2, 3)).transpose(1, 2)


def prediction_loss(scores: torch.Tensor, received: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The cross-entropy of scores against the attention received, summed over the real tokens of a row: `[B, Hk]`.

    Args:
        scores: `[B, T, Hk]` in `[0, 1]`.
        received: `[B, T, Hk]` float32, see `attention_received`.
        real: `[B, T]` bool, or `None`.
    """
    kept, dropped = (x.clamp(min=SMALLEST_SCORE).log() for x in (scores, 1 - scores))
    losses = -(received * kept + (1 - received) * dropped)
    return (losses if real is None else losses.masked_fill(~real[..., None], 0)).sum(1)


__all__ = ["attention_received", "prediction_loss"]
