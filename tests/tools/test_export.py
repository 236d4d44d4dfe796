# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""torch.export of the forward call: one program for every length, padded or packed, at thresholds of the model."""

import copy

import pytest
import torch
from torch.export import Dim, export

from ham_hf import HAMForCausalLM, mixer_ham, ops_ham

# Sums in another order: 2e-7 measured, of logits about 1.
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def program(model, inputs, **options):
    """The exported program for any number of tokens."""
    tokens = Dim("tokens", min=3, max=4096)
    shapes = {name: {1: tokens} for name in inputs} | dict.fromkeys(options)
    exported = export(model, (), {**inputs, **options}, dynamic_shapes=shapes, strict=False)
    return exported.module()


def assert_same(exported, model, inputs, **options):
    with torch.no_grad():
        found, expected = exported(**inputs, **options).logits, model(**inputs, **options).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("router", "kinds"),
    [
        ("cosine", ["hybrid", "linear_attention", "full_attention"]),
        pytest.param("residual", ["hybrid"], marks=pytest.mark.slow),
        pytest.param("learned_error", ["hybrid"], marks=pytest.mark.slow),
        pytest.param("random", ["hybrid"], marks=pytest.mark.slow),
    ],
    ids=["cosine", "residual", "learned_error", "random"],
)
def test_any_length_and_padding(router, kinds, tiny_config):
    """Only hybrid layers have a router, so that the other kinds are there once."""
    model = HAMForCausalLM(tiny_config(num_hidden_layers=len(kinds), layer_types=kinds, router=router)).eval()

    def batch(length, padding):
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, :padding] = 0
        return {"input_ids": torch.randint(1, 97, (2, length)), "attention_mask": mask}

    options = {"use_cache": False, "threshold": 0.5}
    exported = program(model, batch(40, 7), **options)
    for length, padding in ((40, 0), (3, 0), (31, 30), (150, 33)):
        assert_same(exported, model, batch(length, padding), **options)


@pytest.mark.slow
def test_long_texts_are_as_exact(tiny_config):
    """Over a whole text decays add up to thousands, of which float32 would keep no differences below 1e-3."""
    model = HAMForCausalLM(tiny_config(layer_types=["hybrid", "linear_attention"], initializer_range=0.1)).eval()
    options = {"use_cache": False, "threshold": 0.0}
    exported = program(model, {"input_ids": torch.randint(1, 97, (2, 40))}, **options)
    # As many tokens as a state of the convolution holds are no exception, in a batch without a mask.
    assert_same(exported, model, {"input_ids": torch.randint(1, 97, (2, 3))}, **options)
    ids = torch.randint(1, 97, (2, 1000))
    with torch.no_grad():
        found = exported(input_ids=ids, **options).logits
        eager, exact = (x(ids, **options).logits for x in (model, copy.deepcopy(model).double()))
    assert (found - exact).abs().max() < 2 * (eager - exact).abs().max()


@pytest.mark.slow
def test_packed_rows(tiny_config):
    model = HAMForCausalLM(tiny_config(num_hidden_layers=1)).eval()

    def packed(*lengths):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        return {"input_ids": torch.randint(1, 97, positions.shape), "position_ids": positions}

    exported = program(model, packed(20, 13), use_cache=False)
    for lengths in ((20, 13), (50,), (1, 70, 3, 9)):
        assert_same(exported, model, packed(*lengths), use_cache=False)


@pytest.mark.slow
def test_the_embedded_checkpoint_after_saving(model, tokenizer, tmp_path):
    """At its learned thresholds."""
    inputs = dict(tokenizer("The captain looked at the sea, and", return_tensors="pt"))
    shapes = {name: {1: Dim("tokens", min=3, max=4096)} for name in inputs} | {"use_cache": None}
    torch.export.save(export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes), tmp_path / "ham.pt2")
    loaded = torch.export.load(tmp_path / "ham.pt2").module()
    other = dict(tokenizer("It is a truth universally acknowledged, that a single man", return_tensors="pt"))
    with torch.no_grad():
        found, expected = loaded(**other, use_cache=False).logits, model(**other, use_cache=False).logits
        kept_all = model(**other, use_cache=False, threshold=0.0).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)  # logits up to 30
    assert (kept_all - expected).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what Dynamo cannot trace, it leaves to Python and tells
def test_compiling_is_not_exporting(tiny_config, monkeypatch):
    """Before PyTorch 2.14 Dynamo takes `torch.compiler.is_exporting()` for true: compiled models must stay sparse."""
    model = HAMForCausalLM(tiny_config()).eval()
    ids = torch.randint(1, 97, (2, 50))
    monkeypatch.setattr(mixer_ham, "weighted_sum", None)
    monkeypatch.setattr(ops_ham, "is_torchdynamo_exporting", lambda: True)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(ids, threshold=0.5, use_cache=True)
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(ids, threshold=0.5).logits, **TOLERANCE)
    assert found.cache.get_seq_length() == 50


def test_what_depends_on_data_is_refused(tiny_config):
    model = HAMForCausalLM(tiny_config()).eval()
    inputs = {"input_ids": torch.randint(1, 97, (1, 9))}
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        program(model, inputs, use_cache=True)
    with pytest.raises(ValueError, match="`kv_budget` None"):
        program(model, inputs, use_cache=False, kv_budget=3)
