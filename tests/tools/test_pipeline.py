# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("text-generation")`: prompts and chats in batches, at any threshold, give what single ones give."""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

PROMPTS = [
    "The captain looked at the sea, and",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "She",
]


@pytest.fixture
def generator(model, with_code):
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(with_code))


def one_by_one(generator, texts, **knob):
    rows = [generator.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    outputs = [generator.model.generate(ids, max_new_tokens=12, do_sample=False, **knob) for ids in rows]
    return [generator.tokenizer.decode(out[0, ids.shape[1] :]) for out, ids in zip(outputs, rows, strict=True)]


@pytest.mark.parametrize(
    "knob", [{}, {"threshold": 0.0}, {"threshold": 0.5}, {"threshold": 2.0}, {"kv_usage": 0.3}, {"kv_budget": 4}]
)
def test_batches_equal_single_prompts(generator, knob):
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    results = generator(PROMPTS, batch_size=2, **options, **knob)
    texts = [result[0]["generated_text"] for result in results]
    assert texts == one_by_one(generator, PROMPTS, **knob)
    if knob == {"threshold": 2.0}:
        assert texts != one_by_one(generator, PROMPTS, threshold=0.0)


def test_chats(generator):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    results = generator(chats, batch_size=2, max_new_tokens=12, do_sample=False, threshold=0.5)
    replies = [result[0]["generated_text"][-1] for result in results]
    assert [reply["role"] for reply in replies] == ["assistant", "assistant"]
    assert [reply["content"] for reply in replies] == one_by_one(generator, PROMPTS[:2], threshold=0.5)


def test_feature_extraction_takes_the_tokenizers_output(generator, model):
    """The model takes the default output of a tokenizer."""
    features = pipeline("feature-extraction", model=model.model, tokenizer=generator.tokenizer, return_tensors=True)
    with torch.no_grad():
        expected = model.model(**generator.tokenizer(PROMPTS[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features(PROMPTS[0]), expected, atol=0, rtol=0)


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(generator, beams):
    """`generate` reads them with a tokenizer, which it then also hands to the model."""
    tokenizer, model = generator.tokenizer, generator.model
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "threshold": 0.5}
    whole = tokenizer.decode(model.generate(**inputs, **options)[0])
    # A beam that comes to a word may lose to one that does not; all come to a vowel.
    words = [whole[len(PROMPTS[0]) :].split()[2]] if beams == 1 else list("aeiou")
    stopped = model.generate(**inputs, **options, stop_strings=words, tokenizer=tokenizer)
    if beams == 1:
        assert tokenizer.decode(stopped[0]).rstrip().endswith(words[0])
    else:
        assert set(words) & set(tokenizer.decode(stopped[0, -1:]))
    assert stopped.shape[1] < inputs.input_ids.shape[1] + 12
