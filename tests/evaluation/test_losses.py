# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Losses and bytes of an evaluation are those of Transformers' own loss and of the cache itself."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.evaluation.losses import (
    WindowFigures,
    cache_bytes,
    repeated_tokens,
    summary,
    token_losses,
    window_figures,
)

SETTINGS = [{}, {"threshold": 0.0}, {"kv_usage": 0.5}, {"threshold": 0.0, "kv_budget": 20}]


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    model = HAMForCausalLM(tiny_config()).eval()
    calibrate(model, [windows(2, 96, 1)])
    return model


def windows(count, length=80, seed=3):
    return torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(seed))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


@pytest.mark.parametrize("memory", SETTINGS)
def test_losses_are_those_of_transformers_and_bytes_those_of_the_cache(model, memory):
    for tokens in windows(2).split(1):
        (found,) = window_figures(model, tokens, **memory)
        outputs = model(tokens, labels=tokens, use_cache=True, **memory)
        assert found.loss == pytest.approx(outputs.loss.item(), rel=1e-5)
        cache = outputs.cache
        assert found.kept == pytest.approx((cache.kept_tokens() / 80).mean().item())
        assert found.held == pytest.approx(cache.kv_usage().mean().item())
        assert found.kv_bytes == cache.memory_bytes() - cache.state_bytes()
        assert found.full_kv_bytes == cache.full_kv_bytes()
        assert found.state_bytes == cache.state_bytes()


def test_the_second_time_is_the_loss_of_a_copy_without_its_first_token(model):
    tokens = windows(1)
    again = tokens.clone()
    again[:, 70:] = tokens[:, :10]
    labels = again.masked_fill(torch.arange(80) < 71, -100)
    (found,) = window_figures(model, tokens, threshold=0.0)
    assert found.second_time == pytest.approx(model(again, labels=labels, threshold=0.0).loss.item(), rel=1e-5)


def test_parts_of_the_loss_make_the_whole(model):
    tokens = windows(1)
    tokens[0, 40:60] = tokens[0, 10:30]
    (found,) = window_figures(model, tokens)
    repeated = 18 + int(repeated_tokens(tokens)[0, 60:].sum())
    assert found.loss * 79 == pytest.approx(found.first * (79 - repeated) + found.repeated * repeated, rel=1e-5)
    sizes = [len(x) for x in torch.zeros(79).tensor_split(8)]
    assert found.loss * 79 == pytest.approx(sum(a * n for a, n in zip(found.parts, sizes, strict=True)), rel=1e-5)
    losses, _ = token_losses(model, tokens)
    assert found.parts[-1] == pytest.approx(losses[0, -sizes[-1] :].mean().item(), rel=1e-5)


def test_repeated_tokens_by_hand():
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 2, 3], [5, 5, 5, 5, 5, 1, 2, 1, 2, 1]])
    assert repeated_tokens(rows).int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("memory", SETTINGS)
def test_a_batch_gives_what_its_rows_give_alone(model, memory):
    tokens = windows(3)
    together = window_figures(model, tokens, **memory)
    for x, row in zip(together, tokens.split(1), strict=True):
        (alone,) = window_figures(model, row, **memory)
        assert x.kept == alone.kept
        assert x.held == alone.held
        for name in ("loss", "second_time", "first"):
            assert getattr(x, name) == pytest.approx(getattr(alone, name), rel=1e-5), name
        assert x.parts == pytest.approx(alone.parts, rel=1e-5)


def test_other_models_tell_the_bytes_of_their_caches():
    tokens = windows(2)
    model = llama()
    found = window_figures(model, tokens)[0]
    assert found.loss == pytest.approx(model(tokens[:1], labels=tokens[:1]).loss.item(), rel=1e-5)
    assert found.kv_bytes == 2 * 2 * 80 * 32 * 4, "layers, keys and values, tokens, width, float32"
    assert (found.kept, found.held, found.full_kv_bytes, found.state_bytes) == (None, None, None, 0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    found = window_figures(mamba, tokens)[0]
    assert found.loss == pytest.approx(mamba(tokens[:1], labels=tokens[:1]).loss.item(), rel=1e-4)
    assert found.kv_bytes == 0
    assert found.state_bytes >= 2 * 64 * 4 * 4, "layers, inner width, states, float32"
    assert cache_bytes(None) == (None, None)


def test_layers_without_attention_keep_no_share_of_the_tokens():
    config = HAMConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layer_types=["linear_attention"] * 2
    )
    found = window_figures(HAMForCausalLM(config).eval(), windows(2))
    assert [(x.kept, x.held, x.full_kv_bytes) for x in found] == [(None, None, 0)] * 2
    assert summary(found)["usage"] is None


def test_a_model_without_logits_to_keep_gives_all_its_logits():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)).eval()
    tokens = windows(1)
    whole = token_losses(model, tokens)[0]
    forward = model.forward
    model.forward = lambda input_ids, use_cache=None: forward(input_ids, use_cache=use_cache)
    assert torch.equal(token_losses(model, tokens)[0], whole)
    assert torch.equal(token_losses(model, tokens, 5)[0], whole[:, -5:])


def test_a_window_that_is_too_short_is_refused(model):
    with pytest.raises(ValueError, match="`tokens` must have windows of at least 16, got 15"):
        window_figures(model, windows(1, 15))


def test_a_summary_is_the_mean_and_leaves_out_what_is_missing():
    figures = {"second_time": 1.0, "parts": [1.0, 3.0], "kept": 0.5, "held": 0.6, "full_kv_bytes": 8, "state_bytes": 2}
    x = WindowFigures(loss=1.0, first=2.0, repeated=None, kv_bytes=3, **figures)
    y = WindowFigures(loss=4.0, first=3.0, repeated=7.0, kv_bytes=6, **(figures | {"parts": [2.0, 5.0]}))
    found = summary([x, y])
    assert (found["loss"], found["losses"]) == (2.5, [1.0, 4.0])
    assert (found["first_loss"], found["repeated_loss"]) == (2.5, 7.0)
    assert found["losses_by_part"] == [1.5, 4.0]
    assert found["kv_bytes"] == round(4.5)
    assert math.isclose(found["usage"], 0.5)
    assert summary([x])["repeated_loss"] is None
