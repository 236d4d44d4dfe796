# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The two controls among the routers, `random` and `recency`, whose scores are computed from positions alone."""

import itertools

import pytest
import torch

from ham_hf import HAMForCausalLM, HAMModel
from ham_hf.evaluation import calibrate
from ham_hf.routing_ham import random_score, recency_score

# --------------------------------------------------------------------------- random


def test_random_scores_are_uniform():
    scores = random_score(torch.arange(20000)[None], layer_idx=3, num_heads=4)[0]
    assert scores.dtype == torch.float32
    for head in range(4):
        x = scores[:, head].sort().values
        assert x[0] >= 0
        assert x[-1] < 1
        assert abs(x.mean() - 0.5) < 0.01
        distance = (x - torch.linspace(0, 1, len(x))).abs().max()  # Kolmogorov-Smirnov
        assert distance < 1.95 / len(x) ** 0.5, f"not uniform at p = 0.001: {distance:.4f}"
        assert len(x.unique()) > 0.99 * len(x)


def test_random_scores_of_layers_heads_and_neighbours_are_unrelated():
    scores = torch.stack([random_score(torch.arange(8000)[None], layer, 4)[0] for layer in range(6)])
    streams = scores.permute(0, 2, 1).flatten(0, 1)
    streams = torch.cat([streams[:, :-1], streams[:1, 1:]])  # the last: the first, one position on
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / 8000**0.5
    kept = (streams < 0.1).float()
    both = (kept @ kept.T / kept.shape[1])[~torch.eye(len(kept), dtype=torch.bool)]
    assert (both - 0.01).abs().max() < 0.006, "tails must be unrelated too: thresholds keep tails"


def test_random_scores_depend_on_position_layer_and_head_only(tiny_config):
    ids, other = torch.randint(1, 97, (2, 30)), torch.randint(1, 97, (1, 30))
    models = [HAMModel(tiny_config(router="random")).eval() for _ in range(2)]
    scores = [m(ids, output_routing_scores=True).routing_scores for m in models]
    content = models[0](other, output_routing_scores=True, threshold=2.0).routing_scores
    for layer in range(2):
        expected = random_score(torch.arange(30)[None], layer, 2)
        assert torch.equal(scores[0][layer], expected.expand(2, -1, -1))
        assert torch.equal(scores[1][layer], scores[0][layer]), "weights must not matter"
        assert torch.equal(content[layer], expected), "neither tokens nor batch nor threshold may matter"
    assert not torch.equal(scores[0][0], scores[0][1])


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_random_scores_do_not_see_padding(side, tiny_config):
    model = HAMModel(tiny_config(router="random")).eval()
    mask = torch.ones(1, 15, dtype=torch.long)
    mask[0, {"left": slice(0, 5), "right": slice(10, 15), "middle": slice(4, 9)}[side]] = 0
    output = model(torch.randint(1, 97, (1, 15)), attention_mask=mask, output_routing_scores=True)
    for layer, scores in enumerate(output.routing_scores):
        assert torch.equal(scores[mask.bool()], random_score(torch.arange(10)[None], layer, 2)[0])


