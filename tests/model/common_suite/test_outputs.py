# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The common tests of Transformers' models, of the outputs of a call."""

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import output_capturing

from ham_hf import (
    HAMCache,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    inputs_ham,
)
from ham_hf.inputs_ham import CACHE_NAME
from tests.model.common_suite.losses import MODELS, outputs_of
from tests.model.models import example, moved, tokens

# Newer releases of Transformers record the hidden states of chosen layers only.
CHOOSES_LAYERS = hasattr(output_capturing, "resolve_hidden_states_indices")


class TestOutputs:
    @pytest.mark.parametrize("cls", MODELS)
    def test_calls_repeat(self, cls, every_kind):
        model, inputs = moved(cls(every_kind)).eval(), {"input_ids": tokens(2, 9)}
        first, second = outputs_of(model(**inputs)), outputs_of(model(**inputs))
        assert first
        assert all(torch.equal(second[name], x) for name, x in first.items())

    @pytest.mark.parametrize("wanted", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=str)
    @pytest.mark.parametrize("cls", MODELS)
    def test_a_tuple_has_the_entries_of_the_output_in_order(self, cls, every_kind, wanted):
        model, inputs = moved(cls(every_kind)).eval(), example(cls)
        named = model(**inputs, **wanted)
        entries = model(**inputs, **wanted, return_dict=False)
        assert type(entries) is tuple
        assert (CACHE_NAME in named) == (cls not in (HAMForTokenClassification, HAMForQuestionAnswering))
        for name, found in zip(named, entries, strict=True):
            if name == CACHE_NAME:
                assert type(found) is HAMCache
                continue
            pairs = zip(found, named[name], strict=True) if isinstance(found, tuple) else [(found, named[name])]
            assert all(torch.equal(x, y) for x, y in pairs), name

    @pytest.mark.parametrize("cls", MODELS)
    def test_the_configuration_says_what_is_returned(self, cls, every_kind):
        every_kind.output_hidden_states = every_kind.output_attentions = True
        model = cls(every_kind).eval()
        attentions = sum(kind != "linear_attention" for kind in every_kind.layer_types)
        out = model(tokens(3, 9))
        assert (len(out.hidden_states), len(out.attentions)) == (every_kind.num_hidden_layers + 1, attentions)
        out = model(tokens(3, 9), output_hidden_states=False, output_attentions=False)
        assert (out.get("hidden_states"), out.get("attentions")) == (None, None)

    @pytest.mark.skipif(not CHOOSES_LAYERS, reason="Transformers records all layers or none")
    @pytest.mark.parametrize("cls", MODELS)
    def test_hidden_states_of_chosen_layers(self, cls, every_kind):
        model, input_ids = moved(cls(every_kind)).eval(), tokens(3, 9)
        every = model(input_ids, output_hidden_states=True).hidden_states
        chosen = model(input_ids, output_hidden_states=[0, -1]).hidden_states
        assert [x is not None for x in chosen] == [True] + [False] * (len(every) - 2) + [True]
        assert torch.equal(chosen[0], every[0])
        assert torch.equal(chosen[-1], every[-1])

    @pytest.mark.parametrize("cls", MODELS)
    def test_recorded_outputs_are_in_the_graph(self, cls, every_kind):
        model = moved(cls(every_kind)).eval()
        out = model(tokens(3, 9), output_hidden_states=True, output_attentions=True)
        recorded = [*out.hidden_states, *out.attentions]
        for x in recorded:
            x.retain_grad()
        next(iter(outputs_of(out).values())).square().sum().backward()
        assert all(x.grad is not None and x.grad.any() for x in recorded)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("cls", MODELS)
    def test_a_row_does_not_depend_on_the_others(self, cls, every_kind, side):
        model = moved(cls(every_kind)).eval()
        lengths = (9, 4, 1)
        rows = [tokens(1, n) for n in lengths]
        pads = [(0, 9 - n) if side == "right" else (9 - n, 0) for n in lengths]
        batch = torch.cat([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        together = outputs_of(model(batch, attention_mask=(batch > 0).long()))
        for n, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            for name, alone in outputs_of(model(row)).items():
                found = together[name][n : n + 1]
                if cls is not HAMForSequenceClassification:
                    found = found[:, pad[0] : 9 - pad[1]]
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)

    def test_the_cache_s_old_name_is_still_taken(self, model, monkeypatch):
        """Under Transformers 5.24 with a warning, and to the same effect."""
        warnings = []
        monkeypatch.setattr(inputs_ham.logger, "warning_once", warnings.append)
        input_ids, caches = tokens(2, 9), [HAMCache(model.config), HAMCache(model.config)]
        for name, cache in zip(("cache", "past_key_values"), caches, strict=True):
            for part in input_ids.split(5, dim=1):
                out = model(part, **{name: cache})
                assert out.cache is cache
                assert out[CACHE_NAME] is cache
        assert len(warnings) == (2 if CACHE_NAME == "cache" else 0)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 9
        following = tokens(2, 1)
        assert torch.equal(*(model(following, cache=cache).logits for cache in caches))
