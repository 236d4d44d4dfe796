# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Ways to give a learned router a gradient, for comparison with that of HAM; not for use elsewhere."""

from typing import Any

import torch

from ham_hf.mixer_ham import HAMMixer
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


GRADIENTS: dict[str, type[HAMMixer]] = {
    "scaled_values": HAMMixer,
    "log_bias": LogBiasMixer,
    "straight_through": StraightThroughMixer,
}


def use_gradient(model: HAMForCausalLM, gradient: str) -> None:
    """Makes the learned routers of a model learn with one of `GRADIENTS`."""
    for layer in model.model.layers:
        layer.mixer.__class__ = GRADIENTS[gradient]
