# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The next turn of a conversation goes on with the memory of the last, and answers as if it had read everything."""

import pytest

from ham_hf.serving.vllm.conversations import Conversations, group_of
from tests.serving.vllm.engine import generated, prompt, small_model

ON = {"additional_config": {"ham": {"conversations": True}}}


def test_the_longest_conversation_that_a_prompt_begins_with_is_found():
    conversations = Conversations()
    conversations.add("a", [1, 2, 3], "short")
    conversations.add("a", [1, 2, 3, 4, 5], "long")
    conversations.add("a", [1, 2, 9, 4, 5, 6], "other")
    conversations.add("b", [1, 2, 3, 4], "of another group")
    assert conversations.get(conversations.longest("a", [1, 2, 3, 4, 5, 6])) == "long"
    assert conversations.get(conversations.longest("a", [1, 2, 3, 4, 5])) == "short", "one token must be left to read"
    assert conversations.longest("a", [1, 2]) is None
    assert conversations.longest("c", [1, 2, 3, 4, 5, 6]) is None
    assert conversations.take(conversations.longest("b", [1, 2, 3, 4, 5])) == "of another group"
    assert conversations.longest("b", [1, 2, 3, 4, 5]) is None


def test_the_conversation_unused_for_longest_gives_way_first():
    conversations = Conversations()
    for n in range(3):
        assert conversations.add("a", [n], n) is None
    assert conversations.add("a", [0], "again") == 0
    assert conversations.take_oldest(but=conversations.longest("a", [1, 5])) == 2
    assert [conversations.take_oldest() for _ in range(3)] == [1, "again", None]
    assert not len(conversations)


def test_a_group_depends_on_arguments_and_salt():
    groups = [group_of(*x) for x in (({}, None), ({}, "a"), ({"threshold": 0.1}, None), ({"threshold": 0.2}, None))]
    assert len(set(groups)) == 4
    assert group_of({"threshold": 0.1, "kv_budget": 3}, "a") == group_of({"kv_budget": 3, "threshold": 0.1}, "a")


class Reader:
    """Counts the tokens that the steps of an engine read."""

    def __init__(self, engine, monkeypatch):
        self.tokens, schedule = 0, engine.scheduler.schedule

        def counted(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.tokens += output.total_num_scheduled_tokens
            return output

        monkeypatch.setattr(engine.scheduler, "schedule", counted)

    def taken(self):
        taken, self.tokens = self.tokens, 0
        return taken


@pytest.mark.parametrize("routing", [{"threshold": 0.42}, {"kv_usage": 0.5, "kv_budget": 40}])
def test_a_turn_reads_only_what_is_new(engines, monkeypatch, routing):
    model = small_model(attention_window=5, layer_types=["hybrid", "full_attention"])
    engine = engines(model, **ON)
    reader = Reader(engine, monkeypatch)
    said = {n: prompt(20 + n, n) for n in range(3)}
    for turn in range(4):
        answers = engine.answers([(tokens, 12, routing) for tokens in said.values()])
        for n, answer in zip(said, answers, strict=True):
            assert answer == generated(model, said[n], 12, **routing)
            said[n] = said[n] + answer + prompt(7, 10 * turn + n)
        # The last token of an answer is read with the next turn.
        assert reader.taken() == (20 + 21 + 22 + 3 * 11 if turn == 0 else 3 * (1 + 7 + 11))
    assert len(engine.manager.conversations) == 3
    engine.llm.reset_prefix_cache(reset_connector=True)
    assert engine.lost_blocks == 0
    assert engine.answers([(said[0], 5, routing)]) == [generated(model, said[0], 5, **routing)]
    assert reader.taken() == len(said[0]) + 4


def test_conversations_give_way_to_requests_and_unlike_ones_are_not_mixed_up(engines, monkeypatch):
    model = small_model()
    engine = engines(model, num_gpu_blocks_override=16, **ON)
    reader = Reader(engine, monkeypatch)
    first = prompt(60)
    (answer,) = engine.answers([(first, 10, {"threshold": 0.4})])
    reader.taken()
    longer = first + answer + prompt(5, 1)
    # Another threshold, another text, another user.
    for tokens, routing in ((longer, {"threshold": 0.3}), ([*prompt(60, 3), *longer[60:]], {"threshold": 0.4})):
        assert engine.answers([(tokens, 4, routing)]) == [generated(model, tokens, 4, **routing)]
        assert reader.taken() == len(longer) + 3
    many = [(prompt(80, n), 30, {"threshold": 0.0}) for n in range(6)]
    assert engine.answers(many) == [generated(model, *x[:2], **x[2]) for x in many]
    reader.taken()
    assert engine.answers([(longer, 4, {"threshold": 0.4})]) == [generated(model, longer, 4, threshold=0.4)]
    assert reader.taken() == len(longer) + 3, "its memory has given way"
    engine.manager.drop_conversations()
    assert engine.lost_blocks == 0
