# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The common tests of Transformers' models, of `generate`."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.inputs_ham import CACHE_NAME
from tests.model.models import moved, tokens


class TestGeneration:
    def generate(self, model, *inputs, **arguments):
        arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | arguments
        return model.generate(*inputs, return_dict_in_generate=True, **arguments)

    @pytest.mark.parametrize(
        "mode", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
    )
    def test_everything_that_can_be_returned(self, model, mode):
        config, steps = model.config, 6
        wanted = ("scores", "logits", "attentions", "hidden_states")
        out = self.generate(model, tokens(2, 5), **mode, **{f"output_{name}": True for name in wanted})
        rows = 2 * mode.get("num_beams", 1)
        attentions = sum(kind != "linear_attention" for kind in config.layer_types)
        assert type(out.cache) is HAMCache
        for name in wanted:
            assert len(out[name]) == steps, name
        assert {x.shape for x in (*out.scores, *out.logits)} == {(rows, 97)}
        for step, (states, weights) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
            new, seen = (5, 5) if step == 0 else (1, 5 + step)
            assert {x.shape for x in states} == {(rows, new, 32)}
            assert len(states) == config.num_hidden_layers + 1
            assert {x.shape for x in weights} == {(rows, 4, new, seen)}
            assert len(weights) == attentions
        if "num_beams" not in mode:
            chosen = out.sequences[:, 5:]
            if not mode:
                assert torch.equal(torch.stack(out.logits, 1).argmax(-1), chosen)

    def test_nothing_given_starts_with_the_first_token(self, model):
        out = self.generate(model)
        assert out.sequences.shape == (1, 7)
        assert out.sequences[0, 0] == model.config.bos_token_id
        expected = self.generate(model, torch.tensor([[model.config.bos_token_id]]))
        assert torch.equal(out.sequences, expected.sequences)

    def test_other_embeddings_give_other_texts(self, model):
        """Embeddings stand before the tokens when both are given, and the tokens come first in what is returned."""
        embeds = [torch.randn(1, 7, 32) for _ in range(2)]
        input_ids = torch.ones(1, 7, dtype=torch.long)
        first, second, again = (self.generate(model, inputs_embeds=x).sequences for x in (*embeds, embeds[0]))
        assert first.shape == (1, 6)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        both = self.generate(model, input_ids, inputs_embeds=embeds[0]).sequences
        assert torch.equal(both, torch.cat([input_ids, first], 1))

    def test_goes_on_after_embeddings(self, model):
        """A text that began with embeddings goes on with the tokens that were said."""
        embeds = torch.randn(2, 5, 32)
        whole = self.generate(model, inputs_embeds=embeds)
        first = self.generate(model, inputs_embeds=embeds, max_new_tokens=3, min_new_tokens=3)
        said = torch.cat([embeds, model.get_input_embeddings()(first.sequences)], 1)
        mask = torch.ones(said.shape[:2], dtype=torch.long)
        rest = self.generate(
            model, inputs_embeds=said, attention_mask=mask, cache=first.cache, max_new_tokens=3, min_new_tokens=3
        )
        assert torch.equal(torch.cat([first.sequences, rest.sequences], 1), whole.sequences)
        assert rest.cache.get_seq_length() == whole.cache.get_seq_length()
        assert torch.equal(rest.cache.kept_tokens(), whole.cache.kept_tokens())

    @pytest.mark.parametrize("side", ["whole", "last token"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_goes_on_from_a_cache(self, model, padded, side):
        """Given the whole text, or the token that the cache lacks and the mask of all: the scores are the same."""
        input_ids = tokens(2, 6)
        mask = torch.ones_like(input_ids)
        if padded:
            input_ids[0, :3] = mask[0, :3] = 0
        whole = self.generate(model, input_ids, attention_mask=mask, output_scores=True)
        first = self.generate(model, input_ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
        text = first.sequences if side == "whole" else first.sequences[:, -1:]
        rest = self.generate(
            model,
            text,
            attention_mask=F.pad(mask, (0, 2), value=1),
            cache=copy.deepcopy(first.cache),
            max_new_tokens=4,
            min_new_tokens=4,
            output_scores=True,
        )
        assert torch.equal(rest.sequences[:, -5:], whole.sequences[:, -5:])
        torch.testing.assert_close(rest.scores, whole.scores[2:], rtol=1e-5, atol=1e-5)
        assert torch.equal(rest.cache.kept_tokens(), whole.cache.kept_tokens())

    @pytest.mark.parametrize(
        "mode", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
    )
    def test_a_turn_of_any_kind_follows_a_greedy_one(self, model, mode):
        """From a cache, a turn that samples or keeps beams is the one from its text."""
        first = self.generate(model, tokens(2, 6), max_new_tokens=4, min_new_tokens=4)
        text = first.sequences
        mode = mode | {"attention_mask": torch.ones_like(text)}
        torch.manual_seed(3)
        expected = self.generate(model, text, **mode).sequences
        torch.manual_seed(3)
        cache = first.cache
        if "num_beams" in mode:
            cache.batch_repeat_interleave(mode["num_beams"])
        assert torch.equal(self.generate(model, text, cache=cache, **mode).sequences, expected)

    def test_positions_are_counted_from_the_mask(self, model):
        input_ids = F.pad(tokens(2, 5), (4, 0))
        mask = (input_ids > 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found, given = (
            self.generate(model, input_ids, attention_mask=mask, output_scores=True, **extra)
            for extra in ({}, {"position_ids": positions})
        )
        assert torch.equal(found.sequences, given.sequences)
        torch.testing.assert_close(found.scores, given.scores)

    def test_only_the_last_logits_are_formed(self, model):
        """Whatever the prompt's length, and by the same argument that a caller may give."""
        sizes = []
        model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
        expected = self.generate(model, tokens(2, 8) * 0 + 7).sequences
        assert sizes == [1] * 6
        assert torch.equal(self.generate(model, tokens(2, 8) * 0 + 7, logits_to_keep=0).sequences, expected)
        assert sizes[6] == 8

    def test_inputs_are_prepared_as_they_are_given(self, model):
        cache = HAMCache(model.config)
        given = {"threshold": 0.4, "kv_budget": 5, "use_cache": True, CACHE_NAME: cache}
        mask = torch.ones(1, 4, dtype=torch.long)
        prepared = model.prepare_inputs_for_generation(
            tokens(1, 4), is_first_iteration=True, attention_mask=mask, **given
        )
        assert given.items() <= prepared.items()
        assert model(**prepared).cache is cache

    def test_sampling_with_an_assistant_follows_the_model(self, model, tiny_config):
        """If one token has almost all of the weight, samples are the greedy text, whatever the assistant says."""
        model.lm_head.weight.data *= 1000
        input_ids = tokens(1, 6)
        expected = self.generate(model, input_ids, max_new_tokens=12).sequences
        torch.manual_seed(5)
        small = moved(HAMForCausalLM(tiny_config(num_hidden_layers=1, eos_token_id=2))).eval()
        out = self.generate(model, input_ids, assistant_model=small, do_sample=True, max_new_tokens=12)
        assert torch.equal(out.sequences, expected)
        assert type(out.cache) is HAMCache
        assert out.cache.is_croppable

    def test_looking_up_prompts_stops_where_the_text_ends(self, model):
        """A candidate taken from the prompt may hold the last token: nothing may follow it."""
        input_ids = tokens(1, 4).repeat(1, 3)
        greedy = self.generate(model, input_ids, max_new_tokens=12).sequences[0, 12:]
        end = int(greedy[4])
        first = greedy.tolist().index(end)
        out = model.generate(
            input_ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=end
        )
        assert out[0, 12:].tolist() == greedy[: first + 1].tolist()

    def test_a_cache_that_cannot_be_cropped_is_not_asked_to(self, model, monkeypatch):
        """HAMCache says that it can, after a prompt as before one, so assisted generation takes it."""
        cache = HAMCache(model.config)
        assert cache.is_croppable
        cache.activate_past_recording()
        model(tokens(1, 5), cache=cache)
        assert cache.is_croppable
        model(tokens(1, 3), cache=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 6

    def test_attention_is_the_model_s_own(self, config, tmp_path, caplog):
        """Other implementations of attention are refused with words, or change nothing."""
        model = moved(HAMForCausalLM(config)).eval()
        input_ids = tokens(2, 9)
        expected = model(input_ids).logits
        assert model.config._attn_implementation == "eager"
        model.set_attn_implementation("eager")
        assert torch.equal(model(input_ids).logits, expected)
        for name in ("sdpa", "flash_attention_2", "flex_attention"):
            with pytest.raises((ValueError, ImportError), match=r"HAMForCausalLM|flash|flex"):
                HAMForCausalLM._from_config(config, attn_implementation=name)
