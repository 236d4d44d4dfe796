# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Calls `generate`, and sees to it that a HAMCache did the work."""

from ham_hf import HAMCache


def generate(model, input_ids, **arguments):
    """Generates, checks which cache did the work, and returns Transformers' output."""
    arguments = {"max_new_tokens": 8, "do_sample": False} | arguments
    out = model.generate(input_ids, return_dict_in_generate=True, **arguments)
    assert type(out.cache) is HAMCache
    assert out.cache.get_seq_length() == out.sequences.shape[1] - 1
    return out
