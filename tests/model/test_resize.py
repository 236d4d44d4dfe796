# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A vocabulary that is resized: every part of the model knows its size, and padding is never lost."""

import pytest
import torch

from ham_hf import HAMForCausalLM, HAMModel


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [120, 50])
def test_every_part_of_a_resized_model_knows_its_size(size, tied, tiny_config, tmp_path):
    model = HAMForCausalLM(tiny_config(tie_word_embeddings=tied))
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.vocab_size == model.model.vocab_size == model.config.vocab_size == size
    assert model.model.embed_tokens.weight.shape[0] == model.lm_head.weight.shape[0] == size
    ids = torch.full((1, 4), size - 1)
    assert model(ids, labels=ids).logits.shape == (1, 4, size)
    with pytest.raises(ValueError, match=f"`input_ids` must be between 0 and {size - 1}"):
        model(ids + 1)
    model.save_pretrained(tmp_path)
    assert HAMForCausalLM.from_pretrained(tmp_path).model.vocab_size == size


def test_the_decoder_alone_is_resized_too(tiny_config):
    model = HAMModel(tiny_config())
    model.resize_token_embeddings(100, pad_to_multiple_of=64, mean_resizing=False)
    assert model.vocab_size == model.embed_tokens.weight.shape[0] == 128
    assert model.resize_token_embeddings() is model.embed_tokens


@pytest.mark.parametrize(
    ("pad", "arguments", "message"),
    [
        (90, {"new_num_tokens": 90}, "`new_num_tokens` must be at least 91, as `pad_token_id` is 90, got 90"),
        (90, {"new_num_tokens": 60, "pad_to_multiple_of": 8}, "at least 91, as `pad_token_id` is 90, got 60"),
        (None, {"new_num_tokens": 0}, "`new_num_tokens` must be at least 1, got 0"),
    ],
)
def test_a_size_that_loses_the_padding_token_is_refused_before_anything_changes(pad, arguments, message, tiny_config):
    model = HAMForCausalLM(tiny_config(pad_token_id=pad))
    before = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.model.embed_tokens.weight is before
    assert model.vocab_size == model.model.vocab_size == model.config.vocab_size == 97
    model.resize_token_embeddings(91, pad_to_multiple_of=8, mean_resizing=False)
    assert model.vocab_size == 96
