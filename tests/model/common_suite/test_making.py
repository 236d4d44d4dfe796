# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The common tests of Transformers' models, of making, loading and resizing a model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ham_hf import (
    HAMForCausalLM,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
    HAMPreTrainedModel,
)
from tests.model.common_suite.losses import MODELS, outputs_of
from tests.model.models import FLOAT32_NAMES, moved, tensors, tokens


class TestMaking:
    @pytest.fixture
    def config(self, every_kind):
        return every_kind

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cls", MODELS)
    def test_decays_and_thresholds_are_float32_in_a_half_precision_model(self, cls, every_kind, dtype):
        """Of a model that is made, not loaded: nothing but the constructor knows of it then."""
        assert set(cls._keep_in_fp32_modules_strict) == set(FLOAT32_NAMES)
        every_kind.router = "learned_error"
        model = cls._from_config(every_kind, dtype=dtype)
        kept = {name: x.dtype for name, x in model.state_dict().items() if name.endswith(FLOAT32_NAMES)}
        assert {name.rpartition(".")[2] for name in kept} == set(FLOAT32_NAMES)
        assert set(kept.values()) == {torch.float32}
        assert {x.dtype for name, x in model.state_dict().items() if name not in kept} == {dtype}
        model.load_state_dict({name: x.to(dtype) for name, x in model.state_dict().items()})
        assert all(x.dtype == torch.float32 for name, x in model.state_dict().items() if name in kept)

    @pytest.mark.parametrize("cls", MODELS)
    def test_a_state_dict_makes_the_model_whole(self, cls, every_kind):
        model = moved(cls(every_kind))
        made = cls.from_pretrained(None, config=every_kind, state_dict=model.state_dict())
        for name, x in tensors(made).items():
            assert torch.equal(x, tensors(model)[name]), name
            assert x.is_contiguous(), name

    @pytest.mark.parametrize("router", ["cosine", "learned_error"])
    @pytest.mark.parametrize("cls", MODELS)
    def test_initialisation_is_the_same_before_and_after_the_meta_device(self, cls, every_kind, router, monkeypatch):
        """Bit for bit, where each module starts from the same random numbers: nothing is initialised elsewhere."""
        initialise = HAMPreTrainedModel._init_weights

        def seeded(self, module):
            torch.manual_seed(0)
            initialise(self, module)

        monkeypatch.setattr(HAMPreTrainedModel, "_init_weights", seeded)
        every_kind.router = router
        expected = tensors(cls(every_kind))
        loaded = cls.from_pretrained(None, config=every_kind, state_dict={})
        with torch.device("meta"):
            emptied = cls(every_kind)
        emptied.to_empty(device="cpu").init_weights()
        for found in (loaded, emptied):
            assert tensors(found).keys() == expected.keys()
            assert [name for name, x in tensors(found).items() if not torch.equal(x, expected[name])] == []

    def test_a_device_may_be_the_default(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with torch.device("cpu"):
            loaded = HAMForCausalLM.from_pretrained(tmp_path).eval()
        input_ids = tokens(2, 9)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
            HAMForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("source", MODELS)
    @pytest.mark.parametrize("target", MODELS)
    def test_heads_take_each_other_s_decoder(self, source, target, every_kind, tmp_path):
        model = moved(source(every_kind))
        model.save_pretrained(tmp_path)
        loaded, info = target.from_pretrained(tmp_path, output_loading_info=True)
        shared = source is target or {source, target} == {HAMForSequenceClassification, HAMForTokenClassification}
        own = (
            {name for name in loaded.state_dict() if not name.startswith("model.")}
            if target is not HAMModel
            else set()
        )
        if source is target:
            assert info["missing_keys"] == set()
        elif not shared:
            assert info["missing_keys"] == own
        decoder = tensors(model.base_model)
        assert [name for name, x in tensors(loaded.base_model).items() if not torch.equal(x, decoder[name])] == []

    def test_weights_of_another_shape_are_named(self, model, config, tmp_path):
        model.save_pretrained(tmp_path)
        larger = copy.deepcopy(config)
        larger.vocab_size = 103
        with pytest.raises(RuntimeError, match="mismatch"):
            HAMForCausalLM.from_pretrained(tmp_path, config=larger)
        loaded, info = HAMForCausalLM.from_pretrained(
            tmp_path, config=larger, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert {name for name, *_ in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
        assert loaded(torch.full((1, 3), 102)).logits.shape == (1, 3, 103)
        assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)

    @pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_dtypes_are_asked_for_by_either_name_and_remembered(self, model, tmp_path, name, dtype):
        model.save_pretrained(tmp_path / "float32")
        loaded = HAMForCausalLM.from_pretrained(tmp_path / "float32", **{name: dtype})
        assert loaded.dtype == loaded.config.dtype == torch.bfloat16
        loaded.save_pretrained(tmp_path / "bfloat16")
        assert HAMForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
        assert HAMForCausalLM.from_pretrained(tmp_path / "bfloat16", **{name: "auto"}).dtype == torch.bfloat16
        assert HAMForCausalLM.from_pretrained(tmp_path / "bfloat16", **{name: "float32"}).dtype == torch.float32
        assert AutoModelForCausalLM.from_config(model.config, **{name: dtype}).dtype == torch.bfloat16

    @pytest.mark.parametrize("cls", MODELS)
    def test_a_state_goes_through_torch_s_files(self, cls, every_kind, tmp_path):
        model = moved(cls(every_kind)).eval()
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = cls(every_kind).eval()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        inputs = {"input_ids": tokens(3, 9)}
        found, expected = outputs_of(other(**inputs)), outputs_of(model(**inputs))
        assert all(torch.equal(found[name], x) for name, x in expected.items())


class TestEmbeddings:
    @pytest.fixture
    def config(self, every_kind):
        return every_kind

    @pytest.mark.parametrize("cls", MODELS)
    def test_embeddings_are_got_and_set(self, cls, every_kind):
        model = cls(every_kind)
        assert type(model.get_input_embeddings()) is nn.Embedding
        new = nn.Embedding(12, 32)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is model.base_model.embed_tokens is new
        head = model.get_output_embeddings()
        assert head is (model.lm_head if cls is HAMForCausalLM else None)

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_vocabulary_grows_shrinks_and_is_saved(self, config, tied, tmp_path):
        config.tie_word_embeddings = tied
        model = moved(HAMForCausalLM(config)).eval()
        input_ids = torch.randint(3, 80, (2, 9))
        expected = model(input_ids).logits[..., :80]
        for size, multiple, rows in ((110, None, 110), (90, None, 90), (90, 64, 128), (80, None, 80)):
            model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
            assert model.model.embed_tokens.weight.shape == (rows, 32)
            assert model.lm_head.weight.shape == (rows, 32)
            assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == rows
            assert model.config.vocab_size == model.vocab_size == rows
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            model.init_weights()  # initialises nothing again that has been
            assert torch.equal(model(input_ids).logits[..., :80], expected)
        model.save_pretrained(tmp_path)
        loaded = HAMForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config.vocab_size == 80
        assert torch.equal(loaded(input_ids).logits, expected)
        assert loaded.generate(input_ids, max_new_tokens=3).max() < 80

    def test_tied_weights_are_missed_by_nobody(self, config, tmp_path):
        config.tie_word_embeddings = True
        model = moved(HAMForCausalLM(config))
        (name,) = [n for n, x in model.named_parameters() if x is model.lm_head.weight]
        assert name == "model.embed_tokens.weight"
        model.save_pretrained(tmp_path)
        assert name in load_file(tmp_path / "model.safetensors")
        _, info = HAMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        # Parting from the embedding, the head is saved by itself.
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
        model.save_pretrained(tmp_path)
        apart = HAMForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight + 1)

    def test_tensor_parallel_shards_what_is_tied_together(self, config):
        """Or not at all: a sharded head over an embedding that each rank has whole gathers logits of both."""
        model = HAMForCausalLM(config)
        native = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
        shards_embeddings = "model.embed_tokens" in native.tp_plan
        assert "lm_head" in model.tp_plan
        for each in (HAMModel(config), model):
            name = "embed_tokens" if each is not model else "model.embed_tokens"
            assert (name in each.tp_plan) == shards_embeddings
            assert each.tp_plan.get(name) == native.tp_plan.get("model.embed_tokens")
