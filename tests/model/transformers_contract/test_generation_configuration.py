# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A generation configuration decides what is kept, as arguments do."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ham_hf import HAMForCausalLM
from tests.model.models import distinct, tokens
from tests.model.transformers_contract.generation import generate


class TestGenerationConfiguration:
    """`threshold`, `kv_usage` and `kv_budget` as entries of a generation configuration."""

    @pytest.fixture
    def routing(self, model):
        """The routing arguments of every forward call."""
        seen = []
        names = ("threshold", "kv_usage", "kv_budget")
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append({name: kwargs[name] for name in names if name in kwargs}),
            with_kwargs=True,
        )
        return seen

    @pytest.mark.parametrize(
        ("own", "given", "arguments", "expected"),
        [
            ({}, None, {}, {}),
            ({"threshold": 0.4}, None, {}, {"threshold": 0.4}),
            ({"threshold": 0.4}, None, {"threshold": 0.6}, {"threshold": 0.6}),
            ({"threshold": 0.4}, None, {"threshold": None}, {"threshold": 0.4}),
            ({"threshold": 0.4}, None, {"kv_usage": 0.5}, {"kv_usage": 0.5}),
            ({"kv_usage": 0.4}, None, {"threshold": 0.6}, {"threshold": 0.6}),
            ({"threshold": 0.4, "kv_budget": 7}, None, {"kv_usage": 0.5}, {"kv_usage": 0.5, "kv_budget": 7}),
            ({}, {"threshold": 0.5}, {}, {"threshold": 0.5}),
            ({}, {"threshold": 0.5}, {"threshold": 0.6}, {"threshold": 0.6}),
            ({"threshold": 0.4}, {"threshold": 0.5}, {}, {"threshold": 0.5}),
            ({"threshold": 0.4}, {"kv_usage": 0.5}, {}, {"kv_usage": 0.5}),
            ({"threshold": 0.4}, {"kv_usage": 0.5}, {"threshold": 0.6}, {"threshold": 0.6}),
            ({"threshold": 0.4}, {"kv_budget": 5}, {}, {"threshold": 0.4, "kv_budget": 5}),
            ({"kv_budget": 9}, {"kv_budget": 5}, {"kv_budget": 3}, {"kv_budget": 3}),
        ],
        ids=str,
    )
    def test_what_comes_first(self, model, routing, own, given, arguments, expected):
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        fixed = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        if given is not None:
            arguments = arguments | {"generation_config": GenerationConfig(**fixed, **given)}
        out = model.generate(tokens(1, 7), **(arguments if given is not None else arguments | fixed))
        assert routing == [expected] * 3
        if expected.get("kv_budget") and model.config.num_hybrid_layers == 2:
            assert out.cache.kept_tokens().max() <= expected["kv_budget"]
        # What one call was given is over with it.
        routing.clear()
        model.generate(tokens(1, 7), **fixed)
        assert routing == [own] * 3

    def test_it_decides_what_is_kept(self, model):
        input_ids = tokens(1, 7)
        expected = generate(model, input_ids, threshold=2.0)
        model.generation_config.threshold = 2.0
        out = generate(model, input_ids)
        assert torch.equal(out.sequences, expected.sequences)
        assert (out.cache.kept_tokens()[0] == 0).all()
        assert (generate(model, input_ids, threshold=0.0).cache.kv_usage()[0] == 1).all()

    def test_it_is_saved_with_the_model(self, model, tmp_path, routing):
        values = [0.3] * model.config.num_hybrid_layers
        model.generation_config.threshold = values
        model.generation_config.kv_budget = 6
        model.save_pretrained(tmp_path)
        loaded = HAMForCausalLM.from_pretrained(tmp_path)
        assert (loaded.generation_config.threshold, loaded.generation_config.kv_budget) == (values, 6)
        input_ids = tokens(1, 7)
        out = generate(loaded, input_ids)
        assert torch.equal(out.sequences, generate(model, input_ids).sequences)
        assert routing[0] == {"threshold": values, "kv_budget": 6}

    def test_a_checkpoint_of_before_learns_it(self, model, tmp_path):
        """Transformers marks a configuration made of the model's, and then reads only entries of its own from it."""
        model.save_pretrained(tmp_path)
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_from_model_config": True}), encoding="utf-8")
        loaded = HAMForCausalLM.from_pretrained(tmp_path)
        loaded.generation_config.threshold = 0.3
        loaded.save_pretrained(tmp_path)
        assert HAMForCausalLM.from_pretrained(tmp_path).generation_config.threshold == 0.3

    def test_the_model_s_configuration_is_another_default(self, tiny_config):
        """One that holds for calls of the model as well, and that a configuration given to `generate` goes before."""
        model = HAMForCausalLM(tiny_config(threshold=2.0)).eval()
        assert not hasattr(model.generation_config, "threshold")
        assert (generate(model, tokens(1, 7)).cache.kept_tokens() == 0).all()
        given = GenerationConfig(max_new_tokens=3, threshold=0.0, return_dict_in_generate=True)
        assert (model.generate(tokens(1, 7), generation_config=given).cache.kv_usage() == 1).all()
        assert (generate(model, tokens(1, 7), threshold=0.0).cache.kv_usage() == 1).all()

    @pytest.mark.parametrize(
        "own", [{"threshold": 0.0}, {"kv_usage": 1.0}, {"threshold": 0.0, "kv_budget": 3}], ids=str
    )
    def test_what_loading_asks_for_goes_before_what_the_checkpoint_says(self, tiny_config, tmp_path, own):
        """`from_pretrained(path, threshold=...)` is all that some tools can say: it must not be lost."""
        model = HAMForCausalLM(tiny_config()).eval()
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(tmp_path)
        for loader in (HAMForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(tmp_path, threshold=2.0)
            assert (generate(loaded, tokens(1, 7)).cache.kept_tokens() == 0).all()
            cache = generate(loaded, tokens(1, 7), threshold=0.0).cache
            assert (cache.kept_tokens() == own.get("kv_budget", cache.get_seq_length())).all()

    @pytest.mark.parametrize(
        ("entries", "error", "message"),
        [
            ({"threshold": "0.5"}, TypeError, "`threshold` is '0.5' of type str"),
            ({"threshold": float("nan")}, ValueError, "`threshold` must not be NaN"),
            ({"threshold": [0.5] * 9}, ValueError, "`threshold` has 9 entries"),
            ({"kv_usage": 1.5}, ValueError, "`kv_usage` must be a number between 0 and 1, got 1.5"),
            ({"kv_budget": 0}, ValueError, "`kv_budget` must be a positive int"),
            ({"threshold": 0.5, "kv_usage": 0.5}, ValueError, "at most one of `threshold` and `kv_usage`"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_refused(self, model, entries, error, message):
        with pytest.raises(error, match=message):
            model.generate(tokens(1, 4), generation_config=GenerationConfig(max_new_tokens=2, **entries))
        for name, value in entries.items():
            setattr(model.generation_config, name, value)
        with pytest.raises(error, match=message):
            model.generate(tokens(1, 4), max_new_tokens=2)

    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
    def test_rows_keep_their_thresholds(self, model, mode):
        given = GenerationConfig(threshold=torch.tensor([-1.0, 2.0]), max_new_tokens=4, **mode)
        given.return_dict_in_generate = True
        cache = model.generate(tokens(2, 6), generation_config=given).cache
        kept = cache.kept_tokens()[0]
        assert (kept[: len(kept) // 2] == cache.get_seq_length()).all()
        assert (kept[len(kept) // 2 :] == 0).all()

    @pytest.mark.parametrize("source", ["argument", "own entry"])
    def test_an_assistant_keeps_its_own(self, model, routing, tiny_config, source):
        """It may have other layers, which a list of thresholds does not fit, or be a model that routes nothing."""
        values = [0.4] * model.config.num_hybrid_layers
        arguments = {"threshold": values} if source == "argument" else {}
        if source == "own entry":
            model.generation_config.threshold = values
        input_ids, seen = tokens(1, 4).repeat(1, 3), []
        expected = generate(model, input_ids, max_new_tokens=12, **arguments).sequences
        small = distinct(HAMForCausalLM(tiny_config(num_hidden_layers=3))).eval()
        small.generation_config.threshold = [0.1, 0.2, 0.3]
        small.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["threshold"]), with_kwargs=True)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes))
        for assistant in (small, llama.eval()):
            routing.clear()
            out = model.generate(input_ids, max_new_tokens=12, do_sample=False, assistant_model=assistant, **arguments)
            assert torch.equal(out, expected)
            assert all(call == {"threshold": values} for call in routing)
        assert len(seen) > 3
        assert all(values == [0.1, 0.2, 0.3] for values in seen)
