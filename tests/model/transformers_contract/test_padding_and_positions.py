# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Padding, packing and positions change no result; a cache has one name, and none comes with checkpoints."""

import pytest
import torch
import torch.nn.functional as F

from ham_hf import HAMCache, HAMForCausalLM, HAMModel, inputs_ham
from ham_hf.inputs_ham import CACHE_NAME
from tests.model.models import HEADS, distinct, tokens
from tests.model.transformers_contract.generation import generate


class TestPaddingAndPacking:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, model, side):
        """Checked at 32 tokens and 1e-5, as the common test does; the routing must not see the padding either."""
        input_ids, padding = tokens(2, 12), torch.zeros(2, 32, dtype=torch.long)
        parts = [padding, input_ids] if side == "left" else [input_ids, padding]
        mask = torch.cat([torch.zeros_like(x) if x is padding else torch.ones_like(x) for x in parts], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        plain = model(input_ids, output_routing_scores=True)
        padded = model(torch.cat(parts, 1), attention_mask=mask, position_ids=positions, output_routing_scores=True)
        where = slice(32, None) if side == "left" else slice(12)
        torch.testing.assert_close(padded.logits[:, where], plain.logits, rtol=0, atol=1e-5)
        for a, b in zip(padded.routing_scores, plain.routing_scores, strict=True):
            torch.testing.assert_close(a[:, where], b, rtol=0, atol=1e-5)
        assert torch.equal(padded.cache.kept_tokens(), plain.cache.kept_tokens())

    def test_padding_changes_nothing_when_a_conversation_goes_on(self, model):
        input_ids, more = tokens(2, 12), tokens(2, 5)
        plain = model(more, cache=model(input_ids).cache)
        mask = F.pad(torch.ones_like(input_ids), (32, 0))
        padded = model(F.pad(input_ids, (32, 0)), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        positions = torch.arange(12, 17)[None]
        padded = model(
            more,
            attention_mask=F.pad(mask, (0, 5), value=1),
            position_ids=positions,
            cache=padded.cache,
        )
        torch.testing.assert_close(padded.logits, plain.logits, rtol=0, atol=1e-5)

    def test_rows_of_a_padded_batch_generate_as_if_alone(self, model):
        lengths, width = (3, 9, 6), 9
        rows = [tokens(1, n) for n in lengths]
        batch = torch.cat([F.pad(row, (width - row.shape[1], 0)) for row in rows])
        out = generate(model, batch, attention_mask=(batch > 0).long())
        for row, sequence in zip(rows, out.sequences, strict=True):
            assert torch.equal(sequence[width:], generate(model, row).sequences[0, row.shape[1] :])

    @pytest.mark.parametrize("form", ["position_ids", "cu_seq_lens_q", "seq_idx"])
    def test_packed_documents_do_not_see_each_other(self, model, form):
        lengths = (7, 1, 11)
        documents = [tokens(1, n) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        ends = torch.tensor([0, 7, 8, 19], dtype=torch.int32)
        extra = {
            "position_ids": {},
            "cu_seq_lens_q": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11},
            "seq_idx": {"seq_idx": torch.repeat_interleave(torch.tensor(lengths))[None].int()},
        }
        packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False, **extra[form]).logits
        alone = torch.cat([model(document).logits for document in documents], dim=1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
        whole = model(torch.cat(documents, 1)).logits
        assert (whole[:, 7:] - alone[:, 7:]).abs().max() > 1e-3, "this model does not look back, so nothing was tested"


class TestPositionsThatFailToRise:
    """They tell of packed documents, which have no cache: whoever wanted one is told."""

    @pytest.fixture
    def warned(self, monkeypatch):
        seen = []
        monkeypatch.setattr(inputs_ham.logger, "warning_once", seen.append)
        return seen

    def test_a_call_that_asks_for_a_cache_is_refused(self, model):
        ids, positions = tokens(2, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
        for arguments in ({"position_ids": positions}, {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}):
            for call in (model, model.model):
                with pytest.raises(ValueError, match="`use_cache` must be False for packed rows"):
                    call(ids, use_cache=True, **arguments)

    def test_a_call_that_says_nothing_of_it_is_told(self, model, warned):
        ids, positions = tokens(2, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
        assert model(ids, position_ids=positions).cache is None
        assert len(warned) == 1
        assert warned[0].startswith("`position_ids` fail to rise, so each row is read as several documents")

    @pytest.mark.parametrize("case", ["said so", "by other arguments", "configured", "training"])
    def test_packing_that_is_meant_is_quiet(self, model, warned, case):
        ids, positions = tokens(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
        arguments = {
            "said so": {"use_cache": False},
            "by other arguments": {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
        }.get(case, {})
        model.config.use_cache = case != "configured"
        out = model.train(case == "training")(ids, position_ids=positions, **arguments)
        assert out.cache is None
        assert warned == []

    @pytest.mark.parametrize("positions", [[0, 0, 0, 0], [7, 7, 7, 7], [3, 2, 1, 0]], ids=str)
    def test_positions_that_rise_nowhere_are_told_of(self, model, warned, positions):
        """Each token is a document of its own then, which may be meant: whatever else is said, in training too."""
        ids, positions = tokens(2, 4), torch.tensor([positions])
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
        message = "`position_ids` rise nowhere, so each token is read as a document of its own, that sees no other."
        for arguments in ({}, {"use_cache": False}, {"attention_mask": mask, "use_cache": False}):
            for training in (False, True):
                warned.clear()
                model.train(training)(ids, position_ids=positions, **arguments)
                assert [text.startswith(message) for text in warned][:1] == [True]
        for arguments in ({"use_cache": True}, {"cache": HAMCache(model.config)}):
            with pytest.raises(ValueError, match="packed rows"):
                model(ids, position_ids=positions, **arguments)
        with pytest.raises(ValueError, match="`cache` cannot be filled from packed rows"):
            model.eval().generate(ids, position_ids=positions, max_new_tokens=2)

    @pytest.mark.parametrize("filler", [0, 1])
    def test_positions_of_padding_may_repeat(self, model, warned, filler):
        """With rows of which a single token is real among them."""
        mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        ids = tokens(3, 4)
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        assert type(out.cache) is HAMCache
        assert torch.equal(out.logits, model(ids, attention_mask=mask).logits)
        one = torch.tensor([[0, 0, 0, 1]])
        assert model(ids[:1], attention_mask=one, position_ids=0 * one).cache is not None
        assert warned == []


class TestNamesOfTheCache:
    @pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    @pytest.mark.parametrize("cls", [HAMModel, *HEADS])
    def test_forward_takes_either(self, cls, config, name):
        model = distinct(cls(config)).eval()
        ids, cache = tokens(2, 6), HAMCache(config)
        expected = model(ids)
        out = model(ids, **{name: cache})
        assert cache.get_seq_length() == 6
        value = next(iter(out.values()))
        assert torch.equal(value, next(iter(expected.values())))
        if CACHE_NAME in out:
            assert out.cache is out[CACHE_NAME] is cache
        if cls in (HAMModel, HAMForCausalLM):
            assert CACHE_NAME in out
            model(ids, None, None, cache)
            assert cache.get_seq_length() == 12
            with pytest.raises(ValueError, match="Give the cache once: `cache` and `past_key_values`"):
                model(ids, cache=cache, past_key_values=cache)
            assert cache.get_seq_length() == 12

    def test_order_of_a_tuple(self, model):
        """As Transformers' own models have it."""
        ids = tokens(2, 6)
        loss, logits, cache, hidden = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
        assert (loss.ndim, logits.shape, type(cache), len(hidden)) == (0, (2, 6, 97), HAMCache, len(hidden))
        state, cache = model.model(ids, return_dict=False)
        assert (state.shape, type(cache)) == ((2, 6, 32), HAMCache)
        cache = HAMCache(model.config)
        assert model(ids, cache=cache, return_dict=False)[1] is cache
        assert len(model(ids, use_cache=False, return_dict=False)) == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
class TestCacheAndCheckpoints:
    """Layers that are computed again in the backward pass would take every token in twice."""

    @pytest.fixture(params=[False, True], ids=["", "reentrant"])
    def model(self, request, tiny_config):
        model = distinct(HAMForCausalLM(tiny_config())).train()
        model.gradient_checkpointing_enable({"use_reentrant": request.param})
        return model

    def test_a_cache_that_is_given_is_refused(self, model):
        ids, cache = tokens(1, 6), HAMCache(model.config)
        for call in (model, model.model):
            with pytest.raises(ValueError, match="`cache` cannot be filled with gradient checkpointing"):
                call(ids, cache=cache)
        assert not cache.is_initialized

    def test_none_is_made(self, model, monkeypatch):
        warned = []
        monkeypatch.setattr(inputs_ham.logger, "warning_once", warned.append)
        assert model(tokens(1, 6)).cache is None
        assert warned == []
        assert model(tokens(1, 6), use_cache=True).cache is None
        assert warned == ["`use_cache=True` cannot be combined with gradient checkpointing: there is no cache."]

    def test_without_gradients_all_is_as_ever(self, model):
        """`generate` in training mode, too."""
        ids = tokens(1, 6)
        found = [generate(model, ids, threshold=0.45, **mode) for mode in ({}, {"guidance_scale": 1.5})]
        with torch.no_grad():
            assert model(ids).cache.get_seq_length() == 6
        model.eval()
        for out, mode in zip(found, ({}, {"guidance_scale": 1.5}), strict=True):
            expected = generate(model, ids, threshold=0.45, **mode)
            assert torch.equal(out.sequences, expected.sequences)
            assert torch.equal(out.cache.kept_tokens(), expected.cache.kept_tokens())
