# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What a user does with a model that holds recent and first tokens: settings, generation, budgets, files, weights."""

import statistics
import time

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM
from tests.model.models import moved, tokens

LAYERS = ["hybrid", "linear_attention", "hybrid", "full_attention"]
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def make(tiny_config):
    def make(**settings):
        torch.manual_seed(0)
        kinds = {"num_hidden_layers": 4, "layer_types": LAYERS}
        windows = {"attention_window": 6, "attention_sinks": 2}
        return moved(HAMForCausalLM(tiny_config(**kinds | windows | settings)).eval().requires_grad_(False))

    return make


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention_window", "attention_sinks"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "must be between 0 and 16777216, got -1"),
        (2**24 + 1, "must be between 0 and 16777216"),
        ([1, 2], r"must be one int, or have one entry per layer: `num_hidden_layers` \(4\), got 2"),
        ([1, 2, -3, 4], r"must be between 0 and 16777216, got \[1, 2, -3, 4\]"),
        (True, "attention"),
        (1.5, "attention"),
        ("many", "attention"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(name, value, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        HAMConfig(num_hidden_layers=4, **{name: value})


def test_only_hybrid_layers_have_windows_and_sinks(tiny_config):
    config = tiny_config(num_hidden_layers=4, layer_types=LAYERS, attention_window=[1, 2, 3, 4], attention_sinks=5)
    assert [config.window_of(i) for i in range(4)] == [1, 0, 3, 0]
    assert [config.sinks_of(i) for i in range(4)] == [5, 0, 5, 0]


def test_they_are_saved_and_may_be_given_to_from_pretrained(make, tmp_path):
    make(attention_window=[6, 0, 9, 0]).save_pretrained(tmp_path)
    config = HAMForCausalLM.from_pretrained(tmp_path).config
    assert (config.attention_window, config.attention_sinks) == ([6, 0, 9, 0], 2)
    model = HAMForCausalLM.from_pretrained(tmp_path, attention_window=3, attention_sinks=0)
    assert [layer.mixer.window for layer in model.model.layers] == [3, 0, 3, 0]
    assert model(tokens(1, 9), threshold=2.0).cache.held_tokens()[0].tolist() == [[2, 2]]


# --- what is held ----------------------------------------------------------------------------------------------------


def test_reports_tell_what_is_held_and_what_the_router_kept(make):
    cache = make()(tokens(2, 40), threshold=2.0).cache
    held, kept = cache.held_tokens(), cache.kept_tokens()
    for layer, (most, routed) in enumerate([(7, 2), (0, 0), (7, 2), (40, 40)]):
        assert (held[layer] == most).all()
        assert (kept[layer] == routed).all()
    assert torch.equal(cache.kv_usage(), held / 40)
    assert cache.kept_positions(0)[1][0].tolist() == [0, 1]
    # A short text is in the window as a whole.
    assert (make()(tokens(1, 4), threshold=2.0).cache.held_tokens()[0] == 4).all()


@pytest.mark.parametrize("ids_in_calls", [[40], [12, 1, 1, 26], [1] * 40], ids=str)
def test_a_budget_bounds_all_that_is_held(ids_in_calls, make):
    model, cache = make(), HAMCache(make().config)
    for ids in tokens(2, 40).split(ids_in_calls, 1):
        model(ids, cache=cache, threshold=0.0, kv_budget=11)
        held = cache.held_tokens()[[0, 2]]
        assert (held == min(cache.get_seq_length(), 11)).all()
    assert all(positions[0][:2].tolist() == [0, 1] for positions in cache.kept_positions(0)), "a budget drops no sink"


@pytest.mark.parametrize("budget", [1, 8])
def test_a_budget_must_exceed_window_and_sinks(budget, make):
    with pytest.raises(ValueError, match=f"exceed the window and the sinks of a layer, 8 tokens .*, got {budget}"):
        make()(tokens(1, 4), kv_budget=budget)
    make()(tokens(1, 4), kv_budget=9)


def test_pruning_leaves_what_the_threshold_would_have_kept(make):
    model, ids = make(router="random"), tokens(2, 40)
    cache, expected = (model(ids, threshold=threshold).cache for threshold in (0.2, 0.7))
    cache.prune(0.7)
    for layer in (0, 2):
        for found, wanted in zip(cache.kept_positions(layer), expected.kept_positions(layer), strict=True):
            assert [x.tolist() for x in found] == [x.tolist() for x in wanted]
    # It also holds for tokens that were in the window, and the other layers went on from the lower threshold.
    for _ in range(10):
        model(tokens(2, 1), cache=cache, threshold=2.0)
    assert [x.tolist() for x in cache.kept_positions(0)[0]] == [x.tolist() for x in expected.kept_positions(0)[0]]


def test_attention_weights_show_the_window_and_the_sinks(make):
    model, ids = make(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = model(ids, attention_mask=mask, threshold=2.0, output_attentions=True)
    seen = whole.attentions[0][0, 0] > 0
    t = torch.arange(20)
    assert torch.equal(seen, (t[:, None] >= t) & ((t[:, None] - t < 6) | (t < 2)))
    padded = whole.attentions[0][1, 0, 5:] > 0
    p = t[5:] - 5
    assert torch.equal(padded[:, 5:], (p[:, None] >= p) & ((p[:, None] - p < 6) | (p < 2)))
    assert not padded[:, :5].any()
    first = model(ids[:, :14], attention_mask=mask[:, :14], threshold=2.0)
    later = model(ids[:, 14:], attention_mask=mask, cache=first.cache, threshold=2.0, output_attentions=True)
    torch.testing.assert_close(later.attentions[0], whole.attentions[0][:, :, 14:], atol=1e-6, rtol=0)
    torch.testing.assert_close(later.logits, whole.logits[:, 14:], atol=1e-5, rtol=0)


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}, {"cache_implementation": "offloaded"}],
    ids=str,
)
def test_every_way_to_generate_writes_the_greedy_text(way, make):
    model, ids = make(), tokens(1, 12).repeat(1, 3)
    arguments = {"max_new_tokens": 20, "threshold": 0.5, **GREEDY}
    expected = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert torch.equal(model.generate(ids, **arguments, **way), expected)


