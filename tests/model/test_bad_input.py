# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Whatever is wrong is refused before anything has changed, with an error that names it and tells what is accepted."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM, HAMModel

ROWS, SEEN, NEW, VOCABULARY, HIDDEN = 2, 12, 4, 97, 32
NAN = math.nan
# Python refuses to print it, and to make a float of it.
HUGE = 10**5000


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return HAMForCausalLM(tiny_config()).eval().requires_grad_(False)


@pytest.fixture
def cache(model):
    cache = HAMCache(model.config)
    model(torch.randint(1, VOCABULARY, (ROWS, SEEN)), cache=cache, threshold=0.5)
    return cache


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


def name_of(case):
    return ",".join(case) if isinstance(case, dict) else None


@pytest.mark.parametrize("head", [False, True], ids=["HAMModel", "HAMForCausalLM"])
@pytest.mark.parametrize(("bad", "error", "message"), INPUTS, ids=name_of)
def test_inputs(model, cache, head, bad, error, message):
    run = model if head else model.model
    arguments = {"input_ids": ids(), "cache": cache} | bad
    assert_refuses(lambda: run(**arguments), error, message, cache)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (-1, ValueError, "`last_n` must be 0 (all) or positive (the last so many), got -1"),
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
        ({"input_ids": ids(), "cu_seq_lens_q": lengths}, "needs a single row, got [0, 2, 4] for 2 rows"),
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


# --- generate --------------------------------------------------------------------------------------------------------

GENERATE = [
    ({"threshold": "0.5"}, TypeError, "`threshold` is '0.5' of type str"),
    ({"threshold": [0.5] * 3}, ValueError, "`threshold` has 3 entries; expected a number, a list of 2 numbers"),
    ({"threshold": torch.zeros(3)}, ValueError, "`threshold` has shape [3]"),
    ({"threshold": NAN}, ValueError, "`threshold` must not be NaN"),
    ({"threshold": 0.5, "kv_usage": 0.5}, ValueError, "at most one of `threshold` and `kv_usage`"),
    ({"kv_usage": NAN}, ValueError, "`kv_usage` must be a number between 0 and 1"),
    ({"kv_usage": "half"}, TypeError, "`kv_usage` must be a number between 0 and 1"),
    ({"kv_budget": 0}, ValueError, "`kv_budget` must be a positive int"),
    ({"kv_budget": 2.5}, TypeError, "`kv_budget` must be a positive int"),
    ({"kv_budget": 2**64}, ValueError, "`kv_budget` must be a positive int (kept tokens per head) below 2**63"),
    ({"kv_budget": HUGE}, ValueError, "`kv_budget` must be a positive int (kept tokens per head) below 2**63"),
    ({"kv_usage": HUGE}, ValueError, "`kv_usage` must be a number between 0 and 1"),
    ({"threshold": HUGE}, ValueError, "`threshold` must be between -2**53 and 2**53, or infinite"),
    ({"treshold": 0.5}, ValueError, "['treshold']"),
    ({"attention_mask": torch.zeros(ROWS, 3, dtype=torch.long)}, ValueError, "`attention_mask` must be [2, "),
    ({"position_ids": torch.arange(16)}, ValueError, "`position_ids` must be [2, 4] or [1, 4], got [4]"),
    ({"logits_to_keep": -1}, ValueError, "`logits_to_keep` must be 0 (all) or positive"),
    ({"cache": DynamicCache()}, TypeError, "`cache` must be a HAMCache, got DynamicCache"),
    ({"cache_implementation": "dynamic"}, ValueError, "Passing both `cache_implementation`"),
]


