# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`generate` and the methods of a cache refuse wrong arguments before anything has changed."""

import re

import pytest
import torch
from safetensors import SafetensorError
from transformers import DynamicCache

from ham_hf import HAMCache
from tests.model.bad_input.refusals import (
    HUGE,
    NAN,
    NEW,
    ROWS,
    SEEN,
    VOCABULARY,
    assert_refuses,
    contents,
    ids,
    name_of,
)

# --- generate --------------------------------------------------------------------------------------------------------


GENERATE = [
    ({"threshold": "0.5"}, TypeError, "`threshold` is '0.5' of type str"),
    ({"threshold": [0.5] * 3}, ValueError, "`threshold` has 3 entries; expected a number, a list of 2 numbers"),
    ({"threshold": torch.zeros(3)}, ValueError, "`threshold` has shape [3]"),
    ({"threshold": NAN}, ValueError, "`threshold` must not be NaN"),
    ({"threshold": 0.5, "kv_usage": 0.5}, ValueError, "at most one of `threshold` and `kv_usage`"),
    ({"kv_usage": NAN}, ValueError, "`kv_usage` must be a number between 0 and 1"),
    ({"kv_usage": "half"}, TypeError, "`kv_usage` must be a number between 0 and 1"),
    ({"kv_budget": 0}, ValueError, "`kv_budget` must be a positive int"),
    ({"kv_budget": 2.5}, TypeError, "`kv_budget` must be a positive int"),
    ({"kv_budget": 2**64}, ValueError, "`kv_budget` must be a positive int (kept tokens per head) below 2**63"),
    ({"kv_budget": HUGE}, ValueError, "`kv_budget` must be a positive int (kept tokens per head) below 2**63"),
    ({"kv_usage": HUGE}, ValueError, "`kv_usage` must be a number between 0 and 1"),
    ({"threshold": HUGE}, ValueError, "`threshold` must be between -2**53 and 2**53, or infinite"),
    ({"treshold": 0.5}, ValueError, "['treshold']"),
    ({"attention_mask": torch.zeros(ROWS, 3, dtype=torch.long)}, ValueError, "`attention_mask` must be [2, "),
    ({"position_ids": torch.arange(16)}, ValueError, "`position_ids` must be [2, 4] or [1, 4], got [4]"),
    ({"logits_to_keep": -1}, ValueError, "`logits_to_keep` must be 0 (all) or positive"),
    ({"cache": DynamicCache()}, TypeError, "`cache` must be a HAMCache, got DynamicCache"),
    ({"cache_implementation": "dynamic"}, ValueError, "Passing both `cache_implementation`"),
]


