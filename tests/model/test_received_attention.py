# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The loss of a learned router: what it predicts, whom it moves, and that pieces of a batch add up to the whole."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from ham_hf import HAMForCausalLM, mixer_ham, received_attention_ham
from ham_hf.configuration_ham import LEARNED_ROUTERS, ROUTERS
from ham_hf.received_attention_ham import attention_received, prediction_loss


def received_by_loops(q, k, real, seq_idx, window):
    """The definition, token by token."""
    rows, length, heads, groups = *k.shape[:3], q.shape[2] // k.shape[2]
    most = torch.zeros(rows, length, heads)
    for row, head, t in torch.cartesian_prod(*map(torch.arange, (rows, q.shape[2], length))).tolist():
        seen = [j for j in range(t + 1) if real[row, j] and seq_idx[row, j] == seq_idx[row, t]]
        if not real[row, t]:
            continue
        logits = torch.stack([q[row, t, head] @ k[row, j, head // groups] for j in seen]) * k.shape[3] ** -0.5
        for j, weight in zip(seen, logits.softmax(0), strict=True):
            if j < t and t - j >= window:
                most[row, j, head // groups] = max(most[row, j, head // groups], weight)
    return most


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
def test_it_is_the_most_attention_that_a_later_token_of_the_document_pays(rows, window):
    q, k = 2 * torch.randn(2, 11, 4, 8), 2 * torch.randn(2, 11, 2, 8)
    real, seq_idx = torch.ones(2, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.long)
    if rows == "padded":
        real[0, :3], real[1, 9:] = False, False
    if rows == "packed":
        seq_idx[:, 4:], seq_idx[:, 5:] = 1, 2
    masks = None if rows == "plain" else real, seq_idx if rows == "packed" else None
    received = attention_received(q, k, *masks, window)
    torch.testing.assert_close(received, received_by_loops(q, k, real, seq_idx, window), rtol=0, atol=1e-6)
    assert received.amax() > (0.2 if window > 1 else 0.5)
    assert (received[0, -1] == 0).all()


def test_of_many_queries_some_ask(monkeypatch):
    q, k = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    every = attention_received(q, k)
    monkeypatch.setattr(received_attention_ham, "MOST_QUERIES", 13)
    draws = torch.stack([attention_received(q, k) for _ in range(60)])
    assert (draws <= every + 1e-6).all()
    torch.testing.assert_close(draws.amax(0), every, rtol=0, atol=1e-6)
    assert not torch.equal(draws[0], draws[1])


def test_the_loss_is_the_cross_entropy_of_real_tokens():
    scores, received = torch.rand(2, 7, 3), torch.rand(2, 7, 3)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False
    wanted = F.binary_cross_entropy(scores, received, reduction="none")
    torch.testing.assert_close(prediction_loss(scores, received), wanted.sum(1))
    wanted[1, 5:] = 0
    torch.testing.assert_close(prediction_loss(scores, received, real), wanted.sum(1))
    assert prediction_loss(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.0], [0.0]]])).isfinite().all()


def batch():
    ids, mask = torch.randint(1, 97, (4, 24)), torch.ones(4, 24, dtype=torch.long)
    mask[2:, :6] = 0  # equally many in two halves of the batch
    mask[:2, 18:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients_of(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))


