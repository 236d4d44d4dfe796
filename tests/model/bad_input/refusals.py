# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Refusals that name what is wrong and leave the cache as it was, and inputs that are refused."""

import math
import re

import pytest
import torch

ROWS, SEEN, NEW, VOCABULARY, HIDDEN = 2, 12, 4, 97, 32
NAN = math.nan
# Python refuses to print it, and to make a float of it.
HUGE = 10**5000


def contents(cache):
    state = {
        f"{i}.{name}": x.clone() for i, layer in enumerate(cache.layers) for name, x in layer.state_dict().items()
    }
    return state | {"seen": torch.tensor(cache.get_seq_length())}


def assert_refuses(call, error, message, cache):
    """`call` raises a plain TypeError or ValueError that says `message`, and the cache is as it was."""
    before = contents(cache)
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert type(caught.value) is error, "a subclass would be somebody else's error"
    after = contents(cache)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def ids(*shape):
    return torch.ones(*(shape or (ROWS, NEW)), dtype=torch.long)


def with_nan(*shape):
    return torch.full(shape, NAN)


def name_of(case):
    return ",".join(case) if isinstance(case, dict) else None
