# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Every class of models, the numbers that it gives, and a loss of these."""

import torch

from ham_hf import HAMModel
from tests.model.models import HEADS

MODELS = (HAMModel, *HEADS)


def outputs_of(out) -> dict[str, torch.Tensor]:
    """The tensors of an output that are numbers of the last layer."""
    return {name: out[name] for name in ("last_hidden_state", "logits", "start_logits", "end_logits") if name in out}


def loss_of(cls, model, inputs) -> torch.Tensor:
    out = model(**inputs, use_cache=False)
    return out.last_hidden_state.square().mean() if cls is HAMModel else out.loss
