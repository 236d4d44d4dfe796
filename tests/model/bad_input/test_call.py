# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A call with wrong inputs is refused before the cache has changed, with an error that names them."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from ham_hf import HAMCache, HAMForCausalLM
from tests.model.bad_input.refusals import (
    HIDDEN,
    HUGE,
    NAN,
    NEW,
    ROWS,
    SEEN,
    VOCABULARY,
    assert_refuses,
    ids,
    name_of,
    with_nan,
)

# Of every argument: what is given instead of something good, the error, and what its message says.
INPUTS = [
    ({"input_ids": None}, ValueError, "exactly one of `input_ids` and `inputs_embeds`"),
    ({"inputs_embeds": torch.zeros(ROWS, NEW, HIDDEN)}, ValueError, "exactly one of `input_ids` and `inputs_embeds`"),
    ({"input_ids": [[1, 2, 3, 4]] * ROWS}, TypeError, "`input_ids` must be an integer tensor [any, any], got list"),
    (
        {"input_ids": torch.ones(ROWS, NEW)},
        TypeError,
        "`input_ids` must be an integer tensor [any, any], got torch.float",
    ),
    ({"input_ids": ids().bool()}, TypeError, "`input_ids` must be an integer tensor [any, any], got torch.bool"),
    ({"input_ids": ids(NEW)}, ValueError, "`input_ids` must be [any, any], got [4]"),
    ({"input_ids": ids(ROWS, NEW, 1)}, ValueError, "`input_ids` must be [any, any], got [2, 4, 1]"),
    ({"input_ids": ids(ROWS, 0)}, ValueError, "`input_ids` (or `inputs_embeds`) must hold at least one"),
    ({"input_ids": ids(0, NEW)}, ValueError, "`input_ids` (or `inputs_embeds`) must hold at least one"),
    ({"input_ids": ids() * VOCABULARY}, ValueError, "`input_ids` must be between 0 and 96, got 97 to 97"),
    ({"input_ids": -ids()}, ValueError, "`input_ids` must be between 0 and 96, got -1 to -1"),
    ({"input_ids": ids(ROWS + 1, NEW)}, ValueError, "`cache` holds 2 rows, the input 3"),
    ({"attention_mask": [[1] * 16] * ROWS}, TypeError, "`attention_mask` must be a tensor [batch, tokens], got list"),
    (
        {"attention_mask": ids()},
        ValueError,
        "`attention_mask` must be [2, 16] (rows, tokens in the cache and new ones)",
    ),
    ({"attention_mask": ids(1, 16)}, ValueError, "`attention_mask` must be [2, 16]"),
    ({"attention_mask": ids(ROWS, 1, NEW, 16)}, ValueError, "`attention_mask` must be [2, 16]"),
    (
        {"attention_mask": 2 * ids(ROWS, 16)},
        ValueError,
        "`attention_mask` must be 1 for real tokens and 0 for padding",
    ),
    (
        {"attention_mask": with_nan(ROWS, 16)},
        ValueError,
        "`attention_mask` must be 1 for real tokens and 0 for padding",
    ),
    ({"attention_mask": torch.full((ROWS, 16), -math.inf)}, ValueError, "`attention_mask` must be 1 for real tokens"),
    (
        {"position_ids": [[0, 1, 2, 3]]},
        TypeError,
        "`position_ids` must be an integer tensor [2, 4] or [1, 4], got list",
    ),
    (
        {"position_ids": torch.arange(4.0)[None]},
        TypeError,
        "`position_ids` must be an integer tensor [2, 4] or [1, 4]",
    ),
    ({"position_ids": torch.arange(12, 16)}, ValueError, "`position_ids` must be [2, 4] or [1, 4], got [4]"),
    ({"position_ids": torch.arange(12, 17)[None]}, ValueError, "`position_ids` must be [2, 4] or [1, 4], got [1, 5]"),
    ({"position_ids": torch.arange(-2, 2)[None]}, ValueError, "`position_ids` must be at least 0, got -2 to 1"),
    (
        {"position_ids": torch.tensor([[12, 13, 0, 1]])},
        ValueError,
        "`cache` cannot be filled from packed rows",
    ),
    ({"cache": DynamicCache()}, TypeError, "`cache` must be a HAMCache, got DynamicCache"),
    ({"cache": ((ids(), ids()),)}, TypeError, "`cache` must be a HAMCache, got tuple"),
    ({"threshold": "0.5"}, TypeError, "`threshold` is '0.5' of type str; expected a number, a list of 2 numbers"),
    ({"threshold": True}, TypeError, "`threshold` is True of type bool; expected a number"),
    ({"threshold": {"all": 0.5}}, TypeError, "`threshold` is {'all': 0.5} of type dict; expected a number"),
    ({"threshold": NAN}, ValueError, "`threshold` must not be NaN; expected a number"),
    ({"threshold": [0.5]}, ValueError, "`threshold` has 1 entries; expected a number, a list of 2 numbers"),
    ({"threshold": [0.5] * 3}, ValueError, "`threshold` has 3 entries; expected a number, a list of 2 numbers"),
    ({"threshold": []}, ValueError, "`threshold` has 0 entries; expected a number, a list of 2 numbers"),
    ({"threshold": [0.5, "a"]}, TypeError, "`threshold` is [0.5, 'a'] of type list; expected a number"),
    ({"threshold": [0.5, NAN]}, ValueError, "`threshold` must not be NaN"),
    ({"threshold": ids(ROWS)}, TypeError, "`threshold` must be a floating-point tensor, got torch.int64"),
    ({"threshold": torch.tensor(True)}, TypeError, "`threshold` is tensor(True) of type Tensor; expected a number"),
    ({"threshold": np.bool_(True)}, TypeError, "; expected a number, a list of 2 numbers"),
    ({"threshold": np.array([0.5, 0.5])}, TypeError, "of type ndarray; expected a number, a list of 2 numbers"),
    ({"threshold": np.float32(NAN)}, ValueError, "`threshold` must not be NaN; expected a number"),
    ({"threshold": torch.tensor(NAN)}, ValueError, "`threshold` must not be NaN; expected a number"),
    *[
        ({"threshold": bad}, ValueError, "`threshold` must be between -2**53 and 2**53, or infinite; expected a nu")
        for bad in (HUGE, -HUGE, [0.5, HUGE], 2**54)
    ],
    ({"threshold": torch.zeros(3)}, ValueError, "`threshold` has shape [3]; expected a number"),
    ({"threshold": torch.zeros(2, 2)}, ValueError, "`threshold` has shape [2, 2]"),
    (
        {"threshold": torch.zeros(2, 2, 3)},
        ValueError,
        "tensor [2 or 1, 2 or 1, 2 or 1] (layers, rows, key/value heads)",
    ),
    ({"threshold": torch.zeros(3, 1, 1)}, ValueError, "`threshold` has shape [3, 1, 1]"),
    ({"threshold": with_nan(ROWS)}, ValueError, "`threshold` must not be NaN"),
    ({"threshold": 0.5, "kv_usage": 0.5}, ValueError, "at most one of `threshold` and `kv_usage`"),
    ({"kv_usage": 0.5}, ValueError, "`kv_usage` needs score quantiles, and this checkpoint has none"),
    *[
        ({"kv_usage": bad}, error, "`kv_usage` must be a number between 0 and 1")
        for bad, error in [
            ("0.5", TypeError),
            (True, TypeError),
            ([0.5], TypeError),
            (torch.tensor([0.5]), TypeError),
            (torch.tensor(False), TypeError),
            (np.bool_(True), TypeError),
            (np.array([0.5]), TypeError),
            (NAN, ValueError),
            (np.float32(NAN), ValueError),
            (torch.tensor(1.5), ValueError),
            (HUGE, ValueError),
            (-HUGE, ValueError),
            (-0.1, ValueError),
            (1.1, ValueError),
            (math.inf, ValueError),
        ]
    ],
    *[
        ({"kv_budget": bad}, error, "`kv_budget` must be a positive int (kept tokens per head)")
        for bad, error in [
            ("4", TypeError),
            (True, TypeError),
            (4.0, TypeError),
            (NAN, TypeError),
            ([4], TypeError),
            (torch.tensor([4]), TypeError),
            (torch.tensor(4.0), TypeError),
            (torch.tensor(True), TypeError),
            (np.float32(4), TypeError),
            (np.bool_(True), TypeError),
            (np.int64(0), ValueError),
            (2**63, ValueError),
            (2**64, ValueError),
            (HUGE, ValueError),
            (-HUGE, ValueError),
            (0, ValueError),
            (-1, ValueError),
        ]
    ],
    ({"seq_idx": [[0, 0, 1, 1]] * ROWS}, TypeError, "`seq_idx` must be an integer tensor [2, 4], got list"),
    ({"seq_idx": torch.zeros(ROWS, NEW)}, TypeError, "`seq_idx` must be an integer tensor [2, 4]"),
    ({"seq_idx": ids(ROWS, 16)}, ValueError, "`seq_idx` must be [2, 4], got [2, 16]"),
    ({"seq_idx": torch.tensor([[0, 1, 0, 1]] * ROWS)}, ValueError, "`seq_idx` must not fall along a row"),
    ({"seq_idx": ids()}, ValueError, "`cache` cannot be filled from packed rows"),
    ({"treshold": 0.5}, TypeError, "unexpected keyword arguments ['treshold']"),
    ({"cache_position": torch.arange(4)}, TypeError, "unexpected keyword arguments ['cache_position']"),
]
EMBEDDINGS = [
    ([[0.0] * HIDDEN], TypeError, "`inputs_embeds` must be a floating-point tensor [rows, tokens, 32], got list"),
    (
        ids(ROWS, NEW, HIDDEN),
        TypeError,
        "`inputs_embeds` must be a floating-point tensor [rows, tokens, 32], got torch.int",
    ),
    (torch.zeros(NEW, HIDDEN), ValueError, "`inputs_embeds` must be [rows, tokens, 32], got [4, 32]"),
    (torch.zeros(ROWS, NEW, 31), ValueError, "`inputs_embeds` must be [rows, tokens, 32], got [2, 4, 31]"),
    (torch.zeros(ROWS, 0, HIDDEN), ValueError, "(or `inputs_embeds`) must hold at least one"),
]
# One packed row, without a cache.
LENGTHS = [
    ([0, 2, 4], TypeError, "`cu_seq_lens_q` must be an integer tensor [any], got list"),
    (torch.tensor([0.0, 4.0]), TypeError, "`cu_seq_lens_q` must be an integer tensor [any]"),
    (torch.tensor([[0, 4]]), ValueError, "`cu_seq_lens_q` must be [any], got [1, 2]"),
    *[
        (torch.tensor(bad, dtype=torch.int32), ValueError, "`cu_seq_lens_q` must rise from 0 to 4")
        for bad in ([], [0], [1, 4], [0, 3], [0, 5], [0, 3, 2, 4], [-1, 4])
    ],
]
HEAD = [
    ({"logits_to_keep": -1}, ValueError, "`logits_to_keep` must be 0 (all) or positive"),
    ({"logits_to_keep": 1.0}, TypeError, "`logits_to_keep` must be an int or an integer tensor, got 1.0"),
    ({"logits_to_keep": True}, TypeError, "`logits_to_keep` must be an int or an integer tensor, got True"),
    ({"logits_to_keep": None}, TypeError, "`logits_to_keep` must be an int or an integer tensor, got None"),
    ({"logits_to_keep": torch.tensor([0.5])}, TypeError, "`logits_to_keep` must be an integer tensor [any]"),
    ({"logits_to_keep": torch.tensor([[1]])}, ValueError, "`logits_to_keep` must be [any], got [1, 1]"),
    ({"logits_to_keep": torch.tensor([4])}, ValueError, "`logits_to_keep` must be between -4 and 3, got 4 to 4"),
    ({"labels": [[1] * NEW] * ROWS}, TypeError, "`labels` must be an integer tensor [2, 4], got list"),
    ({"labels": torch.ones(ROWS, NEW)}, TypeError, "`labels` must be an integer tensor [2, 4], got torch.float32"),
    ({"labels": ids(ROWS, NEW + 1)}, ValueError, "`labels` must be [2, 4], got [2, 5]"),
    ({"labels": ids() * VOCABULARY}, ValueError, "`labels` must be between 0 and 96, got 97 to 97"),
    ({"labels": ids() * -5}, ValueError, "`labels` must be between 0 and 96, got -5 to -5"),
    ({"shift_labels": ids(ROWS, NEW - 1)}, ValueError, "`shift_labels` must be [2, 4], got [2, 3]"),
    ({"labels": ids(), "treshold": 0.5}, TypeError, "unexpected keyword arguments ['treshold']"),
    ({"ignore_index": 3}, TypeError, "unexpected keyword arguments ['ignore_index']"),
]


