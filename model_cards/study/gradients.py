# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Ways to give a learned router a gradient, for comparison with that of HAM; not for use elsewhere."""

from typing import Any

import torch

from ham_hf.mixer_ham import Attended, HAMMixer, HAMRMSNorm
from ham_hf.modeling_ham import HAMForCausalLM
from ham_hf.threshold_control_ham import AddGradient


class LogBiasMixer(HAMMixer):
    """Adds the logarithm of a token's score to the attention logits of later queries.

    Weights are then `e_j exp(l_j)` over their sum: attention over scaled values, divided by attention over scores.
    """

    def _scale_values(self, v: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores[..., None].to(v.dtype)
        return torch.cat([v * scores, scores], dim=-1)

    def attend_kept(self, *arguments: Any) -> torch.Tensor:
        """Attention over scaled values, divided by attention over scores."""
        out = super().attend_kept(*arguments)
        return out[..., :-1] / out[..., -1:].clamp(min=1e-6)


class StraightThroughMixer(HAMMixer):
    """Leaves the values unscaled, and gives the score the gradient that scaling would give."""

    def _scale_values(self, v: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return v * (1 + scores - scores.detach())[..., None].to(v.dtype)


class ScaledNorm(HAMRMSNorm):
    """The norm of an output that carries a factor in its last channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises all channels but the last, and multiplies by that one."""
        return super().forward(x[..., :-1]) * x[..., -1:]


class BehindNormMixer(HAMMixer):
    """Reads the mean score beside the mean value, and multiplies by it behind the norm, which would cancel it."""

    def _scale_values(self, v: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([v, scores[..., None].to(v.dtype)], dim=-1)


class NoisyMixer(HAMMixer):
    """Routes by scores with noise in training, unit normal in their logits, so that dropped tokens are tried again."""

    def _route(self, scores: torch.Tensor | None, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and scores is not None:
            scores = (scores.logit(eps=1e-6) + torch.randn_like(scores)).sigmoid()
        return super()._route(scores, *arguments)


class ReceivedAttentionMixer(HAMMixer):
    """Adds a loss in training: a token's score predicts the most attention that a later token would pay it."""

    def _attend(
        self,
        qkv: torch.Tensor,
        scores: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        *arguments: Any,
    ) -> Attended:
        attended = super()._attend(qkv, scores, position_embeddings, *arguments)
        if not self.training or scores is None:
            return attended
        with torch.no_grad():
            q, k, _ = self._heads(qkv)
            received = attention_received(*self._attention_view(q, k, position_embeddings))
            # That of the mean cross-entropy of `scores` against `received`.
            gradient = (scores - received) / (scores * (1 - scores)).clamp(min=1e-6) / scores.numel()
        return attended._replace(output=AddGradient.apply(attended.output, scores, gradient))


def attention_received(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The most attention that each token would get from a later one if all were kept, `[B, T, Hk]` in `[0, 1]`.

    Args:
        q: `[B, T, H, K]`; k: `[B, T, Hk, K]`: of whole rows without padding.
    """
    q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))
    logits = q @ k.transpose(1, 2).unsqueeze(2).mT * k.shape[3] ** -0.5
    later = torch.ones_like(logits[0, 0, 0], dtype=torch.bool).tril()
    weights = logits.masked_fill(~later, -torch.inf).softmax(-1)
    return weights.tril(-1).amax((2, 3)).transpose(1, 2)


GRADIENTS: dict[str, type[HAMMixer]] = {
    "scaled_values": HAMMixer,
    "log_bias": LogBiasMixer,
    "straight_through": StraightThroughMixer,
    "behind_norm": BehindNormMixer,
    "noise": NoisyMixer,
    "received_attention": ReceivedAttentionMixer,
}


def use_gradient(model: HAMForCausalLM, gradient: str) -> None:
    """Makes the learned routers of a model learn with one of `GRADIENTS`."""
    for layer in model.model.layers:
        layer.mixer.__class__ = GRADIENTS[gradient]
        if gradient == "behind_norm":
            layer.mixer.kv_norm.__class__ = ScaledNorm
