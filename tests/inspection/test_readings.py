# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A reading holds the model's own scores, kept tokens, decay and attention, and leaves the model as it was."""

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.inspection import Passage, read
from ham_hf.inspection.passages import _texts_at
from tests.cli.calls import PROMPT, byte_tokenizer
from tests.inspection.texts import passage

LENGTH = 45
# Each keeps a part of the tokens.
THRESHOLDS = dict.fromkeys(("cosine", "l2", "learned", "learned_error", "random"), 0.5)
THRESHOLDS |= {"residual": 0.333, "recency": 20 / 2**24}


def model_of(config):
    torch.manual_seed(0)
    return HAMForCausalLM(config).eval()


@torch.no_grad()
def call(model, text, **arguments):
    return model(text.ids, use_cache=True, output_routing_scores=True, **arguments)


def marks(cache, layer, length):
    """`[T, Hk]` bool from the positions in a cache."""
    found = torch.zeros(length, cache.config.num_key_value_heads, dtype=torch.bool)
    for head, positions in enumerate(cache.kept_positions(layer)[0]):
        found[positions.long(), head] = True
    return found


@pytest.mark.parametrize(("router", "threshold"), THRESHOLDS.items())
def test_scores_and_kept_tokens_are_those_of_the_model(tiny_config, router, threshold):
    model, text = model_of(tiny_config(router=router)), passage(LENGTH)
    found = read(model, text, threshold=threshold, query=30)
    expected = call(model, text, threshold=threshold)
    scores = torch.stack(expected.routing_scores)[:, 0]
    torch.testing.assert_close(found.scores, scores)
    assert 0 < found.kept.float().mean() < 1
    assert torch.equal(found.kept, scores >= threshold)
    for layer in (0, 1):
        assert torch.equal(found.kept[layer], marks(expected.cache, layer, LENGTH))
    assert torch.equal(found.held, found.kept)
    assert found.router == router


def test_thresholds_are_those_in_force(tiny_config):
    model, text = model_of(tiny_config()), passage(20)
    with torch.no_grad():
        model.model.layers[1].mixer.threshold.copy_(torch.tensor([0.4, 0.6]))
        for layer in model.model.layers:
            layer.mixer.score_quantiles.copy_(torch.linspace(0, 1, layer.mixer.score_quantiles.shape[1]))
    asked = (
        ({}, [[0.5, 0.5], [0.4, 0.6]], "learned thresholds"),
        ({"threshold": 0.3}, [[0.3, 0.3], [0.3, 0.3]], "threshold 0.3"),
        ({"threshold": [0.2, 0.7]}, [[0.2, 0.2], [0.7, 0.7]], "thresholds of each layer"),
        ({"kv_usage": 0.25}, [[0.75, 0.75], [0.75, 0.75]], "kv-usage 0.25"),
        ({"threshold": 0.3, "kv_budget": 4}, [[0.3, 0.3], [0.3, 0.3]], "threshold 0.3, kv-budget 4"),
    )
    for arguments, thresholds, setting in asked:
        found = read(model, text, **arguments)
        torch.testing.assert_close(found.thresholds, torch.tensor(thresholds))
        assert found.setting == setting
        if "kv_budget" not in arguments:
            assert torch.equal(found.kept, found.scores >= found.thresholds[:, None])


def test_window_and_sinks_are_held(tiny_config):
    model = model_of(tiny_config(attention_window=[6, 0], attention_sinks=[2, 3]))
    found, expected = read(model, passage(LENGTH), threshold=2.0), call(model, passage(LENGTH), threshold=2.0)
    assert (found.windows, found.sinks) == ((6, 0), (2, 3))
    assert found.kept.sum(1).tolist() == [[2, 2], [3, 3]]
    assert torch.equal(found.held.sum(1), expected.cache.held_tokens()[:, 0])
    assert found.held[0, :, 0].nonzero().flatten().tolist() == [0, 1, *range(LENGTH - 5, LENGTH)]


@pytest.mark.parametrize("window", [0, 4])
def test_a_budget_leaves_what_the_cache_holds(tiny_config, window):
    model, text = model_of(tiny_config(attention_window=window)), passage(LENGTH)
    found = read(model, text, threshold=0.0, kv_budget=7)
    cache = call(model, text, threshold=0.0, kv_budget=7).cache
    assert found.held.sum(1).tolist() == [[7, 7], [7, 7]]
    assert torch.equal(found.held.sum(1), cache.held_tokens()[:, 0])
    assert all(torch.equal(found.kept[layer], marks(cache, layer, LENGTH)) for layer in (0, 1))


