# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Models with large weights everywhere, whose gates and thresholds are set, and the tokens that they keep."""

import torch

from ham_hf import HAMForCausalLM

MIXED = ["hybrid", "linear_attention", "full_attention", "hybrid"]
# Weights far larger than a fresh model's, so that every part of a layer matters to the logits. A usual epsilon would
# blow the rounding errors of a memory that answers next to nothing up to 1e-3; with this one, results agree to 1e-5.
WIDE = {"initializer_range": 0.25, "rms_norm_eps": 1e-2}


def make_model(config, seed=0) -> HAMForCausalLM:
    """A model with random weights everywhere, also where a fresh model has ones and zeros."""
    torch.manual_seed(seed)
    model = HAMForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("bias") and "dt_bias" not in name:
                parameter.normal_(std=0.5)
            elif "error_weight" in name:
                parameter.normal_()
    return model


def set_gate(model, name, value):
    """Fixes a mixing gate of every hybrid layer to exactly 1 or 0."""
    for layer in model.model.layers:
        if layer.mixer.layer_type == "hybrid":
            gate = getattr(layer.mixer, name)
            torch.nn.init.zeros_(gate.weight)
            torch.nn.init.constant_(gate.bias, 1e4 if value else -1e4)


def kept_lists(cache, layer):
    """`{(row, head): positions}` that one layer keeps."""
    rows = cache.kept_positions(layer)
    return {(b, h): x.tolist() for b, heads in enumerate(rows) for h, x in enumerate(heads)}


def median_thresholds(model, ids):
    """`[layers, heads]` thresholds that divide the scores of every head, none of them close to one."""
    scores = model(ids, output_routing_scores=True, threshold=0.5).routing_scores
    scores = torch.stack([x.flatten(0, 1).sort(0).values for x in scores])
    gaps = scores.diff(dim=1)[:, len(scores[0]) // 4 : -len(scores[0]) // 4]
    at = gaps.argmax(1, keepdim=True) + len(scores[0]) // 4
    return (scores.gather(1, at) + scores.gather(1, at + 1))[:, 0] / 2