@pytest.mark.parametrize("head", [False, True], ids=["HAMModel", "HAMForCausalLM"])
@pytest.mark.parametrize(("bad", "error", "message"), INPUTS, ids=name_of)
def test_inputs(model, cache, head, bad, error, message):
    run = model if head else model.model
    arguments = {"input_ids": ids(), "cache": cache} | bad
    assert_refuses(lambda: run(**arguments), error, message, cache)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (-1, ValueError, "`last_n` must be 0 (all) or positive (a number of last tokens), got -1"),
        (1.0, TypeError, "`last_n` must be an int, got 1.0"),
        (True, TypeError, "`last_n` must be an int, got True"),
        (None, TypeError, "`last_n` must be an int, got None"),
    ],
)
def test_last_n(model, cache, bad, error, message):
    run = model.model
    assert_refuses(lambda: run(ids(), cache=cache, last_n=bad), error, message, cache)


@pytest.mark.parametrize(("bad", "error", "message"), EMBEDDINGS)
def test_embeddings(model, cache, bad, error, message):
    for run in (model, model.model):
        assert_refuses(lambda run=run: run(inputs_embeds=bad, cache=cache), error, message, cache)


@pytest.mark.parametrize(("bad", "error", "message"), LENGTHS)
def test_lengths_of_packed_documents(model, bad, error, message):
    for run in (model, model.model):
        with pytest.raises(error, match=re.escape(message)):
            run(ids(1, NEW), cu_seq_lens_q=bad)


