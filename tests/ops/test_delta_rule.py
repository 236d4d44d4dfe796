# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds the chunkwise gated delta rule to the loop over tokens."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ham_hf import delta_rule_ham
from ham_hf.delta_rule_ham import gated_delta_rule_with_prediction
from ham_hf.reference import naive_gated_delta_rule_with_prediction
from ham_hf.routing_ham import error_score
from tests.ops.comparison import DTYPES, assert_close, assert_same_function, gradients, largest
from tests.ops.inputs import delta_inputs, documents

DELTA = ["o", "prediction", "final_state"]


@pytest.fixture(params=["one segment", "a segment a chunk"])
def segments(request, monkeypatch):
    """The chunkwise delta rule over everything at once, and over one chunk at a time."""
    if request.param == "a segment a chunk":
        monkeypatch.setattr(delta_rule_ham, "SEGMENT_TOKENS", 1)


def test_a_segment_holds_as_many_chunks_as_stay_in_a_cache(monkeypatch):
    lengths, chunks = [], delta_rule_ham._delta_rule_chunks
    monkeypatch.setattr(delta_rule_ham, "_delta_rule_chunks", lambda *x: lengths.append(x[0].shape[1]) or chunks(*x))
    monkeypatch.setattr(delta_rule_ham, "SEGMENT_TOKENS", 2 * 4 * 70)
    gated_delta_rule_with_prediction(**delta_inputs(150, batch=2, heads=4))
    assert lengths == [64, 64, 22]


@DTYPES
@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_delta_rule_and_all_gradients_equal_the_token_loop(length, dtype):
    for with_state in (False, True):
        inputs = delta_inputs(length, with_state=with_state)
        assert_same_function(
            gated_delta_rule_with_prediction, naive_gated_delta_rule_with_prediction, inputs, dtype, DELTA
        )


@pytest.mark.parametrize("heads", [(1, 1, 3, 3), (6, 2, 8, 2), (3, 3, 1, 6)], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 1000])
def test_delta_rule_at_every_chunk_size_and_head_layout(heads, chunk_size):
    heads, kv_heads, key_dim, value_dim = heads
    inputs = delta_inputs(33, heads=heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)

    def op(**x):
        return gated_delta_rule_with_prediction(**x, chunk_size=chunk_size, scale=0.3)

    def reference(**x):
        return naive_gated_delta_rule_with_prediction(**x, scale=0.3)

    assert_same_function(op, reference, inputs, torch.float64, DELTA)


@DTYPES
@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 64, 1, 62], [64, 64], [20, 90, 40]], ids=str)
def test_delta_rule_clears_the_state_between_documents(lengths, dtype):
    inputs = delta_inputs(sum(lengths), batch=len(lengths)) | {"seq_idx": documents(lengths, len(lengths))}
    assert_same_function(
        gated_delta_rule_with_prediction, naive_gated_delta_rule_with_prediction, inputs, dtype, DELTA
    )