@pytest.mark.parametrize(("bad", "error", "message"), GENERATE, ids=name_of)
def test_generate(model, cache, bad, error, message):
    """With a conversation that goes on: the cache of the turns before survives the refusal."""
    arguments = {"cache": cache, "max_new_tokens": 3, "do_sample": False} | bad
    assert_refuses(lambda: model.generate(ids(ROWS, SEEN + NEW), **arguments), error, message, cache)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"inputs": ids() * VOCABULARY}, ValueError, "`input_ids` must be between 0 and 96"),
        ({"inputs": torch.ones(ROWS, NEW)}, TypeError, "`input_ids` must be an integer tensor"),
        (
            {"cache_implementation": "static"},
            ValueError,
            "`cache_implementation` must be None, 'dynamic' or 'offloaded'",
        ),
        (
            {"cache_implementation": "quantized"},
            ValueError,
            "`cache_implementation` must be None, 'dynamic' or 'offloaded'",
        ),
        ({"cache_implementation": "no such"}, ValueError, "`cache_implementation`"),
        ({"cache_implementation": 3}, ValueError, "`cache_implementation`"),
    ],
)
def test_generate_from_nothing(model, bad, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model.generate(**{"inputs": ids(), "max_new_tokens": 3} | bad)


# --- the cache -------------------------------------------------------------------------------------------------------

CACHE = [
    (lambda cache: cache.prune(None), TypeError, "`threshold` must be given"),
    (lambda cache: cache.prune("0.5"), TypeError, "`threshold` is '0.5' of type str"),
    (lambda cache: cache.prune(NAN), ValueError, "`threshold` must not be NaN"),
    (
        lambda cache: cache.prune([0.5]),
        ValueError,
        "`threshold` has 1 entries; expected a number, a list of 2 numbers",
    ),
    (lambda cache: cache.prune(torch.zeros(3)), ValueError, "`threshold` has shape [3]"),
    (lambda cache: cache.crop(-1), ValueError, "reaches past the 0 tokens recorded"),
    (lambda cache: cache.crop(2), ValueError, "`tokens_to_remove` must be 0 or negative"),
    (lambda cache: cache.crop("2"), TypeError, "`tokens_to_remove` must be 0 or a negative int, got '2'"),
    (lambda cache: cache.crop(NAN), TypeError, "`tokens_to_remove` must be 0 or a negative int, got nan"),
    (lambda cache: cache.batch_select_indices([0.5]), TypeError, "`indices` must be a tensor or list of row numbers"),
    (lambda cache: cache.batch_select_indices([2]), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.batch_select_indices([]), TypeError, "`indices` must be a tensor or list of row numbers"),
    (
        lambda cache: cache.batch_select_indices(torch.tensor([0.0])),
        TypeError,
        "`indices` must be a tensor or list of row numbers",
    ),
    (
        lambda cache: cache.batch_select_indices(torch.tensor([2])),
        ValueError,
        "`indices` must be a tensor or list of row numbers",
    ),
    (lambda cache: cache.batch_select_indices(torch.tensor([-3])), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.batch_select_indices(torch.tensor([True])), ValueError, "row numbers below 2, or 2 bools"),
    (
        lambda cache: cache.batch_select_indices(torch.tensor([False, False])),
        ValueError,
        "at least one; got [F",
    ),
    (lambda cache: cache.batch_select_indices(ids(0)), ValueError, "at least one; got []"),
    (lambda cache: cache.batch_select_indices(ids(1, 1)), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.reorder_cache(torch.tensor([0, 5])), ValueError, "row numbers below 2, or 2 bools"),
    (lambda cache: cache.batch_repeat_interleave(0), ValueError, "`repeats` must be a positive int, got 0"),
    (lambda cache: cache.batch_repeat_interleave(1.5), TypeError, "`repeats` must be a positive int, got 1.5"),
    (lambda cache: cache.batch_repeat_interleave(True), TypeError, "`repeats` must be a positive int, got True"),
    (lambda cache: cache.kept_positions(2), ValueError, "`layer_idx` must be between 0 and 1, got 2"),
    (lambda cache: cache.kept_positions(-1), ValueError, "`layer_idx` must be between 0 and 1, got -1"),
    (lambda cache: cache.kept_positions("0"), TypeError, "`layer_idx` must be an int, got '0'"),
    (lambda cache: cache.save(3), TypeError, "os.PathLike"),
    (lambda cache: HAMCache(None), TypeError, "`config` must be a HAMConfig, got NoneType"),
    (lambda cache: HAMCache(cache.config.to_dict()), TypeError, "`config` must be a HAMConfig, got dict"),
    (
        lambda cache: HAMCache(cache.config, offloading="yes"),
        TypeError,
        "`offloading` must be True or False, got 'yes'",
    ),
    (lambda cache: HAMCache(cache.config, offloading=1), TypeError, "`offloading` must be True or False, got 1"),
    (lambda cache: HAMCache.load(3, cache.config), TypeError, "os.PathLike"),
    (lambda cache: HAMCache.load("cache", None), TypeError, "`config` must be a HAMConfig, got NoneType"),
    (lambda cache: HAMCache.load("cache", cache.config, device="nowhere"), RuntimeError, "nowhere"),
]


@pytest.mark.parametrize(("call", "error", "message"), CACHE)
def test_cache_methods(cache, call, error, message):
    assert_refuses(lambda: call(cache), error, message, cache)


def test_saving_where_nothing_can_be_saved(cache, tmp_path):
    for target in (tmp_path / "no" / "such" / "folder", tmp_path):
        before = contents(cache)
        with pytest.raises((OSError, SafetensorError), match=re.escape(str(tmp_path))):
            cache.save(target)
        assert all(torch.equal(x, contents(cache)[name]) for name, x in before.items())
    assert list(tmp_path.iterdir()) == []
    assert not tmp_path.with_name(f"{tmp_path.name}.partial").exists()


# --- the configuration -----------------------------------------------------------------------------------------------

SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "value_head_dim max_position_embeddings conv_kernel_size router_hidden_size"
)
SWITCHES = (
    "use_cache tie_word_embeddings attention_bias mlp_bias attention_conv qk_norm rnn_output_norm kv_output_norm "
    "output_gate allow_neg_eigval attention_post_norm zero_centered_norms"
)
LINEAR_SHAPE = "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim"
LINEAR = dict(zip(LINEAR_SHAPE.split(), (2, 4, 6, 5), strict=True))