def test_beams_are_reordered_with_their_windows(make):
    model, ids = make(), tokens(2, 9)
    arguments = {"max_new_tokens": 14, "num_beams": 3, "threshold": 0.5, **GREEDY}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"attention_window": 7}, {"attention_sinks": 3}, {"attention_window": 0}], ids=str)
def test_the_cache_of_another_window_is_refused(other, make, tmp_path):
    cache = make()(tokens(1, 9)).cache
    cache.save(tmp_path / "cache")
    model, name = make(**other), next(iter(other))
    with pytest.raises(ValueError, match=f"`{name}` {getattr(cache.config, name)} instead of {other[name]}"):
        HAMCache.load(tmp_path / "cache", model.config)
    with pytest.raises(ValueError, match=f"`cache` gives the cache of a model of another .*`{name}`"):
        model(tokens(1, 1), cache=cache)


def test_a_file_from_before_windows_still_loads(make, tmp_path, monkeypatch):
    from ham_hf import cache_file_ham

    model = make(attention_window=0, attention_sinks=0)
    older = [name for name in cache_file_ham.CONTENT_FIELDS if name not in cache_file_ham.NEWER_FIELDS]
    with monkeypatch.context() as before:
        before.setattr(cache_file_ham, "CONTENT_FIELDS", older)
        model(tokens(1, 9)).cache.save(tmp_path / "cache")
    model(tokens(1, 1), cache=HAMCache.load(tmp_path / "cache", model.config))
    with pytest.raises(ValueError, match="`attention_window` 0 instead of 6"):
        HAMCache.load(tmp_path / "cache", make().config)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda layer: layer.recent.scores.fill_(-1),
            "`recent_scores` must be between 0 and 1, or inf",
        ),
        (lambda layer: layer.recent.keys.fill_(torch.nan), "`recent_keys` must be finite"),
        (lambda layer: setattr(layer.recent, "keep", layer.recent.keep.long()), "`recent_keep` must be"),
        (lambda layer: setattr(layer.recent, "values", layer.recent.values[:, 1:]), "`recent_values` must be"),
    ],
    ids=["scores", "not finite", "dtype", "shape"],
)
def test_a_window_that_makes_no_sense_is_not_saved(spoil, message, make, tmp_path):
    cache = make()(tokens(1, 9)).cache
    spoil(cache.layers[0])
    with pytest.raises(ValueError, match=message):
        cache.save(tmp_path / "cache")


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prefill", "step"])
def test_a_window_costs_what_as_many_kept_tokens_cost(what, tiny_config):
    """Within 15%, in runs in turn: 8,000 tokens of which each head holds as many with a window as without."""
    length, window = 8000, 256
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"head_dim": 32, "router": "random"}
    models = {
        "window": HAMForCausalLM(tiny_config(attention_window=window, **sizes)).eval(),
        "none": HAMForCausalLM(tiny_config(**sizes)).eval(),
    }
    # A quarter is held at the end, so of the tokens before the window a smaller share is kept.
    thresholds = {"window": 1 - (length / 4 - window) / (length - window), "none": 0.75}
    ids, caches, times = torch.randint(1, 97, (1, length)), {}, {name: [] for name in models}
    with torch.no_grad():
        for name, model in models.items():
            caches[name] = model(ids, threshold=thresholds[name], logits_to_keep=1).cache
        held = {name: cache.held_tokens().float().mean().item() for name, cache in caches.items()}
        assert held["window"] == pytest.approx(held["none"], rel=0.05)
        for _ in range(5 if what == "prefill" else 60):
            for name, model in models.items():
                begin = time.perf_counter()
                if what == "prefill":
                    model(ids, threshold=thresholds[name], logits_to_keep=1)
                else:
                    model(ids[:, :1], cache=caches[name], threshold=thresholds[name])
                times[name].append(time.perf_counter() - begin)
    pick = min if what == "prefill" else statistics.median
    ratio = pick(times["window"]) / pick(times["none"])
    print(f"\n{what}: {ratio:.2f} of the time without a window")
    assert ratio <= 1.15