@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("length", [1, 64, 96, 150])
def test_first_prediction_of_a_document_is_exactly_zero(length):
    # Not merely small: a cosine with rounding noise would be a random score, where the design says 0.5.
    inputs = delta_inputs(length, with_state=False)
    seq_idx = documents([length // 3, length - length // 3], 2)[:, :length]
    prediction = gated_delta_rule_with_prediction(**inputs, seq_idx=seq_idx)[1]
    first = torch.cat([torch.ones(2, 1, dtype=torch.bool), seq_idx[:, 1:] != seq_idx[:, :-1]], 1)
    assert first.sum() == (2 if length == 1 else 4)
    assert torch.equal(prediction[first], torch.zeros_like(prediction[first]))
    assert (prediction[~first].abs().amax((-1, -2)) > 0).all()


@pytest.mark.parametrize("score", ["cosine", "l2", "residual"])
@pytest.mark.parametrize("length", [1, 70])
def test_scores_take_the_place_of_predictions(length, score):
    inputs = delta_inputs(length)
    o, prediction, state = gated_delta_rule_with_prediction(**inputs)
    scored = gated_delta_rule_with_prediction(**inputs, score=score)
    assert torch.equal(scored[0], o)
    assert torch.equal(scored[2], state)
    assert torch.equal(scored[1], error_score(score, inputs["v"], prediction, inputs["beta"]))
    assert not scored[1].requires_grad


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 70])
def test_predictions_that_are_left_out_change_nothing_else(length, packed):
    inputs = {name: x.requires_grad_() for name, x in delta_inputs(length).items()}
    more = {"seq_idx": documents([length // 3, length - length // 3], 2)[:, :length]} if packed else {}
    results = []
    for predict in (False, True):
        o, prediction, state = gated_delta_rule_with_prediction(**inputs, **more, predict=predict)
        assert (prediction is None) == (not predict)
        results.append([o, state, *torch.autograd.grad(o.sum() + state.square().sum(), list(inputs.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_predictions_that_are_left_out_are_not_computed():
    """Two products a chunk and head, of its keys with the state and of its own weights with the updates."""
    inputs, operations = delta_inputs(70, heads=3, kv_heads=3, key_dim=8, value_dim=6), []
    for predict in (False, True):
        with FlopCounterMode(display=False) as counter:
            gated_delta_rule_with_prediction(**inputs, chunk_size=32, predict=predict)
        operations.append(counter.get_total_flops())
    streams, chunks = 2 * 3, 3
    assert operations[1] - operations[0] == streams * chunks * 2 * 32 * (8 + 32) * 6


def test_a_score_needs_predictions():
    with pytest.raises(ValueError, match="`predict` must be True with `score` 'cosine', got False"):
        gated_delta_rule_with_prediction(**delta_inputs(3), score="cosine", predict=False)


def test_a_score_that_there_is_not_is_refused_by_name():
    with pytest.raises(ValueError, match="`score` must be one of 'cosine', 'l2', 'residual', got 'cosin'"):
        gated_delta_rule_with_prediction(**delta_inputs(3), score="cosin")


@pytest.mark.parametrize("length", [1, 70])
def test_the_delta_rule_of_no_rows(length):
    inputs = delta_inputs(length)
    expected = gated_delta_rule_with_prediction(**inputs)
    found = gated_delta_rule_with_prediction(**{name: x[:0] for name, x in inputs.items()})
    assert [x.shape for x in found] == [(0, *x.shape[1:]) for x in expected]


def test_padding_neither_decays_nor_writes_the_state():
    inputs = delta_inputs(90)
    real = torch.rand(2, 90) < 0.6
    padded = inputs | {name: inputs[name] * real[..., None] for name in ("g", "beta")}
    out, prediction, state = gated_delta_rule_with_prediction(**padded)
    for row in range(2):
        alone = {name: x[row : row + 1][:, real[row]] for name, x in inputs.items() if name != "initial_state"}
        alone["initial_state"] = inputs["initial_state"][row : row + 1]
        expected = gated_delta_rule_with_prediction(**alone)
        assert_close(out[row, real[row]], expected[0][0], 1e-5)
        assert_close(prediction[row, real[row]], expected[1][0], 1e-5)
        assert_close(state[row], expected[2][0], 1e-5)


@pytest.mark.parametrize("decay", [50.0, 1e4])
def test_delta_rule_survives_a_decay_that_forgets_everything(decay):
    inputs = delta_inputs(70, decay=decay)
    assert_same_function(
        gated_delta_rule_with_prediction, naive_gated_delta_rule_with_prediction, inputs, torch.float64, DELTA
    )
    actual, actual_grads = gradients(gated_delta_rule_with_prediction, inputs, torch.float32)
    expected, expected_grads = gradients(naive_gated_delta_rule_with_prediction, inputs, torch.float64)
    for x, y in zip([*actual, *actual_grads.values()], [*expected, *expected_grads.values()], strict=True):
        assert_close(x, y, 2e-6 * max(1, largest(y)))


@DTYPES
@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("length", [1, 70])
def test_a_decay_may_be_infinite(length, dtype):
    inputs = delta_inputs(length)
    forgets = torch.rand_like(inputs["g"]) < 0.2
    forgets[:, 0], forgets[:, length // 2 :, 0] = True, True
    inputs["g"] = inputs["g"].detach().masked_fill(forgets, -torch.inf).requires_grad_()
    assert_same_function(
        gated_delta_rule_with_prediction, naive_gated_delta_rule_with_prediction, inputs, dtype, DELTA
    )


def test_delta_rule_in_pieces_equals_one_call():
    inputs = delta_inputs(100, with_state=False)
    whole = gated_delta_rule_with_prediction(**inputs)
    state, outputs, start = None, [], 0
    for stop in [1, 2, 40, 41, 100]:
        part = {name: x[:, start:stop] for name, x in inputs.items()}
        out, prediction, state = gated_delta_rule_with_prediction(**part, initial_state=state)
        outputs.append((out, prediction))
        start = stop
    assert_close(torch.cat([x for x, _ in outputs], 1), whole[0], 1e-5)
    assert_close(torch.cat([x for _, x in outputs], 1), whole[1], 1e-5)
    assert_close(state, whole[2], 1e-5)


def test_delta_rule_keeps_the_state_in_float32_for_half_precision_inputs():
    inputs = {name: x.bfloat16() for name, x in delta_inputs(20, with_state=False).items()}
    exact = {name: x.double() for name, x in inputs.items()}
    for x, y in zip(
        gated_delta_rule_with_prediction(**inputs), naive_gated_delta_rule_with_prediction(**exact), strict=True
    ):
        assert x.dtype == torch.float32
        assert_close(x, y, 1e-5)