@pytest.mark.parametrize("way", ["language model", "loss of logits"])
def test_its_gradient_joins_that_of_the_loss(way, tiny_config, monkeypatch):
    """Whatever makes the loss: the mean over real tokens and heads, summed over layers, times the coefficient."""
    model = HAMForCausalLM(tiny_config(router="learned", router_aux_loss_coef=0.5)).train()
    inputs, predicted = batch(), []
    real = inputs["attention_mask"].bool()

    def recorded(scores, received, mask):
        predicted.append((scores, received))
        return prediction_loss(scores, received, mask)

    def loss():
        if way == "language model":
            return model(**inputs, use_cache=False).loss
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        return logits[real].square().mean()

    monkeypatch.setattr(mixer_ham, "prediction_loss", recorded)
    with_it = loss()
    joined = torch.autograd.grad(with_it, model.parameters(), retain_graph=True)
    total = sum(F.binary_cross_entropy(scores[real], received[real]) for scores, received in predicted)
    extra = torch.autograd.grad(0.5 * total, model.parameters(), allow_unused=True)
    model.config.router_aux_loss_coef = 0.0
    without = loss()
    assert len(predicted) == 2
    assert torch.equal(with_it, without), "the loss that is returned is that of the task"
    alone = torch.autograd.grad(without, model.parameters())
    names = [name for name, _ in model.named_parameters()]
    for name, x, y, z in zip(names, joined, alone, extra, strict=True):
        assert (z is not None) or "router" not in name
        torch.testing.assert_close(x, y if z is None else y + z, rtol=1e-4, atol=1e-7, msg=name)
        assert "router" not in name or z.abs().max() > 1e-3, name


def test_a_window_takes_no_part_in_what_routers_learn(tiny_config, monkeypatch):
    """Within the window every token is seen, so nobody asks a router for it."""
    model, found = HAMForCausalLM(tiny_config(router="learned", attention_window=5)).train(), []
    monkeypatch.setattr(mixer_ham, "prediction_loss", lambda *x: found.append(x[1]) or prediction_loss(*x))
    ids = torch.randint(1, 97, (2, 24))
    model(ids, labels=ids, use_cache=False)
    for received in found:
        assert (received[:, -5:] == 0).all()
        assert (received[:, :-5] > 0).all()


def test_pieces_of_a_batch_add_up_to_the_whole(tiny_config):
    model = HAMForCausalLM(tiny_config(router="learned", router_aux_loss_coef=100.0)).train()
    inputs = batch()
    items = int((inputs["labels"][:, 1:] != -100).sum())

    def gradient(pieces):
        model.zero_grad()
        for rows in pieces:
            piece = {name: x[rows] for name, x in inputs.items()}
            model(**piece, num_items_in_batch=items, use_cache=False).loss.backward()
        return model.model.layers[0].mixer.router.up_proj.weight.grad.clone()

    whole, parts = gradient([slice(0, 4)]), gradient([slice(0, 1), slice(1, 4)])
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_scores_come_to_rank_tokens_by_the_attention_they_receive(tiny_config):
    model = HAMForCausalLM(tiny_config(router="learned", num_hidden_layers=1, initializer_range=0.3)).train()
    mixer, found = model.model.layers[0].mixer, []
    ids = torch.randint(1, 97, (8, 30))
    optimizer = torch.optim.Adam(mixer.router.parameters(), lr=0.03)

    def correlation():
        with mock.patch.object(mixer_ham, "prediction_loss", lambda *x: found.append(x) or prediction_loss(*x)):
            loss = model(ids, labels=ids, use_cache=False).loss
        scores, received, _ = found[-1]
        return loss, torch.corrcoef(torch.stack([scores.flatten(), received.flatten()]))[0, 1].item()

    before = correlation()[1]
    for _ in range(60):
        optimizer.zero_grad()
        correlation()[0].backward()
        optimizer.step()
    # What is asked for later, no token knows; more than this cannot be told from tokens.
    assert correlation()[1] > before + 0.2


@pytest.mark.parametrize("router", ROUTERS)
def test_only_learned_routers_have_the_loss(router, tiny_config):
    config = tiny_config(router=router)
    assert config.router_aux_loss_coef == float(router == "learned")
    config.router_aux_loss_coef = 1.0
    model = HAMForCausalLM(config).train()
    found = model.model(torch.randint(1, 97, (3, 8)), output_threshold_control=True, use_cache=False).threshold_control
    rows = 0 if router == "recency" else 2
    assert [len(x) for x in found or ()] == [2 + 3 * (1 + (router in LEARNED_ROUTERS))] * rows
    model.eval()
    assert model.model(torch.randint(1, 97, (3, 8)), output_threshold_control=True).threshold_control is None
