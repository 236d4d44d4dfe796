# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Whatever calls the model during a `generate` keeps what that was asked to keep; what cannot be done is refused."""

import copy
import functools
import logging
import re
import threading
import warnings

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from ham_hf import HAMCache, HAMForCausalLM
from ham_hf.generation_ham import ROUTING_ARGUMENTS, _routing
from tests.model.models import moved, tokens

VOCABULARY = 97


@pytest.fixture
def model(tiny_config):
    """Two layers that keep some tokens, with logits far enough apart to compare tokens, and calibrated scores."""
    model = moved(HAMForCausalLM(tiny_config())).eval()
    for layer in model.model.layers:
        layer.mixer.score_quantiles.copy_(torch.linspace(0.3, 0.7, layer.mixer.score_quantiles.shape[-1]))
    return model


@pytest.fixture
def calls(model):
    """Of every call of the decoder: what decides what is kept, and the number of rows."""
    seen = []

    def note(module, args, kwargs):
        asked = {name: kwargs[name] for name in ROUTING_ARGUMENTS if kwargs.get(name) is not None}
        seen.append((asked, kwargs["input_ids"].shape[0]))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def scores_of(model, ids, **arguments):
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "guidance_scale": 1.7}
    out = model.generate(ids, return_dict_in_generate=True, output_scores=True, **(fixed | arguments))
    return torch.stack(out.scores)


class Calls(LogitsProcessor):
    """Runs `work(input_ids)` at every step, and leaves the scores alone."""

    def __init__(self, work):
        self.work = work

    def __call__(self, input_ids, scores):
        self.work(input_ids)
        return scores


def processors(work):
    return LogitsProcessorList([Calls(work)])


