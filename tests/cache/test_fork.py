# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A forked cache shares pages with its source, and neither ever changes what the other holds."""

import copy

import pytest
import torch

from ham_hf import HAMCache, HAMForCausalLM


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    settings = {"layer_types": ["hybrid", "linear_attention", "full_attention", "hybrid"], "num_hidden_layers": 4}
    window = {"attention_window": [0, 0, 0, 5], "attention_sinks": 2}
    return HAMForCausalLM(tiny_config(**settings, **window)).eval().requires_grad_(False)


def tokens(seed, length, rows=2):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def filled(model, length=100, **options):
    cache = HAMCache(model.config)
    model(tokens(0, length), cache=cache, **options)
    return cache


def read(model, cache, seed, length=40, **options):
    """Logits of more tokens, in one call and then one by one."""
    ids = tokens(seed, length)
    pieces = [ids[:, :-9], *ids[:, -9:].split(1, dim=1)]
    return torch.cat([model(x, cache=cache, **options).logits for x in pieces], dim=1)


def contents(cache):
    """Everything that the cache holds, in an order of its own."""
    return [{name: x.clone() for name, x in layer.state_dict().items()} for layer in cache.layers]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def storages(cache):
    """The bytes of each storage, by its address."""
    tensors = [x for layer in cache.layers for x in layer.tensors()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


OPTIONS = [{"threshold": 0.5}, {"threshold": 0.0}, {"threshold": 2.0}, {"threshold": 0.4, "kv_budget": 37}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_go_on_as_if_alone(model, options):
    cache = filled(model, **options)
    alone = copy.deepcopy(cache)
    fork = cache.fork()
    assert_same(contents(fork), contents(cache))
    expected = [read(model, copy.deepcopy(alone), seed, **options) for seed in (1, 2)]
    # The fork first, then the source, and then again, so that each meets what the other wrote.
    found = [read(model, x, seed, **options) for x, seed in ((fork, 1), (cache, 2))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    again = copy.deepcopy(fork)
    read(model, cache, 3, **options)
    assert_same(contents(fork), contents(again))
    held = contents(cache)
    read(model, fork, 4, **options)
    assert_same(contents(cache), held)


def test_a_full_budget_replaces_no_token_of_the_other(model):
    options = {"threshold": 0.0, "kv_budget": 40}
    cache = filled(model, **options)
    fork = cache.fork()
    for x, other, seed in ((fork, cache, 1), (cache, fork, 2)):
        held, store = contents(other), x.layers[0].store
        for token in tokens(seed, 20).split(1, dim=1):
            model(token, cache=x, **options)
        assert x.layers[0].store is store, "its pages were written in place"
        assert_same(contents(other), held)


def test_full_pages_are_shared(model):
    cache = filled(model, 1000, threshold=0.0)
    whole, before = cache.memory_bytes(), storages(cache)
    fork = cache.fork()
    assert storages(cache) == before, "a fork costs its source nothing"
    both = before | storages(fork)
    assert sum(both.values()) < 1.1 * whole
    assert fork.memory_bytes() <= whole
    read(model, fork, 1, threshold=0.0)
    assert sum((before | storages(fork)).values()) < 1.3 * whole, "so does going on"


def test_a_fork_outlives_its_source(model):
    cache = filled(model, threshold=0.5)
    expected = read(model, copy.deepcopy(cache), 1, threshold=0.5)
    fork = cache.fork()
    cache.reset()
    read(model, cache, 5, threshold=0.0)
    del cache
    torch.testing.assert_close(read(model, fork, 1, threshold=0.5), expected, rtol=0, atol=1e-5)


def test_what_a_source_takes_back_its_fork_keeps(model):
    cache = filled(model, 703, threshold=0.0)
    model(tokens(1, 1), cache=cache, threshold=0.0)
    store = cache.layers[0].store
    spare = store.capacity - sum(store.used)
    assert spare > 4, "the last slab has free pages, which recorded tokens will fill"
    cache.activate_past_recording()
    model(tokens(2, 20), cache=cache, threshold=0.0)
    fork = cache.fork()
    held = contents(fork)
    cache.crop(-20)
    read(model, cache, 3, 40, threshold=0.0)
    assert_same(contents(fork), held)
    with pytest.raises(ValueError, match="reaches past the 0 tokens recorded"):
        fork.crop(-1)


@pytest.mark.parametrize("change", ["prune", "rows", "offload"])
def test_other_changes_stay_with_the_one_that_makes_them(model, change):
    cache = filled(model, threshold=0.0)
    held = contents(cache)
    fork = cache.fork()
    if change == "prune":
        fork.prune(0.6)
    elif change == "rows":
        fork.batch_select_indices([1, 1, 0])
    else:
        for layer in fork.layers:
            layer.offload()
            layer.prefetch()
    assert_same(contents(cache), held)


def test_a_fork_of_a_fork(model):
    cache = filled(model, threshold=0.5)
    expected = [read(model, copy.deepcopy(cache), seed, threshold=0.5, kv_budget=30) for seed in (1, 2, 3)]
    first = cache.fork()
    second = first.fork()
    for x, seed in ((first, 1), (second, 2), (cache, 3)):
        found = read(model, x, seed, threshold=0.5, kv_budget=30)
        torch.testing.assert_close(found, expected[seed - 1], rtol=0, atol=1e-5)


def test_a_cache_that_is_new_or_broken(model):
    fork = HAMCache(model.config).fork()
    assert not fork.is_initialized
    read(model, fork, 1)
    broken = filled(model)
    broken._guard.broke("forward", KeyboardInterrupt())
    with pytest.raises(RuntimeError, match="half-changed"):
        broken.fork()
    fork._guard.broke("forward", KeyboardInterrupt())
    assert filled(model).fork().get_seq_length() == 100


def test_in_inference_mode_and_out_of_it(model):
    cache = filled(model, threshold=0.5)
    with torch.inference_mode():
        fork = cache.fork()
        read(model, fork, 1, threshold=0.5)
        inner = filled(model, threshold=0.5).fork()
    assert_same(contents(inner), contents(cache))
    read(model, fork, 2, threshold=0.5)
    read(model, inner, 2, threshold=0.5, kv_budget=20)


def test_padding_goes_along(model):
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    cache = HAMCache(model.config)
    model(tokens(0, 30), attention_mask=mask, cache=cache)
    fork = cache.fork()
    assert torch.equal(fork.past_real(), mask.bool())
    more = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
    model(tokens(1, 1), attention_mask=more, cache=fork)
    assert torch.equal(cache.past_real(), mask.bool())


def test_generate_goes_on_from_forks(model):
    cache = HAMCache(model.config)
    prompt = tokens(0, 60, rows=1)
    model(prompt, cache=cache, threshold=0.5)
    for seed in (1, 2):
        ids = torch.cat([prompt, tokens(seed, 5, rows=1)], dim=1)
        options = {"max_new_tokens": 5, "do_sample": False, "threshold": 0.5}
        assert torch.equal(model.generate(ids, cache=cache.fork(), **options), model.generate(ids, **options))