@pytest.mark.parametrize("query", [None, 0, 17, LENGTH - 1])
def test_decay_is_that_of_the_mixer(tiny_config, query):
    model, text = model_of(tiny_config()), passage(LENGTH)
    found, inputs = read(model, text, threshold=0.5, query=query), []
    mixers = [layer.mixer for layer in model.model.layers]
    handles = [mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for mixer in mixers]
    call(model, text, threshold=0.5)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        decay = [mixer._rnn_gates(x, None)[0].exp()[0] for mixer, x in zip(mixers, inputs, strict=True)]
    torch.testing.assert_close(found.decay, torch.stack(decay))


@pytest.mark.parametrize("query", [0, 30, LENGTH - 1])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_is_that_of_a_whole_call(tiny_config, query, window):
    kinds = ["full_attention", "hybrid", "linear_attention", "hybrid"]
    config = tiny_config(num_hidden_layers=4, layer_types=kinds, attention_window=window)
    model, text = model_of(config), passage(LENGTH)
    found = read(model, text, threshold=0.5, query=query)
    whole = [x for x in call(model, text, threshold=0.5, output_attentions=True).attentions if x is not None]
    assert found.layers == (1, 3)
    assert found.left_out == ((0, "full_attention"), (2, "linear_attention"))
    # The layers with attention are 0, 1 and 3.
    torch.testing.assert_close(found.attention, torch.stack([whole[1], whole[2]])[:, 0, :, query])
    torch.testing.assert_close(found.attention.sum(-1), torch.ones(2, 4))
    seen = found.attention.unflatten(1, (2, 2)).ne(0).all(2).mT
    assert torch.equal(found.visible, seen)
    assert found.visible[:, query].all()


def test_nothing_is_left_on_the_model(tiny_config):
    model = model_of(tiny_config())
    call(model, passage(9))  # installs Transformers' own hooks

    def state():
        return [(dict(x._forward_hooks), dict(x._forward_pre_hooks), set(vars(x))) for x in model.modules()]

    before = state()
    read(model, passage(9), threshold=0.5, query=3)
    assert state() == before
    with pytest.raises(ValueError, match="quantiles"):
        read(model, passage(9), kv_usage=0.5)
    assert state() == before


def test_refused_readings(tiny_config):
    model, text = model_of(tiny_config()), passage(9)
    with pytest.raises(ValueError, match=r"`query` must be a position from 0 to 8, got 9\."):
        read(model, text, query=9)
    with pytest.raises(ValueError, match="`query` cannot be combined with `kv_budget`"):
        read(model, text, query=2, kv_budget=4)
    with pytest.raises(TypeError, match="`model` must be a HAMForCausalLM, got Linear"):
        read(torch.nn.Linear(2, 2), text)
    with pytest.raises(ValueError, match="`model` must have a layer of type 'hybrid'"):
        read(model_of(tiny_config(layer_types=["linear_attention"] * 2)), text)
    with pytest.raises(ValueError, match="`start` and `stop` must rise within 0 to 9, got 4 and 10"):
        read(model, text).part(4, 10)


def test_a_part_is_cut_from_everything(tiny_config):
    whole = read(model_of(tiny_config()), passage(LENGTH), threshold=0.5, query=30)
    part = whole.part(10, 40).part(12, 25)
    assert (part.first, part.seen, part.texts) == (12, LENGTH, whole.texts[12:25])
    for name in ("scores", "kept", "held", "decay", "visible"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, 12:25])
    assert torch.equal(part.attention, whole.attention[:, :, 12:25])
    assert torch.equal(whole.kept_share, whole.kept.float().mean(2))


def test_the_tokens_of_a_text():
    tokenizer = byte_tokenizer()
    whole = Passage.of(tokenizer, PROMPT)
    assert whole.ids[0].tolist() == tokenizer(PROMPT).input_ids
    assert "".join(whole.texts) == PROMPT
    assert len(whole.texts) == whole.ids.shape[1] == whole.total
    cut = Passage.of(tokenizer, PROMPT, 12)
    assert (cut.texts, cut.total) == (whole.texts[:12], whole.total)
    assert torch.equal(cut.ids, whole.ids[:, :12])
    assert Passage.of(tokenizer, "a<|endoftext|>b").texts == ("a", "<|endoftext|>", "b")
    spread = _texts_at("abcdef", [(0, 1), (1, 3), (1, 2), (4, 5), (0, 0), (5, 6)])
    assert spread == ["a", "bc", "", "de", "", "f"], "every letter once, whichever tokens share it"
    with pytest.raises(ValueError, match="at least one token"):
        Passage.of(tokenizer, "")
    with pytest.raises(ValueError, match="`length` must be a positive int or None, got 0"):
        Passage.of(tokenizer, "a", 0)
