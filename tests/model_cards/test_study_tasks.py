# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The recall task of the studies: its rows, the oracle that knows what they ask for, and the bytes held after them."""

import pytest
import torch

from model_cards.study import study
from model_cards.study.oracle import use_oracle
from model_cards.study.recall import IGNORED, RecallTask
from model_cards.study.results import bytes_held
from tests.model_cards.small_models import SMALL, small_model


class TestRecallTask:
    @pytest.mark.parametrize("filler", ["random", "pattern"])
    @pytest.mark.parametrize("pairs", [None, 3, 40])
    def test_every_question_has_its_answer_in_the_row(self, filler, pairs):
        task = RecallTask(filler)
        ids, labels = task.batch(1, 8, pairs)
        assert ids.shape == labels.shape == (8, max(96, 3 * (pairs or 32)))
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            places = [i for i, label in enumerate(wanted) if label != IGNORED]
            assert places
            assert pairs is None or len(places) == min(pairs, task.queries)
            assert places == list(range(places[0], len(row), 2)), "the questions end the row"
            for place in places:
                key = row[place - 1]
                assert row[place] == wanted[place]
                first = row.index(key)
                assert first < places[0] - 1
                assert row[first + 1] == row[place]
                assert row[: places[0] - 1].count(key) == 1, "a key is asked for once and told once"

    def test_a_pattern_repeats_and_noise_does_not(self):
        for filler, repeats in (("pattern", True), ("random", False)):
            row = RecallTask(filler, pairs=(1,), length=64, queries=1).batch(0, 1)[0][0].tolist()
            keys = [i for i, token in enumerate(row) if token < 64]
            rest = [token for i, token in enumerate(row) if i not in keys and i - 1 not in keys]
            assert (rest[8:] == rest[:-8]) is repeats

    def test_marked_filler_has_tokens_of_its_own(self):
        task = RecallTask("random", marked=True)
        ids, _ = task.batch(0, 4)
        assert task.vocab_size == 192
        for row in ids.tolist():
            told = {i + n for i, token in enumerate(row) if token < 64 for n in (0, 1)}
            assert all((token < 128) is (i in told) for i, token in enumerate(row))

    @pytest.mark.parametrize("pairs", [None, 3, 40])
    def test_what_is_asked_for_is_known_from_the_row(self, pairs):
        task = RecallTask("pattern")
        ids, labels = task.batch(1, 8, pairs)
        asked = task.asked_for(ids)
        for row, wanted, found in zip(ids.tolist(), labels.tolist(), asked.tolist(), strict=True):
            keys = [row[i - 1] for i, label in enumerate(wanted) if label != IGNORED]
            expected = {row.index(key) + n for key in keys for n in (0, 1)}
            assert {i for i, x in enumerate(found) if x} == expected

    def test_a_batch_is_a_function_of_its_seed(self):
        task = RecallTask("pattern")
        assert torch.equal(task.batch(5, 4)[0], task.batch(5, 4)[0])
        assert not torch.equal(task.batch(5, 4)[0], task.batch(6, 4)[0])

    def test_refuses_what_it_cannot_make(self):
        with pytest.raises(ValueError, match="`filler` must be one of"):
            RecallTask("patern")
        with pytest.raises(ValueError, match="`pairs` must lie between 1 and 64"):
            RecallTask("random", pairs=(4, 65))


class TestOracle:
    def test_it_keeps_first_what_is_asked_for(self):
        task = RecallTask("pattern", pairs=(2, 4), length=24, queries=2, keys=12, values=12)
        model = small_model(SMALL | {"router": "random"}, 8000).eval()
        plain = model(input_ids=task.batch(0, 4)[0], output_routing_scores=True).routing_scores
        use_oracle(model, task)
        for ids in (task.batch(0, 4)[0], task.batch(1, 2)[0]):
            asked = task.asked_for(ids)
            scores = torch.stack(model(input_ids=ids, output_routing_scores=True).routing_scores)
            assert scores.shape == (2, *ids.shape, 2)
            assert (scores[:, asked] >= 0.5).all()
            assert (scores[:, ~asked] < 0.5).all()
            assert 0 <= scores.min() < scores.max() < 1
        # The row does not matter to the random score, which orders both groups.
        torch.testing.assert_close(scores[0] * 2 - asked[..., None].float(), plain[0][:2])

    def test_it_takes_the_place_of_random_scores_alone(self):
        with pytest.raises(ValueError, match="`router` must be 'random' for an oracle, got 'cosine'"):
            use_oracle(small_model(SMALL, 8000), RecallTask("pattern"))


def test_bytes_held_are_those_of_states_and_kept_tokens():
    task = {"filler": "pattern", "length": 96}

    def held(usage, **settings):
        result = {
            "settings": {"model": SMALL | settings, "task": task},
            "usage": {"learned": usage, "0.5": {"4": 0.5}},
        }
        return bytes_held(result), bytes_held(result, "0.5")

    # Two layers with two heads of 8: states of 8 x 8, three tokens of the convolution's q, k and v.
    state, conv, token = 2 * 2 * 64 * 4, 2 * 3 * 48 * 4, 2 * 2 * 16 * 4
    assert held({"4": 0.25}) == (state + conv + 24 * token, state + conv + 48 * token)
    # A row with 64 pairs has 192 tokens.
    assert held({"4": 0.25, "64": 0.5})[0] == state + conv + (24 + 96) / 2 * token
    assert held({"4": 0.0}, layer_types=["linear_attention"] * 2)[0] == state + conv
    assert held({"4": 1.0}, layer_types=["full_attention"] * 2)[0] == conv + 96 * token
    interleaved = ["linear_attention", "full_attention"]
    assert held({"4": 0.5}, layer_types=interleaved)[0] == state / 2 + conv + 96 * token / 2
    # The study's Gated DeltaNet of equal bytes, and the HAM that it is equal to.
    plan = study.read_study("cpu")
    sizes = {}
    for arm in ("cosine", "gdn-equal"):
        (job,) = [x for x in study.jobs_of(plan) if x.name.endswith(f".marked.{arm}.0")]
        usage = {"learned": {"4": 0.25 if arm == "cosine" else 0.0}}
        sizes[arm] = bytes_held({"settings": job.settings, "usage": usage})
    assert sizes["gdn-equal"] == pytest.approx(sizes["cosine"], rel=0.15)
