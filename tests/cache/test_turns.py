# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A conversation of several turns in one batch equals each row alone: rows that end, masks, drafts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_hf import HAMCache, HAMForCausalLM

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def model(tiny_config):
    """A model that ends rows often: the bias of its head is towards the end of a text."""
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=3, layer_types=["hybrid", "linear_attention", "hybrid"], vocab_size=13)
    model = HAMForCausalLM(config).eval().requires_grad_(False)
    for x in model.parameters():
        if x.ndim > 1:
            torch.nn.init.normal_(x, std=0.4)
    return model


def turn(model, rows, cache=None, **arguments):
    """One turn of `generate` for token lists `rows`, whose past holds as many tokens a row; padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, model.generate(ids, attention_mask=mask, cache=cache, **settings_of_a_turn(arguments))


def settings_of_a_turn(arguments):
    return {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS} | arguments


def ended(generated):
    """`[B, n]` bool of generated tokens that come after the end of their row."""
    ends = (generated == EOS).long().cumsum(1) - (generated == EOS).long()
    return ends > 0


prompts = st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=9), min_size=2, max_size=4)
routing = st.sampled_from(
    [{"threshold": 0.45}, {"threshold": 0.0}, {"threshold": 2.0}, {"threshold": 0.3, "kv_budget": 5}]
)


@settings(max_examples=25, deadline=None)
@given(
    prompts=prompts,
    new=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    routing=routing,
    steps=st.integers(1, 14),
)
def test_turns_of_a_batch_equal_each_row_alone(model, prompts, new, routing, steps):
    cache = HAMCache(model.config)
    ids, mask, first = turn(model, prompts, cache, max_new_tokens=steps, **routing)
    generated = first[:, ids.shape[1] :]
    padding = ended(generated)
    held = cache.past_real()
    whole_mask = torch.cat([mask, (~padding).long()], dim=1)
    seen = cache.get_seq_length()
    assert torch.equal(
        whole_mask[:, :seen].bool(), torch.ones(len(ids), seen, dtype=torch.bool) if held is None else held
    )
    assert torch.equal(cache.real_tokens, whole_mask[:, :seen].sum(1)), "a row that has ended takes nothing in"

    more = torch.tensor(new).expand(len(ids), -1)
    second_ids = torch.cat([first, more], dim=1)
    second_mask = torch.cat([whole_mask, torch.ones_like(more)], dim=1)
    second = model.generate(
        second_ids, attention_mask=second_mask, cache=cache, **settings_of_a_turn({"max_new_tokens": 6} | routing)
    )[:, second_ids.shape[1] :]
    for row, real in enumerate(second_mask.bool()):
        own = HAMCache(model.config)
        alone = second_ids[row][real][None]
        # In the same two parts, as a budget forgets in the order in which tokens come.
        model(alone[:, : int(whole_mask[row, :seen].sum())], cache=own, **routing)
        expected = model.generate(
            alone,
            attention_mask=torch.ones_like(alone),
            cache=own,
            **settings_of_a_turn({"max_new_tokens": 6} | routing),
        )[0, alone.shape[1] :].tolist()
        found = second[row].tolist()
        assert found[: len(expected)] == expected
        assert set(found[len(expected) :]) <= {PAD}
        assert cache.kept_tokens()[0, row].tolist() == own.kept_tokens()[0, 0].tolist() or len(found) > len(expected)


def test_a_row_that_has_ended_costs_nothing_more(model):
    """Its bytes and its usage are those at its end."""
    torch.manual_seed(3)
    for _ in range(50):
        rows = torch.randint(2, 13, (2, 6)).tolist()
        _, _, both = turn(model, rows, HAMCache(model.config), max_new_tokens=60, threshold=0.0)
        lengths = (~ended(both[:, 6:])).sum(1).tolist()
        if min(lengths) < 10 and max(lengths) > 40:
            break
    short = lengths.index(min(lengths))
    cache = HAMCache(model.config)
    turn(model, rows, cache, max_new_tokens=60, threshold=0.0)
    assert cache.real_tokens[short] == 6 + lengths[short]
    assert (cache.kept_tokens()[[0, 2], short] == 6 + lengths[short]).all()


def test_a_mask_that_contradicts_the_cache_is_refused(model):
    cache = HAMCache(model.config)
    model(torch.tensor([[3, 4, 5]]), cache=cache, threshold=0.0)
    before = copy.deepcopy(cache)
    message = "`attention_mask` contradicts `cache`: token 1 of row 0 is padding now and was real"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[6]]), attention_mask=torch.tensor([[1, 0, 0, 1]]), cache=cache)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[3, 4, 5, 6]]), attention_mask=torch.tensor([[1, 0, 0, 1]]), cache=cache)
    found, expected = (model(torch.tensor([[6]]), cache=x, threshold=0.0).logits for x in (cache, before))
    assert torch.equal(found, expected)


def test_generate_without_a_mask_does_not_turn_padding_into_tokens(model):
    cache = HAMCache(model.config)
    ids, mask = torch.tensor([[PAD, PAD, 3], [4, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    model(ids, attention_mask=mask, cache=cache, threshold=0.0)
    more = torch.cat([ids, torch.tensor([[7], [8]])], dim=1)
    with pytest.raises(ValueError, match="token 0 of row 0 is real now and was padding"):
        model.generate(more, attention_mask=torch.ones_like(more), cache=cache, **settings_of_a_turn({}))


@pytest.mark.parametrize("change", ["select", "repeat", "crop", "copy", "save"])
def test_padding_moves_with_the_cache(model, tmp_path, change):
    ids, mask = torch.tensor([[PAD, PAD, 3, 4], [4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    model(ids, attention_mask=mask, cache=cache, threshold=0.0)
    expected = mask.bool()
    if change == "select":
        cache.batch_select_indices([1, 0])
        expected = expected[[1, 0]]
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        expected = expected.repeat_interleave(2, 0)
    elif change == "crop":
        cache.crop(-3)
        expected = expected[:, :1]
    elif change == "copy":
        cache = copy.deepcopy(cache)
    else:
        cache.save(tmp_path / "cache")
        cache = HAMCache.load(tmp_path / "cache", model.config)
    assert torch.equal(cache.past_real(), expected)
    cache.reset()
    assert cache.past_real() is None


# --- drafts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistant(tiny_config):
    torch.manual_seed(1)
    return HAMForCausalLM(tiny_config(num_hidden_layers=1, vocab_size=13)).eval()


def test_a_conversation_with_drafts_in_some_turns(model, assistant):
    """Recording for drafts ends with the turn: text, bytes and budgets are those of ordinary turns."""
    torch.manual_seed(5)
    cache, plain = HAMCache(model.config), HAMCache(model.config)
    ids = torch.randint(2, 13, (1, 20))
    arguments = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": PAD, "threshold": 0.4}
    for drafts in (True, False, True, True):
        expected = model.generate(ids, cache=plain, **arguments)
        found = model.generate(ids, cache=cache, **arguments, **({"assistant_model": assistant} if drafts else {}))
        assert torch.equal(found, expected)
        # Drafts may leave the last token in or out of the cache.
        assert abs(cache.get_seq_length() - plain.get_seq_length()) <= 1
        assert cache.memory_bytes() <= plain.memory_bytes() * 1.2
        ids = torch.cat([expected, torch.randint(2, 13, (1, 7))], dim=1)
    model.generate(ids, cache=cache, **arguments, kv_budget=5)
    assert cache.kept_tokens().max() <= 5


def test_recording_ends_when_a_turn_with_drafts_fails(model, assistant):
    cache = HAMCache(model.config)

    def fail(*_):
        raise OSError("no more")

    hook = assistant.register_forward_pre_hook(fail)
    try:
        with pytest.raises(OSError, match="no more"):
            model.generate(torch.tensor([[3, 4, 5]]), cache=cache, assistant_model=assistant, max_new_tokens=5)
    finally:
        hook.remove()
    assert not any(layer.record_past for layer in cache.layers)


def test_reset_ends_recording(model):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    cache.reset()
    model(torch.randint(2, 13, (1, 30)), cache=cache, threshold=0.0, kv_budget=4)
    assert cache.kept_tokens().max() == 4