class TestGuidance:
    """`guidance_scale` has a logits processor that calls the model for a second branch, with a cache of its own."""

    @pytest.mark.parametrize("asked", [{"threshold": 2.0}, {"threshold": [2.0, 0.0]}, {"threshold": -1.0}], ids=str)
    def test_both_branches_keep_the_same(self, model, asked):
        """As where the configuration says so, which every call reads."""
        ids, negative = tokens(2, 7), tokens(2, 9)
        found = scores_of(model, ids, negative_prompt_ids=negative, **asked)
        learned = scores_of(model, ids, negative_prompt_ids=negative)
        model.config.threshold = asked["threshold"]
        torch.testing.assert_close(found, scores_of(model, ids, negative_prompt_ids=negative), rtol=0, atol=0)
        assert (found - learned).abs().max() > 1e-3, "this model keeps the same in either case"

    @pytest.mark.parametrize("asked", [{"kv_usage": 0.25}, {"kv_budget": 3, "threshold": -1.0}], ids=str)
    @pytest.mark.parametrize("source", ["argument", "configuration", "own"])
    def test_every_call_is_told(self, model, calls, asked, source):
        caches = []
        model.register_forward_hook(lambda module, args, out: caches.append(out.cache))
        arguments = dict(asked)
        if source == "configuration":
            fixed = {"max_new_tokens": 6, "do_sample": False, "guidance_scale": 1.7}
            given = GenerationConfig(**fixed, **asked)
            model.generate(tokens(2, 7), generation_config=given, negative_prompt_ids=tokens(2, 9))
        else:
            if source == "own":
                for name, value in asked.items():
                    setattr(model.generation_config, name, value)
                arguments = {}
            scores_of(model, tokens(2, 7), negative_prompt_ids=tokens(2, 9), **arguments)
        assert len(calls) == 12
        assert all(call == (asked, 2) for call in calls)
        main, second = caches[0], caches[1]
        assert all(cache is (second if n % 2 else main) for n, cache in enumerate(caches))
        assert (main.get_seq_length(), second.get_seq_length()) == (12, 14)
        if "kv_budget" in asked:
            assert (main.kept_tokens() == 3).all()
            assert (second.kept_tokens() == 3).all()
            assert main.memory_bytes() == second.memory_bytes()

    @pytest.mark.parametrize("mode", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
    def test_rows_that_are_repeated_keep_their_thresholds(self, model, calls, mode):
        caches = []
        model.register_forward_hook(lambda module, args, out: caches.append(out.cache))
        scores_of(model, tokens(2, 6), threshold=torch.tensor([-1.0, 2.0]), **mode)
        rows = 2 * mode.get("num_beams", mode.get("num_return_sequences"))
        assert {batch for _, batch in calls} == {rows}
        for cache in caches:
            kept = cache.kept_tokens()
            assert (kept[:, : rows // 2] == cache.get_seq_length()).all()
            assert (kept[:, rows // 2 :] == 0).all()

    def test_rows_that_cannot_be_told_apart_are_refused(self, model):
        with pytest.raises(ValueError, match="one entry for each of the 2 rows that `generate` was given, and the"):
            scores_of(model, tokens(2, 6), threshold=torch.tensor([-1.0, 2.0]), negative_prompt_ids=tokens(1, 6))

    def test_a_forward_that_is_replaced_is_told(self, model):
        """As `torch.compile` replaces it, whose code cannot look up what a call of `generate` was asked."""
        seen, forward = [], model.forward

        def compiled(*args, **kwargs):
            seen.append(kwargs["threshold"])
            return forward(*args, **kwargs)

        model.forward = functools.wraps(forward)(compiled)
        scores_of(model, tokens(1, 5), threshold=2.0)
        assert seen == [2.0] * 12

    @pytest.mark.slow
    def test_a_compiled_forward(self, model):
        ids, negative = tokens(1, 5), tokens(1, 5)
        arguments = {"threshold": 2.0, "negative_prompt_ids": negative, "max_new_tokens": 2, "min_new_tokens": 2}
        expected = scores_of(model, ids, **arguments)
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
        torch.testing.assert_close(scores_of(model, ids, **arguments), expected)


class TestCallsWithinGenerate:
    def test_an_argument_of_the_call_wins(self, model, calls):
        ids = tokens(1, 5)
        work = processors(
            lambda input_ids: (model(ids), model(ids, threshold=0.3), model.model(input_ids=ids, kv_budget=2))
        )
        model.generate(ids, max_new_tokens=2, do_sample=False, threshold=2.0, logits_processor=work)
        expected = [{"threshold": 2.0}, {"threshold": 2.0}, {"threshold": 0.3}, {"kv_budget": 2}]
        assert [asked for asked, _ in calls] == expected * 2

    def test_another_model_is_left_alone(self, model, tiny_config):
        """It may have other layers; and when it generates itself, the first model still keeps what it was asked to."""
        other = HAMForCausalLM(tiny_config(num_hidden_layers=3)).eval()
        other.model.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("threshold")), with_kwargs=True)
        inner, seen = [], []
        model.model.register_forward_pre_hook(lambda m, a, k: inner.append(k.get("threshold")), with_kwargs=True)
        ids = tokens(1, 5)

        def work(input_ids):
            other(ids)
            arguments = {"threshold": [0.1, 0.2, 0.3], "logits_processor": processors(lambda _: model(ids))}
            other.generate(ids, max_new_tokens=1, do_sample=False, **arguments)

        model.generate(ids, max_new_tokens=1, threshold=[2.0, 0.0], do_sample=False, logits_processor=processors(work))
        assert seen == [None, [0.1, 0.2, 0.3]]
        assert inner == [[2.0, 0.0]] * 2

    def test_a_decoding_loop_of_ones_own(self, model, calls):
        """One that hands on no argument, repeats rows by itself, and generates in between."""

        def loop(model, input_ids, **kwargs):
            model.generate(input_ids, max_new_tokens=1, do_sample=False)
            candidates = input_ids.repeat_interleave(3, dim=0)
            model(inputs_embeds=model.get_input_embeddings()(candidates))
            return model(candidates).logits.argmax(-1)

        seen = []
        model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["threshold"].tolist()), with_kwargs=True)
        model.model._forward_pre_hooks.popitem(last=False)
        model.generate(tokens(2, 6), custom_generate=loop, max_new_tokens=2, threshold=torch.tensor([-1.0, 2.0]))
        assert seen == [[-1.0, 2.0], [-1.0] * 3 + [2.0] * 3, [-1.0] * 3 + [2.0] * 3]

    def test_nothing_is_left_behind(self, model, calls):
        ids = tokens(1, 5)

        def fail(input_ids):
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(ids, max_new_tokens=2, threshold=2.0, logits_processor=processors(fail))
        with pytest.raises(TypeError, match="`threshold`"):
            model.generate(ids, max_new_tokens=2, threshold="2.0")
        model.generate(ids, max_new_tokens=2, kv_budget=2)
        calls.clear()
        model(ids)
        assert calls == [({}, 1)]
        assert not _routing.get()

    def test_threads(self, model):
        """Each with thresholds of its own, in step with the other."""
        ids, steps = tokens(1, 6), 6
        expected = {threshold: scores_of(model, ids, threshold=threshold) for threshold in (-1.0, 2.0)}
        assert not torch.equal(*expected.values())
        barrier, found = threading.Barrier(2, timeout=60), {}

        def run(threshold):
            work = processors(lambda _: barrier.wait())
            found[threshold] = scores_of(model, ids, threshold=threshold, logits_processor=work)

        threads = [threading.Thread(target=run, args=(threshold,)) for threshold in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found.keys() == expected.keys(), "a thread failed"
        for threshold, scores in expected.items():
            assert len(scores) == steps
            assert torch.equal(found[threshold], scores)


class TestAssistants:
    @pytest.mark.parametrize("asked", [{}, {"threshold": [2.0, -1.0]}, {"kv_usage": 0.3}], ids=str)
    def test_the_same_model_drafts_with_what_the_call_was_asked(self, model, calls, asked):
        ids = tokens(1, 4).repeat(1, 3)
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, **asked)
        calls.clear()
        out = model.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=model, **asked)
        assert torch.equal(out, expected)
        assert all(call == (asked, 1) for call in calls)

    @pytest.mark.parametrize("layer", [1, 2])
    @pytest.mark.parametrize("asked", [{}, {"threshold": [2.0, -1.0]}, {"kv_usage": 0.3}], ids=str)
    def test_early_exit_gives_the_greedy_tokens(self, model, calls, asked, layer):
        ran = []
        for n, module in enumerate(model.model.layers):
            module.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        ids = tokens(1, 4).repeat(1, 3)
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, **asked)
        calls.clear()
        ran.clear()
        arguments = {"return_dict_in_generate": True, "assistant_early_exit": layer} | asked
        out = model.generate(ids, max_new_tokens=16, do_sample=False, **arguments)
        assert torch.equal(out.sequences, expected)
        assert all(call == (asked, 1) for call in calls)
        assert len(out.cache.layers) == 2
        assert (ran.count(1) < ran.count(0)) == (layer == 1), "the drafts ran the wrong layers"
        assert len(calls) > 4, "nothing was drafted"

    def test_early_exit_leaves_the_configuration_alone(self, model):
        """While it drafts, when it fails, and for a thread that runs the model meanwhile."""
        ids, numbers = tokens(1, 4), []
        before = copy.deepcopy(model.config.to_dict())
        expected = model(ids).logits

        def work(input_ids):
            numbers.append(model.config.num_hidden_layers)
            found = []
            thread = threading.Thread(target=lambda: found.append(model(ids).logits))
            thread.start()
            thread.join()
            assert torch.equal(found[0], expected)
            if len(numbers) == 5:
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(
                ids, max_new_tokens=16, do_sample=False, assistant_early_exit=1, logits_processor=processors(work)
            )
        assert numbers == [2] * 5
        assert model.config.to_dict() == before
        assert torch.equal(model(ids).logits, expected)

    @pytest.mark.parametrize("wrong", [0, -1, 3, 1.5, True, "1"])
    def test_an_exit_that_is_none_is_refused(self, model, wrong):
        with pytest.raises(ValueError, match=r"`assistant_early_exit` must be an int between 1 and 2 \(layers\), got"):
            model.generate(tokens(1, 4), max_new_tokens=4, assistant_early_exit=wrong)


