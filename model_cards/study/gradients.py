# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Ways to give a learned router a gradient, for comparison with that of HAM; not for use elsewhere."""

from typing import Any

import torch

from ham_hf.mixer_ham import HAMMixer, HAMRMSNorm
from ham_hf.modeling_ham import HAMForCausalLM


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


GRADIENTS: dict[str, type[HAMMixer]] = {
    "scaled_values": HAMMixer,
    "log_bias": LogBiasMixer,
    "straight_through": StraightThroughMixer,
    "behind_norm": BehindNormMixer,
    "noise": NoisyMixer,
    "received_attention": HAMMixer,
}


def use_gradient(model: HAMForCausalLM, gradient: str) -> None:
    """Makes the learned routers of a model learn with one of `GRADIENTS`.

    Raises:
        ValueError: for a score behind a norm that the model lacks.
    """
    if gradient == "behind_norm" and not model.config.kv_output_norm:
        raise ValueError("`kv_output_norm` must be true with the gradient 'behind_norm', got false.")
    model.config.router_aux_loss_coef = float(gradient == "received_attention")
    for layer in model.model.layers:
        layer.mixer.__class__ = GRADIENTS[gradient]
        if gradient == "behind_norm":
            layer.mixer.kv_norm.__class__ = ScaledNorm