@pytest.mark.parametrize("padding", [0, 4], ids=["unpadded", "left-padded"])
def test_random_scores_restart_with_each_document(padding, tiny_config):
    model = HAMModel(tiny_config(router="random")).eval()
    documents = torch.cat([torch.arange(7), torch.arange(5)])[None]
    arguments = {
        "position_ids": torch.nn.functional.pad(documents, (padding, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones(1, 12, dtype=torch.long), (padding, 0)),
    }
    output = model(torch.randint(1, 97, (1, padding + 12)), output_routing_scores=True, **arguments)
    assert output.cache is None, "the row must count as packed"
    assert torch.equal(output.routing_scores[0][:, padding:], random_score(documents, 0, 2))


# --------------------------------------------------------------------------- recency


def test_recency_scores_rise_with_every_position():
    ends = [torch.arange(1000), torch.arange(2**20 - 500, 2**20 + 500), torch.arange(2**24 - 500, 2**24)]
    for positions in ends:
        scores = recency_score(positions[None], 3)
        assert scores.shape == (1, len(positions), 3)
        assert scores.dtype == torch.float32
        assert (scores.diff(dim=1) > 0).all()
        assert torch.equal(scores * 2**24, positions[None, :, None].float().expand(1, -1, 3))
    beyond = recency_score(torch.tensor([[2**24 - 1, 2**24, 2**40]]), 1)
    assert (beyond < 1).all(), "a threshold of 1 keeps none of them"
    assert (beyond.diff(dim=1) == 0).all()


@pytest.mark.parametrize("cuts", [[25], [10, 15], [1] * 25, [20, 1, 1, 3]], ids=str)
def test_with_a_budget_recency_holds_exactly_the_last_tokens(cuts, tiny_config):
    model = HAMModel(tiny_config(router="recency")).eval()
    ids = torch.randint(1, 97, (2, 25))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache, seen = None, 0
    for cut in cuts:
        seen += cut
        cache = model(ids[:, seen - cut : seen], attention_mask=mask[:, :seen], cache=cache, kv_budget=6).cache
        for layer, row in itertools.product(range(2), range(2)):
            real = int(mask[row, :seen].sum())
            for positions in cache.kept_positions(layer)[row]:
                assert positions.tolist() == list(range(max(0, real - 6), real))


def test_recency_is_attention_in_a_window(tiny_config):
    """With the RNN shut, a token's output in a row of 25 is that in the row that begins where its window does."""
    model = HAMModel(tiny_config(router="recency", num_hidden_layers=1, rope_parameters=None)).eval()
    mixer = model.layers[0].mixer
    torch.nn.init.constant_(mixer.rnn_gate_proj.bias, -1e4)
    torch.nn.init.zeros_(mixer.conv.weight[:, :-1])
    ids = torch.randint(1, 97, (1, 25))
    whole = model(ids, kv_budget=6, use_cache=False).last_hidden_state
    for end in (7, 12, 25):
        window = model(ids[:, end - 7 : end], use_cache=False).last_hidden_state
        torch.testing.assert_close(whole[:, end - 1], window[:, -1], rtol=0, atol=1e-5)
    assert not torch.allclose(model(ids, use_cache=False).last_hidden_state[:, -1], whole[:, -1], atol=1e-3)


def test_with_a_threshold_recency_holds_what_came_after_a_position(tiny_config):
    model = HAMModel(tiny_config(router="recency")).eval()
    cache = model(torch.randint(1, 97, (1, 25)), threshold=20 / 2**24).cache
    assert [x.tolist() for x in cache.kept_positions(0)[0]] == [[20, 21, 22, 23, 24]] * 2


def test_recency_admits_every_token_whatever_a_checkpoint_learned(tiny_config, tmp_path):
    trained = HAMForCausalLM(tiny_config())
    for layer in trained.model.layers:
        layer.mixer.threshold.data.fill_(0.7)
    trained.generation_config.threshold = 0.4
    trained.save_pretrained(tmp_path)
    model = HAMForCausalLM.from_pretrained(tmp_path, router="recency").eval()
    assert model.config.fixed_threshold == 0
    assert (model(torch.ones(1, 9, dtype=torch.long)).cache.kv_usage() == 1).all()
    out = model.generate(torch.ones(1, 9, dtype=torch.long), max_new_tokens=4, return_dict_in_generate=True)
    assert (out.cache.kv_usage() == 1).all()
    assert not any(layer.mixer.threshold.requires_grad for layer in HAMModel(model.config).layers)
    model.config.threshold = 2.0
    assert (model(torch.ones(1, 9, dtype=torch.long)).cache.kv_usage() == 0).all(), "a threshold that is given counts"


def test_recency_takes_no_usage(tiny_config):
    model = HAMForCausalLM(tiny_config(router="recency"))
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`kv_usage` must be left out with the router 'recency'.*`kv_budget`"):
        model(ids, kv_usage=0.5)
    with pytest.raises(ValueError, match=r"`model` has the router 'recency'.*`kv_budget`"):
        calibrate(model, [ids])
