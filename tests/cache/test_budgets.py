# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Pruning and budgets keep the tokens that the scores say, however these arrived."""

import itertools
import math

import pytest
import torch

from ham_hf import HAMCache
from ham_hf.paged_store_ham import MIN_SLAB_PAGES, PAGE_SIZE
from ham_hf.reference import naive_surviving_tokens
from ham_hf.routing_ham import random_score
from tests.cache.caches import assert_continues, assert_same, contents, feed, filled


@pytest.mark.parametrize("threshold", [0.55, [0.55], torch.tensor([0.5, 0.6, 2.0]), torch.tensor([[[0.45, 0.6]]])])
def test_pruned_cache_is_the_one_that_threshold_fills(make_model, ids, mask, threshold):
    """In a single layer scores do not depend on what was kept, so pruning equals a second run with that threshold."""
    model = make_model(num_hidden_layers=1)
    cache = filled(model, ids[:, :40], (30, 31), mask, threshold=0.0)
    assert cache.kept_tokens().sum() == 2 * mask[:, :40].sum()
    before = cache.memory_bytes()
    cache.prune(threshold)
    expected = filled(model, ids[:, :40], mask=mask, threshold=threshold)
    assert 0 < expected.kept_tokens().sum() < 2 * mask[:, :40].sum()
    assert cache.memory_bytes() <= before
    assert_continues(model, cache, expected, ids, mask)


def test_prune_goes_by_the_stored_scores(model, ids):
    cache = filled(model, ids, threshold=0.45)
    before = [layer.store.tokens() if layer.store else None for layer in cache.layers]
    limits = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.45
    cache.prune(limits)
    for layer, n in ((0, 0), (2, 1)):
        survives = before[layer].scores >= limits[n].flatten()[before[layer].streams]
        assert 0 < survives.sum() < len(survives)
        expected, found = before[layer].select(survives), cache.layers[layer].store.tokens()
        assert all(torch.equal(getattr(found, name), x) for name, x in vars(expected).items())
    assert len(cache.layers[1].store.tokens().scores) == len(before[1].scores), "full attention is not routed"
    after = contents(cache)
    cache.prune(0.0)
    assert_same(cache, after)
    cache.prune(math.inf)
    assert cache.kept_tokens()[[0, 2]].sum() == 0
    feed(model, cache, torch.cat([ids, ids], 1), (1, 2))


def test_budget_bounds_a_stream(make_model):
    """1,000 tokens stream through room for 48: the highest scores stay, and the memory does not grow."""
    model = make_model(num_hidden_layers=2, router="random")
    budget, length, threshold = 48, 1000, 0.3
    ids = torch.randint(1, 97, (2, length))
    cache, sizes = HAMCache(model.config), []
    cuts = sorted({*range(40, 160), *range(160, 900, 100), *range(900, 1000)})
    for begin, end in itertools.pairwise([0, *cuts, length]):
        model(ids[:, begin:end], cache=cache, threshold=threshold, kv_budget=budget)
        assert cache.kept_tokens().max() <= budget
        sizes.append(cache.memory_bytes() - cache.state_bytes())
    assert (cache.kept_tokens() == budget).all()
    assert cache.get_seq_length() == length
    store = cache.layers[0].store
    per_token = (store.key_dim + store.value_dim) * 4 + 8
    slots = 2 * 4 * (budget + PAGE_SIZE) + 2 * MIN_SLAB_PAGES * PAGE_SIZE
    assert max(sizes) <= slots * (per_token + 1)
    for layer in range(2):
        scores = random_score(torch.arange(length)[None], layer, 2)[0]
        positions = cache.kept_positions(layer)
        for head in range(2):
            survivors = naive_surviving_tokens(scores[:, head], scores[:, head] >= threshold, budget)[-1]
            for row in range(2):
                assert positions[row][head].tolist() == survivors.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("cuts", [(), (10, 11, 12, 35), tuple(range(1, 60))], ids=["whole", "chunks", "tokens"])
def test_budget_at_any_cut(model, ids, mask, cuts):
    """A budget gives the same logits however the sequence is cut; layers of full attention are not bounded by it."""
    expected = model(ids, attention_mask=mask, threshold=0.5, kv_budget=9, use_cache=False).logits
    cache = HAMCache(model.config)
    logits = feed(model, cache, ids, cuts, mask, threshold=0.5, kv_budget=9)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert cache.kept_tokens()[[0, 2]].max() == 9
    assert cache.kept_tokens()[1].tolist() == [[60, 60], [53, 53], [53, 53]]


def test_a_budget_can_come_late(model, ids):
    """The first call with a budget drops what is too much; a call without one lets the cache grow again."""
    cache = filled(model, ids[:, :40], threshold=0.0)
    best = cache.layers[0].store.tokens()
    feed(model, cache, ids[:, :41], threshold=2.0, kv_budget=5)
    for stream in range(6):
        scores, positions = best.scores[best.streams == stream], best.positions[best.streams == stream]
        highest = positions[scores.argsort(descending=True)[:5]].sort().values
        assert torch.equal(cache.kept_positions(0)[stream // 2][stream % 2], highest)
    feed(model, cache, ids, (1, 2), threshold=0.0)
    assert (cache.kept_tokens()[[0, 2]] == 24).all()
