# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Models all of whose weights matter to what they compute, and inputs for them."""

import torch

from ham_hf import (
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
)

HEADS = (HAMForCausalLM, HAMForSequenceClassification, HAMForTokenClassification, HAMForQuestionAnswering)
FLOAT32_NAMES = ("A_log", "dt_bias", "threshold", "score_quantiles", "error_weight")
LAYERS = {
    "hybrid": ["hybrid", "hybrid"],
    "mixed": ["hybrid", "linear_attention", "full_attention"],
}


def moved(model):
    """Moves parameters away from their initial values, so that logits are far enough apart to compare tokens."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.add_((0.02 if name.endswith("threshold") else 0.1) * torch.randn_like(x))
    return model


def distinct(model):
    """Moves every parameter and buffer away from its initial value, so that nothing lost on the way goes unseen."""
    for name, x in moved(model).named_buffers():
        if name.endswith("score_quantiles"):
            x.copy_(torch.rand_like(x).sort(-1).values)
    return model


def tokens(*shape: int) -> torch.Tensor:
    """Real tokens: neither padding, nor those that begin and end a text."""
    return torch.randint(3, 97, shape)


def example(cls, rows: int = 3) -> dict[str, torch.Tensor]:
    """Tokens, and the labels that the model of this class takes."""
    input_ids = tokens(rows, 9)
    labels = {
        HAMModel: {},
        HAMForCausalLM: {"labels": input_ids},
        HAMForSequenceClassification: {"labels": torch.arange(rows) % 2},
        HAMForTokenClassification: {"labels": input_ids % 2},
        HAMForQuestionAnswering: {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 4},
    }
    return {"input_ids": input_ids} | labels[cls]


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
