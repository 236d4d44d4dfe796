# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Feeds rows through a cache call by call, and holds each of them to the row alone."""

import torch

from ham_hf import HAMCache
from tests.model.exactness.cases import MARGIN
from tests.model.exactness.wide_models import kept_lists


def run_calls(case, plan, give_positions, **arguments):
    """Feeds the rows through a cache call by call; returns the cache, and per row its real logits and scores."""
    cache, done = HAMCache(case.model.config), [0] * len(case.rows)
    logits = [[] for _ in case.rows]
    scores = [[] for _ in case.rows]
    masks = torch.cat([call.real for call in plan], 1)
    seen = 0
    for call in plan:
        width = call.real.shape[1]
        ids = torch.zeros(call.real.shape, dtype=torch.long)
        for row, tokens in enumerate(case.rows):
            n = int(call.real[row].sum())
            ids[row, call.real[row]] = tokens[done[row] : done[row] + n]
            done[row] += n
        inputs = {"attention_mask": masks[:, : seen + width].long()}
        if bool(masks[:, : seen + width].all()) and not give_positions:
            inputs = {}  # no mask at all, as users who pad nothing do
        if give_positions:
            inputs["position_ids"] = (masks.cumsum(1) - 1).clamp(min=0)[:, seen : seen + width]
        output = case.model(
            ids, cache=cache, output_routing_scores=True, threshold=case.argument, **inputs, **arguments
        )
        for row in range(len(case.rows)):
            logits[row].append(output.logits[row, call.real[row]])
            if output.routing_scores:
                scores[row].append(torch.stack(output.routing_scores)[:, row, call.real[row]])
        seen += width
    assert done == [len(x) for x in case.rows]
    assert cache.get_seq_length() == seen
    assert cache.real_tokens.tolist() == done
    return cache, [torch.cat(x) for x in logits], [torch.cat(x, 1) if x else None for x in scores]


@torch.no_grad()
def assert_as_alone(case, plan, give_positions, **arguments):
    cache, logits, scores = run_calls(case, plan, give_positions, **arguments)
    for row in range(len(case.rows)):
        expected = case.alone(row, **arguments)
        scale = max(1, expected.logits.abs().max())
        assert (logits[row] - expected.logits[0]).abs().max() < MARGIN * scale, f"logits of row {row}"
        if scores[row] is not None:
            assert (scores[row] - torch.stack(expected.routing_scores)[:, 0]).abs().max() < MARGIN
        for layer in case.keeping:
            kept = kept_lists(cache, layer)
            for (_, head), positions in kept_lists(expected.cache, layer).items():
                assert kept[row, head] == positions, f"layer {layer}, row {row}, head {head}"
    return cache
