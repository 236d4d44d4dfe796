# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Small checkpoints, and calls of `ham-hf` that succeed or are refused."""

import re

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ham_hf.cli as cli
from ham_hf import HAMConfig, HAMForCausalLM

PROMPT = "It was a dark night, and the captain — “Ahab” — had gone below.\nNobody spoke; the wind rose, and rose."


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    for pair in ("th", "Ġw"):
        vocabulary[pair] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_model(vocab_size, **changes):
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **changes,
    )
    return HAMForCausalLM(config).eval()


def save(folder, tokenizer, model):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(output):
    """The cells of the table of runs, one list a row."""
    table = output.split("what the cache kept")[1].split("KV held:")[0]
    return [line.split() for line in table.splitlines() if re.match(r" *(learned|-?inf|-?\d)", line)]


def generate(capsys, *arguments):
    """Runs `ham-hf generate`, which must succeed without a word on stderr; returns what it printed."""
    assert cli.main(["generate", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys, *arguments):
    """Runs a call that must be refused before anything is printed; returns its one line on stderr."""
    assert cli.main([str(x) for x in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ham-hf: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