def test_packed_rows_in_places_where_they_cannot_be(model, cache):
    lengths = torch.tensor([0, 2, 4])
    for arguments, message in (
        ({"input_ids": ids(), "cu_seq_lens_q": lengths}, "`cu_seq_lens_q` needs a single row, got 2 rows"),
        (
            {"input_ids": ids(1, NEW), "cu_seq_lens_q": lengths, "kv_budget": 3},
            "`kv_budget` cannot be combined with packed",
        ),
        (
            {"input_ids": ids(1, NEW), "cu_seq_lens_q": lengths, "cu_seq_lens_k": torch.tensor([0, 3, 4])},
            "`cu_seq_lens_k` must equal `cu_seq_lens_q`",
        ),
        ({"input_ids": ids(1, NEW), "cu_seq_lens_k": lengths}, "`cu_seq_lens_q`"),
        (
            {"input_ids": ids(1, NEW), "cu_seq_lens_q": lengths, "cache": HAMCache(model.config)},
            "`cache` cannot be filled from packed rows",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            model(**arguments)
    cache.batch_select_indices(torch.tensor([0]))
    packed = {"input_ids": ids(1, NEW), "cache": cache, "cu_seq_lens_q": lengths}
    assert_refuses(lambda: model(**packed), ValueError, "`cache` cannot be filled from packed rows", cache)


@pytest.mark.parametrize(("bad", "error", "message"), HEAD, ids=name_of)
def test_arguments_of_the_head(model, cache, bad, error, message):
    assert_refuses(lambda: model(ids(), cache=cache, **bad), error, message, cache)


def test_what_is_accepted(model, cache):
    """The same checks let through what is right, at the edges of what is right."""
    good = {
        "attention_mask": torch.ones(ROWS, 16),
        "position_ids": torch.arange(12, 16)[None].int(),
        "labels": torch.tensor([[-100, 0, 96, 1]] * ROWS),
        "logits_to_keep": torch.tensor([-4, 3]),
        "threshold": torch.full((2, 1, 2), math.inf),
        "kv_budget": 1,
    }
    for name, value in good.items():
        copy = HAMCache(model.config)
        model(ids(ROWS, SEEN), cache=copy)
        if name == "logits_to_keep":
            assert model(ids(), cache=copy, logits_to_keep=value).logits.shape[1] == 2
        else:
            model(ids(), cache=copy, **{name: value})
        assert copy.get_seq_length() == 16
    assert model(ids().int()).logits.isfinite().all()
    assert model(ids(), logits_to_keep=100).logits.shape[1] == NEW
    assert model(ids(), labels=torch.full((ROWS, NEW), 7), ignore_index=0, num_items_in_batch=3).loss.isfinite()
    assert model(ids(), labels=ids() * -7, ignore_index=-7).loss.isnan(), "no label is left"


SCALARS = {
    "float32": lambda x: np.float32(x),
    "float16": lambda x: np.float16(x),
    "array": lambda x: np.array(x),
    "tensor": lambda x: torch.tensor(x),
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("scalar", SCALARS)
def test_scalars_of_others_are_numbers(model, tiny_config, scalar):
    """NumPy's, and tensors without dimensions: of thresholds and fractions a float, of budgets an int."""
    half, three = SCALARS[scalar](0.5), np.int32(3) if scalar == "float32" else torch.tensor(3)
    prompt = torch.randint(1, VOCABULARY, (ROWS, SEEN))
    calibrated = HAMForCausalLM(tiny_config()).eval()
    calibrated.load_state_dict(model.state_dict())
    for layer in calibrated.model.layers:
        layer.mixer.score_quantiles.copy_(torch.linspace(0, 1, layer.mixer.score_quantiles.shape[-1]))
    for given, plain in (
        ({"threshold": half}, {"threshold": 0.5}),
        ({"threshold": [half, three]}, {"threshold": [0.5, 3]}),
        ({"threshold": three}, {"threshold": 3}),
        ({"kv_usage": half}, {"kv_usage": 0.5}),
        ({"kv_budget": three, "threshold": 0}, {"kv_budget": 3, "threshold": 0}),
    ):
        expected = calibrated(prompt, **plain).cache.kept_tokens()
        assert torch.equal(calibrated(prompt, **given).cache.kept_tokens(), expected)
        fixed = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        configured = GenerationConfig(**fixed, **given)
        for arguments in (fixed | given, {"generation_config": configured}):
            assert torch.equal(calibrated.generate(prompt, **arguments).cache.kept_tokens(), expected)


def test_a_budget_and_a_recording_cache(model, cache):
    cache.activate_past_recording()
    arguments = {"cache": cache, "kv_budget": 5}
    assert_refuses(
        lambda: model(ids(), **arguments), ValueError, "`kv_budget` cannot be combined with assisted", cache
    )


def test_arguments_that_exclude_each_other(tiny_config):
    model = HAMForCausalLM(tiny_config()).eval()
    ids = torch.randint(1, 97, (1, 6))
    with pytest.raises(ValueError, match="`output_attentions` cannot be combined with `kv_budget`"):
        model(ids, output_attentions=True, kv_budget=2)


def test_two_ways_to_tell_documents_must_agree(tiny_config):
    """Collators for packed rows give both."""
    model = HAMForCausalLM(tiny_config()).eval()
    ids, lengths = torch.randint(1, 97, (1, 6)), torch.tensor([0, 3, 6], dtype=torch.int32)
    alone = model(ids, cu_seq_lens_q=lengths, use_cache=False).logits
    for seq_idx in ([[0, 0, 0, 1, 1, 1]], [[2, 2, 2, 5, 5, 5]]):
        both = {"seq_idx": torch.tensor(seq_idx, dtype=torch.int32), "cu_seq_lens_q": lengths}
        assert torch.equal(model(ids, **both, cu_seq_lens_k=lengths, use_cache=False).logits, alone)
    for seq_idx in ([[0, 0, 1, 1, 1, 1]], [[0, 0, 0, 0, 0, 0]], [[0, 0, 0, 1, 1, 2]]):
        with pytest.raises(ValueError, match="`seq_idx` and `cu_seq_lens_q` must begin documents at the same tokens"):
            model(ids, seq_idx=torch.tensor(seq_idx), cu_seq_lens_q=lengths, use_cache=False)
