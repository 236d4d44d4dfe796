# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Calibration: score quantiles per head, stored with the checkpoint, that turn a wanted usage into thresholds."""

from collections.abc import Iterable, Sequence

import torch

from ..modeling_ham import HAMForCausalLM


@torch.no_grad()
def calibrate(model: HAMForCausalLM, batches: Iterable[torch.Tensor | dict[str, torch.Tensor]]) -> None:
    """Sets every `score_quantiles` buffer from the routing scores of sample text.

    Quantiles are taken at equally spaced levels from 0 to 1 for every key/value head. They are measured at the
    thresholds in force, because the tokens that a layer keeps change the inputs of the layers above it.

    Args:
        model: the model; its buffers change, so save it afterwards.
        batches: `[B, T]` token ids without padding, of the kind and length that the model will be used on; or
            dictionaries of `input_ids` and other arguments of a call, such as the `position_ids` of packed rows or an
            `attention_mask`, whose padding does not count; `labels` are not needed.

    Raises:
        ValueError: if there is no batch, the model has no hybrid layer, or its router is `"recency"`, whose scores are
            positions.
    """
    mixers = [layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]
    if not mixers:
        raise ValueError("`model` has no hybrid layer, so there are no routing scores to calibrate.")
    if model.config.router == "recency":
        raise ValueError("`model` has the router 'recency', whose scores are positions: give calls a `kv_budget`.")
    scores: list[list[torch.Tensor]] = [[] for _ in mixers]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
            inputs = {name: x.to(model.device) for name, x in inputs.items() if name != "labels"}
            mask = inputs.get("attention_mask")
            # Call the whole model: under FSDP its parts cannot be called alone.
            outputs = model(**inputs, use_cache=False, logits_to_keep=1, output_routing_scores=True)
            for collected, layer_scores in zip(scores, outputs.routing_scores, strict=True):
                real = layer_scores[mask.bool()] if mask is not None else layer_scores.flatten(0, 1)
                collected.append(real.float().cpu())
    finally:
        model.train(training)
    if not scores[0]:
        raise ValueError("`batches` is empty: calibration needs at least one batch of token ids.")
    for mixer, collected in zip(mixers, scores, strict=True):
        mixer.score_quantiles.copy_(score_quantiles(torch.cat(collected), mixer.score_quantiles.shape[-1]))


def score_quantiles(scores: torch.Tensor, levels: int) -> torch.Tensor:
    """`[Hk, levels]` quantiles at equally spaced levels from 0 to 1 of `[n, Hk]` scores."""
    ordered = scores.sort(dim=0).values
    position = torch.linspace(0, len(scores) - 1, levels)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(scores) - 1)
    return torch.lerp(ordered[low], ordered[high], (position - low)[:, None]).T


def spread_windows(tokens: Sequence[int], length: int, count: int) -> list[torch.Tensor]:
    """`[1, length]` windows at equal distances over a text, from its beginning to its end.

    Args:
        tokens: token ids of the text.
        length: tokens in a window.
        count: number of windows; fewer come back where the text holds fewer that do not overlap.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    count = min(count, len(tokens) // length)
    if count < 1:
        raise ValueError(f"`tokens` must hold a window of {length}, got {len(tokens)}.")
    step = (len(tokens) - length) // max(1, count - 1)
    return [torch.tensor([tokens[n * step : n * step + length]]) for n in range(count)]