class TestOtherCaches:
    @pytest.mark.parametrize("name", ["paged", "static", "offloaded_static", "quantized", "sliding_window"])
    @pytest.mark.parametrize("source", ["argument", "configuration", "own"])
    def test_they_are_refused_before_anything_is_computed(self, model, calls, name, source):
        expected = "`cache_implementation` must be None, 'dynamic' or 'offloaded' for a HAM model"
        arguments = {"cache_implementation": name}
        if source == "configuration":
            arguments = {"generation_config": GenerationConfig(cache_implementation=name)}
        if source == "own":
            arguments, model.generation_config.cache_implementation = {}, name
        with pytest.raises(ValueError, match=expected):
            model.generate(tokens(1, 4), **arguments)
        assert calls == []

    @pytest.mark.parametrize("name", ["dynamic", "offloaded"])
    def test_others_are_not(self, model, name):
        ids = tokens(1, 4)
        out = model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation=name)
        assert torch.equal(out, model.generate(ids, max_new_tokens=3, do_sample=False))

    def test_continuous_batching(self, model):
        for call in (
            lambda: model.generate_batch([[1, 2, 3]]),
            lambda: model.init_continuous_batching(),
            lambda: model.continuous_batching_context_manager().__enter__(),
        ):
            with pytest.raises(NotImplementedError, match=r"HAMForCausalLM has no continuous batching: .* left"):
                call()