@pytest.mark.parametrize(("bad", "error", "message"), GENERATE, ids=name_of)
def test_generate(model, cache, bad, error, message):
    """With a conversation that goes on: the cache of the turns before survives the refusal."""
    arguments = {"cache": cache, "max_new_tokens": 3, "do_sample": False} | bad
    assert_refuses(lambda: model.generate(ids(ROWS, SEEN + NEW), **arguments), error, message, cache)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"inputs": ids() * VOCABULARY}, ValueError, "`input_ids` must be between 0 and 96"),
        ({"inputs": torch.ones(ROWS, NEW)}, TypeError, "`input_ids` must be an integer tensor"),
        (
            {"cache_implementation": "static"},
            ValueError,
            "`cache_implementation` must be None, 'dynamic' or 'offloaded'",
        ),
        (
            {"cache_implementation": "quantized"},
            ValueError,
            "`cache_implementation` must be None, 'dynamic' or 'offloaded'",
        ),
        ({"cache_implementation": "no such"}, ValueError, "`cache_implementation`"),
        ({"cache_implementation": 3}, ValueError, "`cache_implementation`"),
    ],
)
def test_generate_from_nothing(model, bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model.generate(**{"inputs": ids(), "max_new_tokens": 3} | bad)


# --- the cache -------------------------------------------------------------------------------------------------------


CACHE = [
    (lambda cache: cache.prune(None), TypeError, "`threshold` must be given"),
    (lambda cache: cache.prune("0.5"), TypeError, "`threshold` is '0.5' of type str"),
    (lambda cache: cache.prune(NAN), ValueError, "`threshold` must not be NaN"),
    (
        lambda cache: cache.prune([0.5]),
        ValueError,
        "`threshold` has 1 entries; expected a number, a list of 2 numbers",
    ),
    (lambda cache: cache.prune(torch.zeros(3)), ValueError, "`threshold` has shape [3]"),
    (lambda cache: cache.crop(-1), ValueError, "reaches past the 0 tokens recorded"),
    (lambda cache: cache.crop(2), ValueError, "`tokens_to_remove` must be 0 or negative"),
    (lambda cache: cache.crop("2"), TypeError, "`tokens_to_remove` must be 0 or a negative int, got '2'"),
    (lambda cache: cache.crop(NAN), TypeError, "`tokens_to_remove` must be 0 or a negative int, got nan"),
    (lambda cache: cache.batch_select_indices([0.5]), TypeError, "`indices` must be a tensor or list of row numbers"),
    (lambda cache: cache.batch_select_indices([2]), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.batch_select_indices([]), TypeError, "`indices` must be a tensor or list of row numbers"),
    (
        lambda cache: cache.batch_select_indices(torch.tensor([0.0])),
        TypeError,
        "`indices` must be a tensor or list of row numbers",
    ),
    (
        lambda cache: cache.batch_select_indices(torch.tensor([2])),
        ValueError,
        "`indices` must be a tensor or list of row numbers",
    ),
    (lambda cache: cache.batch_select_indices(torch.tensor([-3])), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.batch_select_indices(torch.tensor([True])), ValueError, "row numbers below 2, or 2 bools"),
    (
        lambda cache: cache.batch_select_indices(torch.tensor([False, False])),
        ValueError,
        "at least one; got [F",
    ),
    (lambda cache: cache.batch_select_indices(ids(0)), ValueError, "at least one; got []"),
    (lambda cache: cache.batch_select_indices(ids(1, 1)), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.reorder_cache(torch.tensor([0, 5])), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.batch_repeat_interleave(0), ValueError, "`repeats` must be a positive int, got 0"),
    (lambda cache: cache.batch_repeat_interleave(1.5), TypeError, "`repeats` must be a positive int, got 1.5"),
    (lambda cache: cache.batch_repeat_interleave(True), TypeError, "`repeats` must be a positive int, got True"),
    (lambda cache: cache.kept_positions(2), ValueError, "`layer_idx` must be between 0 and 1, got 2"),
    (lambda cache: cache.kept_positions(-1), ValueError, "`layer_idx` must be between 0 and 1, got -1"),
    (lambda cache: cache.kept_positions("0"), TypeError, "`layer_idx` must be an int, got '0'"),
    (lambda cache: cache.save(3), TypeError, "os.PathLike"),
    (lambda cache: HAMCache(None), TypeError, "`config` must be a HAMConfig, got NoneType"),
    (lambda cache: HAMCache(cache.config.to_dict()), TypeError, "`config` must be a HAMConfig, got dict"),
    (
        lambda cache: HAMCache(cache.config, offloading="yes"),
        TypeError,
        "`offloading` must be True or False, got 'yes'",
    ),
    (lambda cache: HAMCache(cache.config, offloading=1), TypeError, "`offloading` must be True or False, got 1"),
    (lambda cache: HAMCache.load(3, cache.config), TypeError, "os.PathLike"),
    (lambda cache: HAMCache.load("cache", None), TypeError, "`config` must be a HAMConfig, got NoneType"),
    (lambda cache: HAMCache.load("cache", cache.config, device="nowhere"), RuntimeError, "nowhere"),
]


@pytest.mark.parametrize(("call", "error", "message"), CACHE)
def test_cache_methods(cache, call, error, message):
    assert_refuses(lambda: call(cache), error, message, cache)


def test_saving_where_nothing_can_be_saved(cache, tmp_path):
    for target in (tmp_path / "no" / "such" / "folder", tmp_path):
        before = contents(cache)
        with pytest.raises((OSError, SafetensorError), match=re.escape(str(tmp_path))):
            cache.save(target)
        assert all(torch.equal(x, contents(cache)[name]) for name, x in before.items())
    assert list(tmp_path.iterdir()) == []
    assert not tmp_path.with_name(f"{tmp_path.name}.partial").exists()
