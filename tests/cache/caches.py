# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Caches that are filled, and what it means that two of them hold the same and go on the same."""

import itertools

import torch

from ham_hf import HAMCache
from ham_hf.layer_step_ham import LayerStep
from ham_hf.paged_store_ham import KeptTokens

MIXED = ("hybrid", "full_attention", "hybrid", "linear_attention")


def as_tokens(rows) -> KeptTokens:
    key = torch.tensor([row[0] for _, row in rows], dtype=torch.float32).view(-1, 1)
    return KeptTokens(
        keys=key + torch.tensor([0.0, 0.25, 0.5]),
        values=-key * torch.tensor([1.0, 2.0]),
        scores=torch.tensor([row[1] for _, row in rows], dtype=torch.float32),
        positions=torch.tensor([row[2] for _, row in rows], dtype=torch.int32),
        streams=torch.tensor([stream for stream, _ in rows], dtype=torch.long),
    )


def feed(model, cache, ids, cuts=(), mask=None, threshold=0.51, **arguments):
    """Runs the tokens that follow those in the cache, cut at `cuts` (numbers of tokens); returns their logits."""
    seen = cache.get_seq_length()
    ends = [seen, *(seen + cut for cut in cuts), ids.shape[1]]
    logits = [
        model(
            ids[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            cache=cache,
            threshold=threshold,
            **arguments,
        ).logits
        for begin, end in itertools.pairwise(ends)
        if begin < end
    ]
    return torch.cat(logits, 1) if logits else None


def filled(model, ids, cuts=(), mask=None, **arguments):
    cache = HAMCache(model.config)
    feed(model, cache, ids, cuts, mask, **arguments)
    return cache


def contents(cache):
    """Everything that a cache holds, in an order that does not depend on where it is stored."""
    held = {"seen": torch.tensor(cache.get_seq_length()), "real": cache.real_tokens}
    for i, layer in enumerate(cache.layers):
        own = {"conv": layer.conv_state, "rnn": layer.recurrent_state, "real": layer.real_tokens}
        if layer.store is not None:
            own |= vars(layer.store.tokens()) | {"counts": layer.store.counts}
        if layer.recent is not None:
            *recent, used = layer.recent.in_order(layer._seen_by_stream())
            own |= {f"recent {n}": x[used] for n, x in enumerate(recent)}
        held |= {f"{i}.{name}": x for name, x in own.items() if x is not None}
    return {name: x.clone() for name, x in held.items()}


def assert_same(found, expected, atol=0.0):
    """Two caches, or what `contents` gave of them, hold the same tokens and, to a tolerance, the same numbers."""
    found, expected = (contents(x) if isinstance(x, HAMCache) else x for x in (found, expected))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        exact = not x.is_floating_point()
        torch.testing.assert_close(
            x, expected[name], rtol=0, atol=0 if exact else atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_continues(model, found, expected, ids, mask=None, atol=1e-5):
    """Both caches hold the same, and go on to the same logits and kept tokens: token by token, then in a block."""
    assert_same(found, expected, atol)
    cuts = (1, 2, 3)
    logits, expected_logits = (feed(model, cache, ids, cuts, mask) for cache in (found, expected))
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=atol)
    assert_same(found, expected, atol)


def random_step(keep, start=0, dim=8, dtype=torch.float32) -> LayerStep:
    """Makes the step of one forward that keeps `[B, T, Hk]` bool tokens, with random contents."""
    batch, length, heads = keep.shape
    return LayerStep(
        positions=torch.arange(start, start + length).expand(batch, -1),
        keys=torch.randn(batch, length, heads, dim, dtype=dtype),
        values=torch.randn(batch, length, heads, dim, dtype=dtype),
        scores=torch.rand(batch, length, heads),
        keep=keep,
    )