class TestContinuing:
    """A cache holds the beginning of a conversation, and `generate` is given all of it."""

    @pytest.mark.parametrize("length", [1, 6, 30])
    @pytest.mark.parametrize("form", ["positional", "input_ids", "inputs_embeds"])
    def test_a_prompt_that_goes_not_beyond_the_cache_is_refused(self, model, calls, length, form):
        cache = HAMCache(model.config)
        model(tokens(2, 30), cache=cache)
        kept = cache.kept_tokens()
        ids = tokens(2, length)
        calls.clear()
        arguments = {"input_ids": ids} if form == "input_ids" else {"inputs": ids}
        if form == "inputs_embeds":
            arguments = {"inputs_embeds": model.get_input_embeddings()(ids)}
        message = f"`cache` holds 30 tokens, and the prompt has {length}. Give the whole conversation: the tokens that"
        for mask in ({}, {"attention_mask": torch.ones(2, length, dtype=torch.long)}):
            with pytest.raises(ValueError, match=re.escape(message)):
                model.generate(**arguments, **mask, max_new_tokens=2, cache=cache)
        assert calls == []
        assert torch.equal(cache.kept_tokens(), kept)

    def test_whole_conversations_and_whole_masks_are_taken(self, model):
        """Transformers takes new tokens alone where the mask is of all; without padding and with."""
        ids = tokens(2, 12)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        for attention_mask in (mask, torch.ones_like(ids)):
            fixed = {"max_new_tokens": 4, "do_sample": False, "attention_mask": attention_mask}
            expected = model.generate(ids, **fixed)
            for given in (ids, ids[:, 8:]):
                cache = HAMCache(model.config)
                model(ids[:, :8], attention_mask=attention_mask[:, :8], cache=cache)
                assert torch.equal(model.generate(given, cache=cache, **fixed)[:, -4:], expected[:, -4:])

    def test_an_empty_cache_takes_any_prompt(self, model):
        assert model.generate(tokens(1, 3), cache=HAMCache(model.config), max_new_tokens=2).shape == (1, 5)


class TestNamesOfTheCache:
    """`cache`, and `past_key_values` as before Transformers 5.24: both are taken, and nothing of ours warns."""

    MODES = (
        {},
        {"do_sample": True},
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"threshold": 0.4, "kv_budget": 3},
    )

    @pytest.fixture
    def told(self, monkeypatch, caplog):
        """Warnings: those of `warnings` as errors, those of loggers as records."""
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield caplog
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []

    @pytest.mark.parametrize("mode", MODES, ids=str)
    def test_generate_warns_of_nothing(self, model, told, mode):
        ids = tokens(1, 4).repeat(1, 2)
        fixed = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(ids, **(fixed | mode))
        assert type(out.cache) is (HAMCache if mode.get("use_cache", True) else type(None))

    def test_a_loop_of_ones_own_warns_of_nothing(self, model, told):
        def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            """Contrastive search in short: several candidates a row, each with the cache of its row."""
            out = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs))
            candidates = out.logits[:, -1].topk(3).indices.flatten()[:, None]
            out.cache.batch_repeat_interleave(3)
            return model(candidates, cache=out.cache, output_hidden_states=True)

        out = model.generate(tokens(2, 5), custom_generate=loop, max_new_tokens=2, threshold=0.4)
        assert out.cache.get_seq_length() == 6

    def test_forward_warns_of_nothing(self, model, told):
        ids = tokens(2, 5)
        first = model(ids)
        for call in (model, model.model):
            call(ids, cache=copy.deepcopy(first.cache))
            call(ids, use_cache=False)
        model.train()(ids, labels=ids).loss.backward()

    @pytest.mark.parametrize("kept", [True, False], ids=["generate's", "the caller's"])
    def test_the_output_of_generate_has_it(self, model, kept):
        given = {} if kept else {"cache": HAMCache(model.config)}
        for mode in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
            if mode.get("num_beams") and not kept:
                continue
            given = {name: HAMCache(model.config) for name in given}
            out = model.generate(tokens(1, 6), max_new_tokens=3, return_dict_in_generate=True, **mode, **given)
            assert type(out.cache) is HAMCache
            assert out.cache is given.get("cache", out.cache)

    def test_generate_takes_either_name(self, model):
        ids = tokens(1, 6)
        expected = model.generate(ids, max_new_tokens=3, do_sample=False)
        for name in ("cache", "past_key_values"):
            cache = HAMCache(model.config)
            out = model.generate(ids, max_new_tokens=3, do_sample=False, **{name: cache})
            assert torch.equal(out, expected)
            assert cache.get_seq_length() == 8
        both = {"cache": HAMCache(model.config), "past_key_values": HAMCache(model.config)}
        with pytest.raises(ValueError, match="Give the cache once: `cache` and `past_key_values`"):
            model.generate(ids, max_new_tokens=3, **both)

    def test_a_llama_is_left_as_it_is(self, model):
        """As the assistant of a HAM, with the name of the cache that this release has."""
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
        ids = tokens(1, 6)
        out = model.generate(ids, max_new_tokens=6, do_sample=False, assistant_model=llama, threshold=0.4)
        assert torch.equal(out, model.generate(ids, max_new_tokens=6, do_sample=False, threshold=0.4))
