# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Conversations of several turns with SmolLM2 as a HAM: what is read, what is asked, and how it is counted."""

import pytest
import torch
import torch.nn.functional as F

from ham_hf import HAMCache
from ham_hf.evaluation import calibrate
from model_cards.smollm2 import chat
from tests.cli.calls import byte_tokenizer, tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model():
    model = tiny_model(300, attention_window=8).eval()
    calibrate(model, [torch.randint(300, (2, 100))])
    return model


def test_conversations_tell_what_they_ask_for_and_differ():
    made = chat.conversations()
    assert made == chat.conversations(), "of a seed"
    assert len({x.turns[1] for x in made}) == len(made) == chat.CONVERSATIONS
    for x in made:
        assert len(x.turns) == chat.TURNS + 1
        for _, word in x.questions.values():
            assert word in x.turns[0]
            assert word not in " ".join(x.turns[1:])


def test_a_transcript_is_what_the_template_makes_of_it(model, tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "REPLY", 4)
    replies = iter(["a reply", "and another"])
    monkeypatch.setattr(chat, "generated", lambda *_: tokenizer(next(replies), return_tensors="pt")["input_ids"])
    x = chat.Conversation(["Hello!", "Explain."], {"dog": ("What?", "Rufus")})
    told = chat.transcript(model, tokenizer, x)
    parts = [tokenizer.decode(part[0]) for turn in told.turns for part in turn]
    question, word = told.questions["dog"]
    assert word == "Rufus"
    assert "".join([*parts, tokenizer.decode(question[0])]) == (
        "<user>Hello!<end><assistant>a reply<end><user>Explain.<end><assistant>and another<end>"
        "<user>What?<end><assistant>"
    )


def test_replies_are_judged_by_the_loss_of_the_whole_conversation(model, tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "ANSWER", 3)
    ids = torch.randint(97, 300, (1, 60))
    turns = [chat.Turn(ids[:, :20], ids[:, 20:30]), chat.Turn(ids[:, 30:50], ids[:, 50:])]
    asked = []

    def generated(model, ids, cache, kv_usage, count):
        asked.append((ids, cache, kv_usage))
        return tokenizer("it is RUFUS", return_tensors="pt")["input_ids"]

    monkeypatch.setattr(chat, "generated", generated)
    questions = {"dog": (torch.tensor([[7]]), "Rufus"), "city": (torch.tensor([[8]]), "Oslo")}
    figures = chat.figures_of(model, tokenizer, chat.Transcript(turns, questions), 0.5)
    with torch.no_grad():
        outputs = model(ids, kv_usage=0.5, use_cache=True)
    losses = F.cross_entropy(outputs.logits[0, :-1], ids[0, 1:], reduction="none")
    assert figures["loss"] == pytest.approx(torch.cat([losses[19:29], losses[49:]]).mean().item(), abs=1e-5)
    assert figures["last_loss"] == pytest.approx(losses[49:].mean().item(), abs=1e-5)
    assert figures["held"] == pytest.approx(outputs.cache.kv_usage().mean().item())
    assert figures["found"] == {"dog": True, "city": False}
    assert figures["tokens"] == 60
    for (whole, cache, kv_usage), last in zip(asked, (7, 8), strict=True):
        assert whole[0].tolist() == [*ids[0].tolist(), last]
        assert isinstance(cache, HAMCache)
        assert cache.get_seq_length() == 60
        assert kv_usage == 0.5
    assert asked[0][1] is not asked[1][1], "each question has a fork of its own"


def test_an_answer_has_no_end(model):
    ids = torch.randint(300, (1, 5))
    whole = chat.generated(model, ids, None, 1.0, 6)
    assert whole.shape == (1, 6)
    model.generation_config.eos_token_id = int(whole[0, -1])
    first = whole[0].tolist().index(int(whole[0, -1]))
    assert chat.generated(model, ids, None, 1.0, 6).tolist() == [whole[0, :first].tolist()]


def test_facts_count_where_everything_finds_them():
    def row(index, arm, dog, city, loss):
        found = {"dog": dog, "city": city}
        return {"index": index, "arm": arm, "loss": loss, "last_loss": 2 * loss, "held": 0.5, "found": found} | {
            "tokens": 90 + index
        }

    rows = [row(0, "everything", True, False, 1.0), row(1, "everything", True, True, 1.0)]
    rows += [row(0, "by importance", False, True, 1.1), row(1, "by importance", True, True, 1.3)]
    table = chat.to_markdown(rows)
    assert "| everything | 50.0% | 3 of 3 (44% to 100%) | 1.000 | 2.000 |" in table
    assert "| by importance | 50.0% | 2 of 3 (21% to 94%) | +0.200 ± 0.100 | +0.400 ± 0.200 |" in table
    assert "as 3 of 6 do" in table
    assert "90 to 91 tokens" in table