def rope(**overrides):
    return {"rope_type": "default", "rope_theta": 10000.0} | overrides


FIELDS = {
    **{name: [0, -1, 2.0, "4", True, NAN, [4]] for name in SIZES.split()},
    **{name: ["yes", None, 1, 0.0, NAN] for name in SWITCHES.split()},
    **{name: [0, -1, 2.0, "4", True, NAN, [4], 4] for name in LINEAR_SHAPE.split()},
    "linear_output_gate": ["swish", 1, 0.0, NAN],
    "output_norm_eps": [0.0, -1.0, NAN, math.inf, "1", True],
    "initializer_range": [0.0, -1.0, NAN, math.inf, "1", None, True],
    "rms_norm_eps": [0.0, -1.0, NAN, math.inf, "1", None, True],
    "target_kv_usage": [
        -0.1,
        1.1,
        NAN,
        math.inf,
        "1",
        True,
        [],
        [0.5],
        [0.5] * 3,
        [0.5, 1.1],
        [0.5, NAN],
        [0.5, True],
        [0.5, "a"],
        [0.5, None],
        (0.5, 0.5),
        {"all": 0.5},
    ],
    "threshold": [
        NAN,
        "1",
        True,
        (0.1, 0.2),
        [0.1],
        [0.1] * 3,
        [],
        [0.1, NAN],
        [0.1, "a"],
        [True, False],
        {"all": 0.1},
    ],
    "threshold_scope": ["heads", None, 3],
    "router": ["mlp", "", None, 3],
    "hidden_act": ["no such", None, 3],
    "layer_types": [["hybrid"], ["hybrid"] * 3, [], "hybrid", ["hybrid", "ham"], [1, 2]],
    "rope_parameters": [
        "default",
        [1],
        3.0,
        rope(rope_type="spiral"),
        rope(rope_theta=NAN),
        rope(rope_theta=-1.0),
        rope(rope_theta=0.0),
        rope(rope_theta="x"),
        rope(rope_theta=None),
        rope(rope_type="linear", factor=0.5),
        rope(rope_type="linear", factor=NAN),
        *(rope(partial_rotary_factor=factor) for factor in (0, -0.5, 1.5, NAN, "0.5", True, None)),
        {"hybrid": rope()},
    ],
    "pad_token_id": [-1, VOCABULARY, "a", 1.5, True, [0]],
    "bos_token_id": ["a", 1.5, True],
    "eos_token_id": ["a", 1.5, [1.5], True],
}
TOGETHER = [
    (
        {"target_kv_usage": [0.5, 0.5], "threshold_scope": "model"},
        "write one number, or `threshold_scope='layer'`",
    ),
    ({"num_attention_heads": 3}, "`num_attention_heads` (3) must be a multiple of `num_key_value_heads` (2)"),
    ({"num_key_value_heads": 8}, "`num_attention_heads` (4) must be a multiple of `num_key_value_heads` (8)"),
    ({"head_dim": 7}, "RoPE needs an even `head_dim`, got 7; or set `rope_parameters=None`"),
    (
        {"head_dim": 8, "rope_parameters": rope(partial_rotary_factor=0.4)},
        "`rope_parameters['partial_rotary_factor']` times `head_dim` (8) must be an even number of dimensions, at "
        "least 2, got 3 with 0.4",
    ),
    (
        {"head_dim": 8, "rope_parameters": rope(partial_rotary_factor=0.1)},
        "must be an even number of dimensions, at least 2, got 0 with 0.1",
    ),
    (LINEAR | {"linear_value_head_dim": None}, "must be given all four, or all left None"),
    (
        LINEAR | {"linear_num_key_heads": 3},
        "`linear_num_value_heads` (4) must be a multiple of `linear_num_key_heads` (3)",
    ),
    (LINEAR | {"linear_key_head_dim": 0}, "`linear_key_head_dim` must be at least 1, got 0"),
    ({"qk_norm": "head"}, "`qk_norm` must be True (per head), 'projection' (over all heads at once) or False"),
    ({"output_gate": "swish"}, "`output_gate` must be True, False or one of ('silu', 'sigmoid'), got 'swish'"),
    ({"hidden_size": 2}, "`head_dim` must be at least 1, got 0"),
    ({"num_hidden_layers": 3, "layer_types": ["hybrid"] * 2}, "`num_hidden_layers` (3)"),
    (
        {"layer_types": ["hybrid", "linear_attention"], "threshold": [0.1, 0.2]},
        "`threshold` must have one entry per hybrid layer (1), got 2",
    ),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_configuration_fields(tiny_config, field, value):
    with pytest.raises(StrictDataclassError, match=rf"['`]{field}"):
        tiny_config(**{field: value})


def test_every_configuration_field_has_a_wrong_value():
    assert set(HAMConfig.__annotations__) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_numbers_that_do_not_fit_anywhere(tiny_config, field):
    """No field takes them, and none stumbles over them; infinity fits thresholds alone."""
    for value in (HUGE, -HUGE, 2**63, [HUGE]):
        with pytest.raises(StrictDataclassError, match=rf"`{field}` must fit in 64 bits, got an int of \d+ bits"):
            tiny_config(**{field: value})
    for value in (math.inf, -math.inf, [math.inf]):
        if field != "threshold":
            with pytest.raises(StrictDataclassError, match=rf"['`]{field}"):
                tiny_config(**{field: value})


@pytest.mark.parametrize(("values", "message"), TOGETHER)
def test_configuration_fields_that_do_not_fit_together(tiny_config, values, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        tiny_config(**values)


def test_a_configuration_changed_into_a_wrong_one(tiny_config, tmp_path):
    """A wrong type is refused when it is set; a wrong combination when a model is made of it or when it is saved."""
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="head_dim"):
        config.head_dim = "8"
    assert config.head_dim == 8
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="`num_key_value_heads`"):
        HAMModel(config)
    with pytest.raises(StrictDataclassError, match="`num_key_value_heads`"):
        config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"`rope_parameters\['factor'\]` must be given"):
        tiny_config(rope_parameters=rope(rope_type="linear"))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    model.save_pretrained(folder)
    return folder


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def widen_threshold(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mixer.threshold"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        OSError,
        r"no file named model\.safetensors",
    ),
    "cut weights": (cut_weights, ValueError, "is not a whole safetensors file"),
    "foreign weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"foreign"),
        ValueError,
        "is not a whole safetensors file",
    ),
    "a wrong shape": (widen_threshold, RuntimeError, "mismatched_sizes"),
    "another width": (edit_config(hidden_size=64), RuntimeError, "mismatched_sizes"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), OSError, r"config\.json' is not a valid JSON file"),
    "a wrong type": (edit_config(conv_kernel_size="4"), StrictDataclassError, "conv_kernel_size"),
    "a wrong value": (edit_config(router="mlp"), StrictDataclassError, "`router` must be one of"),
    "a wrong length": (edit_config(num_hidden_layers=3), StrictDataclassError, "num_hidden_layers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(checkpoint, tmp_path, caplog, case):
    damage, error, message = BROKEN[case]
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    HAMForCausalLM.from_pretrained(folder)
    damage(folder)
    for auto in (HAMForCausalLM, AutoModelForCausalLM):
        with pytest.raises(error, match=message):
            auto.from_pretrained(folder)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "nothing"))):
        HAMForCausalLM.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": "0.5"}, StrictDataclassError, "threshold"),
        ({"threshold": [0.5]}, ValueError, r"`threshold` must have one entry per hybrid layer \(2\), got 1"),
        ({"threshold": NAN}, ValueError, "`threshold` must not be NaN"),
        ({"target_kv_usage": 2.0}, ValueError, "`target_kv_usage` must be between 0 and 1"),
        ({"treshold": 0.5}, TypeError, "treshold"),
    ],
)
def test_wrong_overrides_of_a_checkpoint(checkpoint, arguments, error, message):
    with pytest.raises(error, match=message):
        HAMForCausalLM.from_pretrained(checkpoint, **arguments)


def test_parameters_that_a_checkpoint_lacks_are_reported(checkpoint, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mixer.threshold"]
    weights["model.layers.0.mixer.novel"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, info = HAMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.0.mixer.threshold"}
    assert set(info["unexpected_keys"]) == {"model.layers.0.mixer.novel"}


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
