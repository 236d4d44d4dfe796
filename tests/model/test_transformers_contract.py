# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds HAM to what Transformers asks of a causal LM with its own cache: its common tests are not part of it."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

import ham_hf
from ham_hf import (
    HAMCache,
    HAMConfig,
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
    HAMPreTrainedModel,
    inputs_ham,
    mixer_ham,
)
from ham_hf.inputs_ham import CACHE_NAME

HEADS = (HAMForCausalLM, HAMForSequenceClassification, HAMForTokenClassification, HAMForQuestionAnswering)
FLOAT32_NAMES = ("A_log", "dt_bias", "threshold", "score_quantiles")
LAYERS = {
    "hybrid": ["hybrid", "hybrid"],
    "mixed": ["hybrid", "linear_attention", "full_attention"],
}


@pytest.fixture(params=list(LAYERS))
def config(request, tiny_config) -> HAMConfig:
    """A small configuration: HAM layers only, then one layer of each kind."""
    types = LAYERS[request.param]
    return tiny_config(layer_types=types, num_hidden_layers=len(types))


@pytest.fixture
def model(config) -> HAMForCausalLM:
    """A causal LM that keeps some tokens and drops others, with logits far enough apart to compare tokens."""
    return distinct(HAMForCausalLM(config)).eval()


def distinct(model):
    """Moves every parameter and buffer away from its initial value, so that nothing lost on the way goes unseen."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = 0.02 if name.endswith("threshold") else 0.1
            x.add_(scale * torch.randn_like(x))
        for name, x in model.named_buffers():
            if name.endswith("score_quantiles"):
                x.copy_(torch.rand_like(x).sort(-1).values)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 97, shape)


def generate(model, input_ids, **arguments):
    """Generates, checks which cache did the work, and returns Transformers' output."""
    arguments = {"max_new_tokens": 8, "do_sample": False} | arguments
    out = model.generate(input_ids, return_dict_in_generate=True, **arguments)
    assert type(out.cache) is HAMCache
    assert out.cache.get_seq_length() == out.sequences.shape[1] - 1
    return out


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def thresholds(model) -> list[torch.Tensor]:
    return [layer.mixer.threshold for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]


def wildcard(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def example(head, config):
    """Inputs with labels for a head."""
    input_ids = tokens(3, 9)
    labels = {
        HAMForCausalLM: {"labels": input_ids},
        HAMForSequenceClassification: {"labels": torch.tensor([0, 1, 0])},
        HAMForTokenClassification: {"labels": input_ids % 2},
        HAMForQuestionAnswering: {
            "start_positions": torch.tensor([0, 1, 2]),
            "end_positions": torch.tensor([3, 4, 8]),
        },
    }
    return {"input_ids": input_ids} | labels[head]


class TestClasses:
    def test_generation_mixin_is_a_direct_base(self):
        assert GenerationMixin in HAMForCausalLM.__bases__
        assert HAMForCausalLM.can_generate()
        assert not HAMForCausalLM._is_stateful, "a stateful model is refused assisted generation"

    @pytest.mark.parametrize("cls", [HAMModel, *HEADS])
    def test_forward_takes_what_callers_pass(self, cls):
        names = list(inspect.signature(cls.forward).parameters)[1:]
        assert names[0] == "input_ids" == cls.main_input_name
        assert {"attention_mask", "position_ids", CACHE_NAME, "inputs_embeds"} <= set(names)
        if cls is HAMForCausalLM:
            assert {"labels", "logits_to_keep", "use_cache"} <= set(names)

    @pytest.mark.parametrize("head", HEADS)
    def test_prefix_names_the_base_model(self, head, config):
        model = head(config)
        assert type(getattr(model, head.base_model_prefix)) is HAMModel
        assert model.base_model is getattr(model, head.base_model_prefix)
        assert model.get_input_embeddings() is model.base_model.embed_tokens

    @pytest.mark.parametrize("head", HEADS)
    def test_each_model_is_initialised_once(self, head, config, monkeypatch):
        finished = []
        post_init = HAMPreTrainedModel.post_init
        monkeypatch.setattr(HAMPreTrainedModel, "post_init", lambda self: (finished.append(id(self)), post_init(self)))
        model = head(config)
        assert finished == [id(model.model), id(model)]

    def test_layers_that_must_stay_whole_hold_every_weight_of_the_stack(self, model):
        whole = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
        assert len(whole) == model.config.num_hidden_layers
        assert all(isinstance(m, GradientCheckpointingLayer) for m in whole)
        held = {id(p) for m in whole for p in m.parameters()}
        assert held == {id(p) for p in model.model.layers.parameters()}

    def test_every_tensor_is_a_parameter_or_a_buffer(self, model):
        stray = [
            (type(m).__name__, k) for m in model.modules() for k, x in vars(m).items() if isinstance(x, torch.Tensor)
        ]
        assert stray == []

    def test_recorded_outputs_name_one_class_each(self):
        assert {"hidden_states", "attentions"} <= set(HAMModel._can_record_outputs)
        for what in HAMModel._can_record_outputs.values():
            assert isinstance(what, OutputRecorder) or issubclass(what, nn.Module)

    def test_padded_equals_packed_is_switched_on_in_the_common_tests(self):
        assert HAMPreTrainedModel._supports_attention_backend

    def test_configuration_file_carries_its_copyright_line(self):
        first = Path(inspect.getfile(HAMConfig)).read_text(encoding="utf-8").splitlines()[0]
        assert re.match(r"# Copyright 20\d\d ", first)

    def test_layer_types_are_a_closed_list(self, tiny_config):
        with pytest.raises(Exception, match="layer_types"):
            tiny_config(layer_types=["ham", "ham"])

    def test_auto_classes_find_every_model(self, config, tmp_path):
        pairs = {
            AutoModel: HAMModel,
            AutoModelForCausalLM: HAMForCausalLM,
            AutoModelForSequenceClassification: HAMForSequenceClassification,
            AutoModelForTokenClassification: HAMForTokenClassification,
            AutoModelForQuestionAnswering: HAMForQuestionAnswering,
        }
        for auto, cls in pairs.items():
            assert type(auto.from_config(config)) is cls
        HAMForCausalLM(config).save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is HAMConfig
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is HAMForCausalLM


class TestParallelPlans:
    @pytest.mark.parametrize("router", ["cosine", "learned_error"])
    def test_every_tensor_parallel_pattern_matches_a_module(self, config, router):
        config.router = router
        model = HAMForCausalLM(config)
        names = {wildcard(name) for name, _ in model.named_modules()}
        patterns = set(HAMForCausalLM._tp_plan) | {f"model.{name}" for name in config.base_model_tp_plan}
        assert patterns <= names
        assert patterns <= set(model.tp_plan)

    def test_head_and_embedding_are_both_sharded_so_that_tying_holds(self, model):
        assert "lm_head" in model.tp_plan
        native = LlamaForCausalLM(
            LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
        )
        assert ("model.embed_tokens" in model.tp_plan) == ("model.embed_tokens" in native.tp_plan)

    def test_per_head_parameters_stay_whole(self, model):
        """Heads meet their convolution, gates and kept sets whole, so what feeds them must be gathered."""
        for name, style in model.config.base_model_tp_plan.items():
            if re.search(r"mixer\.[qkv]_proj$", name):
                assert style == "colwise_gather_output"
            assert not re.search("conv|A_log|dt_bias|threshold|norm|gate_proj$", name.replace("mlp.gate_proj", ""))

    def test_pipeline_parallel_plan_names_exist(self, model):
        assert {"embed_tokens", "layers", "norm"} <= set(model.config.base_model_pp_plan)
        for name in model.config.base_model_pp_plan:
            model.model.get_submodule(name)
        for name in HAMForCausalLM._pp_plan:
            model.get_submodule(name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_groups_of_sharded_data_parallel_have_one_dtype(self, config, dtype, tmp_path):
        HAMForCausalLM(config).save_pretrained(tmp_path)
        model = HAMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        groups = [name for name, _ in model.named_modules() if wildcard(name) in model.fsdp_plan]
        layer = [name.partition("layers.0")[2] for name in groups if "layers.0" in name]
        assert layer == [""] if dtype == torch.float32 else {".mlp", ".mixer.q_proj"} <= set(layer)
        # Transformers before 5.23 shards an outer group first, and with it the inner one.
        assert [name for name in groups for other in groups if name.startswith(f"{other}.")] == []
        dtypes: dict[str, set] = {}
        for name, p in model.named_parameters():
            owner = max((g for g in groups if name.startswith(f"{g}.")), key=len, default="")
            dtypes.setdefault(owner, set()).add(p.dtype)
        assert [name for name, found in dtypes.items() if len(found) > 1] == []


class TestWeights:
    def test_tied_embeddings_are_saved_once_and_tied_again(self, config, tmp_path):
        assert isinstance(HAMForCausalLM._tied_weights_keys, dict)
        config.tie_word_embeddings = True
        model = distinct(HAMForCausalLM(config)).eval()
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        loaded = HAMForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        input_ids = tokens(2, 9)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    @pytest.mark.parametrize("tied", [False, True])
    def test_resized_vocabulary_keeps_the_old_rows(self, config, tied):
        config.tie_word_embeddings = tied
        model = distinct(HAMForCausalLM(config)).eval()
        input_ids = tokens(2, 9)
        before = model(input_ids).logits
        model.resize_token_embeddings(120)
        assert model.config.vocab_size == model.vocab_size == 120
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        after = model(input_ids).logits
        assert after.shape[-1] == 120
        torch.testing.assert_close(after[..., :97], before, rtol=0, atol=1e-6)
        assert model(torch.full((1, 2), 119)).logits.isfinite().all()

    @pytest.mark.parametrize("router", ["cosine", "learned_error"])
    def test_a_model_made_on_the_meta_device_is_initialised_like_any_other(self, tiny_config, router):
        many_heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 4}
        types = LAYERS["mixed"]
        config = tiny_config(layer_types=types, num_hidden_layers=len(types), router=router, **many_heads)
        with torch.device("meta"):
            assert all(x.is_meta for x in tensors(HAMForCausalLM(config)).values())
        # Every weight is missing, so all of it is made on the meta device first and initialised afterwards.
        found = tensors(HAMForCausalLM.from_pretrained(None, config=config, state_dict={}))
        expected = tensors(HAMForCausalLM(config))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            y = found[name]
            assert not y.is_meta, name
            assert y.isfinite().all(), name
            if x.std() == 0 or "inv_freq" in name:
                assert torch.equal(x, y), name
                continue
            levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
            difference = x.float().quantile(levels) - y.float().quantile(levels)
            assert difference.abs().max() < x.std(), name
            assert 0.7 < y.std() / x.std() < 1.4, name

    def test_loaded_weights_are_those_that_were_saved(self, config, tmp_path):
        config.router = "learned_error"
        model = distinct(HAMForCausalLM(config)).eval()
        model.save_pretrained(tmp_path)
        loaded = HAMForCausalLM.from_pretrained(tmp_path)
        saved = tensors(model)
        for name, x in tensors(loaded).items():
            assert x.dtype == saved[name].dtype, name
            assert torch.equal(x, saved[name]), name
        input_ids = tokens(2, 30)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    @pytest.mark.parametrize("missing", FLOAT32_NAMES)
    def test_a_tensor_that_a_checkpoint_lacks_takes_no_neighbour_along(self, model, missing, tmp_path):
        """Loading initialises a second time whatever module is incomplete, and must leave alone what was loaded."""
        state = {name: x for name, x in model.state_dict().items() if not name.endswith(missing)}
        model.save_pretrained(tmp_path, state_dict=state)
        saved = tensors(model)
        for name, x in tensors(HAMForCausalLM.from_pretrained(tmp_path)).items():
            assert torch.equal(x, saved[name]) != name.endswith(missing), name
            assert x.isfinite().all(), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_leaves_decays_and_thresholds_alone(self, model, dtype, tmp_path):
        model.save_pretrained(tmp_path)
        saved = tensors(model)
        seen = set()
        for name, x in tensors(HAMForCausalLM.from_pretrained(tmp_path, dtype=dtype)).items():
            kind = name.rpartition(".")[2]
            if kind in FLOAT32_NAMES:
                seen.add(kind)
                assert x.dtype == torch.float32, name
                assert torch.equal(x, saved[name]), name
            elif "inv_freq" not in name:
                assert x.dtype == dtype, name
        assert seen == set(FLOAT32_NAMES)


class TestTraining:
    @pytest.mark.parametrize("head", HEADS)
    def test_every_weight_of_every_head_learns(self, head, config):
        model = head(config).train()
        out = model(**example(head, config))
        assert out.loss.isfinite()
        out.loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        still = [name for name, p in model.named_parameters() if not p.grad.any()]
        assert still == [], "no gradient reaches these"

    @pytest.mark.parametrize("head", HEADS)
    def test_thresholds_learn_by_the_control_loop_alone(self, head, config):
        """The gradient is target - usage, whatever the loss is; too many kept tokens raise the threshold."""
        config.target_kv_usage = 0.0
        model = head(config).train()
        inputs = example(head, config)
        (model(**inputs).loss).backward()
        cache = HAMCache(config)
        model.eval().model(inputs["input_ids"], cache=cache)
        usage = cache.kv_usage()[0].mean(0)
        assert usage.any()
        torch.testing.assert_close(model.model.layers[0].mixer.threshold.grad, -usage)

    def test_a_loss_made_from_logits_moves_thresholds_too(self, model):
        model.train()
        logits = model(tokens(2, 9)).logits
        logits.square().mean().backward()
        assert model.model.layers[0].mixer.threshold.grad.any()

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("head", HEADS)
    def test_checkpointing_changes_no_gradient(self, head, config, reentrant):
        model = distinct(head(config)).train()
        inputs = example(head, config)
        results, calls = [], []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        for checkpointing in (False, True):
            model.zero_grad()
            torch.manual_seed(2)  # the classifiers have dropout
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert len(calls) == 1 + 2, "the layer was not computed again for the backward"
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)

    def test_labels_and_shifted_labels_give_the_same_cross_entropy(self, model):
        input_ids = tokens(2, 9)
        labels = input_ids.clone()
        labels[:, :3] = -100
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        out = model(input_ids, labels=labels)
        expected = F.cross_entropy(out.logits.flatten(0, 1), shifted.flatten())
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(model(input_ids, shift_labels=shifted).loss, expected)
        total = model(input_ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
        torch.testing.assert_close(total * 5, expected * 12)

    def test_the_control_loop_adds_nothing_to_the_loss(self, model):
        input_ids = tokens(2, 9)
        assert model.train()(input_ids, labels=input_ids).loss == model.eval()(input_ids, labels=input_ids).loss

    def test_an_argument_that_nobody_takes_is_refused(self, model):
        with pytest.raises(TypeError, match="output_atentions"):
            model(tokens(1, 4), output_atentions=True)


class TestOutputs:
    def test_nothing_is_recorded_unasked(self, model):
        out = model(tokens(2, 9))
        assert (out.hidden_states, out.attentions, out.routing_scores) == (None, None, None)
        assert type(out.cache) is HAMCache
        assert model(tokens(2, 9), use_cache=False).cache is None

    @pytest.mark.parametrize("training", [False, True])
    def test_hidden_states_run_from_embedding_to_norm(self, model, training):
        input_ids = tokens(2, 9)
        out = model.model.train(training)(input_ids, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert all(x.shape == (2, 9, 32) for x in out.hidden_states)
        assert torch.equal(out.hidden_states[0], model.model.embed_tokens(input_ids))
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert torch.equal(model(input_ids, output_hidden_states=True).hidden_states[-1], out.last_hidden_state)

    def test_scores_decide_what_attention_sees(self, model):
        config = model.config
        types = [t for t in config.layer_types if t != "linear_attention"]
        out = model(tokens(2, 12), output_attentions=True, output_routing_scores=True)
        assert len(out.attentions) == len(types)
        assert len(out.routing_scores) == config.num_hybrid_layers
        scores = iter(zip(out.routing_scores, thresholds(model), strict=True))
        for kind, weights in zip(types, out.attentions, strict=True):
            assert weights.shape == (2, 4, 12, 12)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
            visible = torch.ones(2, 2, 12, 12, dtype=torch.bool)
            if kind == "hybrid":
                score, threshold = next(scores)
                assert score.shape == (2, 12, 2)
                assert score.dtype == torch.float32
                assert ((score >= 0) & (score <= 1)).all()
                keep = score >= threshold
                assert 0 < keep.float().mean() < 1
                visible = keep.permute(0, 2, 1)[:, :, None].expand(-1, -1, 12, -1)
            visible = (visible & torch.ones(12, 12).tril().bool()) | torch.eye(12).bool()
            assert torch.equal(weights > 0, visible.repeat_interleave(2, dim=1))

    def test_weights_that_are_returned_carry_the_gradient(self, model):
        """The output is made of them: so are its gradients, which are those of a call that does not form them."""
        input_ids = tokens(2, 12)
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        gradients = []
        for wanted in (True, False):
            out = model(input_ids, attention_mask=mask, output_attentions=wanted)
            for weights in out.attentions or ():
                weights.retain_grad()
            model.zero_grad()
            out.logits.square().mean().backward()
            assert all(weights.grad.abs().max() > 0 for weights in out.attentions or ())
            gradients.append([out.logits] + [x.grad.clone() for x in model.parameters() if x.grad is not None])
        for formed, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(formed, plain, atol=1e-6, rtol=1e-4)

    def test_weights_change_no_row(self, model):
        """Rows at thresholds of their own, padded, or packed: with the weights as without them."""
        input_ids = tokens(2, 12)
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        documents = torch.tensor([[0] * 5 + [1] * 7])
        for arguments in (
            {"input_ids": input_ids, "attention_mask": mask, "threshold": torch.tensor([0.0, 0.55])},
            {"input_ids": input_ids, "attention_mask": mask.flip(1), "threshold": torch.tensor([0.45, 2.0])},
            {"input_ids": input_ids[:1], "seq_idx": documents},
        ):
            found, expected = model(**arguments, output_attentions=True), model(**arguments)
            real = arguments.get("attention_mask", torch.ones(1, 12)).bool()
            # Dense weights and blocks add up in another order: 1.9e-6 measured.
            torch.testing.assert_close(found.logits[real], expected.logits[real], atol=4e-6, rtol=1e-5)
            if expected.cache is not None:
                assert torch.equal(found.cache.kept_tokens(), expected.cache.kept_tokens())

    def test_logits_to_keep_at_positions(self, model):
        input_ids, where = tokens(2, 9), torch.tensor([1, 7])
        full = model(input_ids).logits
        torch.testing.assert_close(model(input_ids, logits_to_keep=where).logits, full[:, where])

    @pytest.mark.parametrize("head", HEADS)
    def test_embeddings_stand_in_for_tokens(self, head, config):
        model = distinct(head(config)).eval()
        input_ids = tokens(2, 9)
        embeds = model.get_input_embeddings()(input_ids)
        outs = (model(input_ids), model(inputs_embeds=embeds, attention_mask=torch.ones_like(input_ids)))
        if head is HAMForSequenceClassification:
            outs = (model(input_ids[:1]), model(inputs_embeds=embeds[:1]))
        for name in ("logits", "start_logits", "end_logits"):
            if name in outs[0]:
                assert torch.equal(outs[0][name], outs[1][name])


class TestLastLogits:
    """Where the last logits are wanted only, the last layer does no more than these and the cache need."""

    SETTINGS = {
        "whole rows": {},
        "padded on the left": {"attention_mask": torch.ones(2, 12).index_fill(1, torch.arange(3), 0)},
        "padded on the right": {"attention_mask": torch.tensor([[1] * 12, [1] * 5 + [0] * 7])},
        "packed": {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]},
        "budget": {"kv_budget": 3, "threshold": 0.0},
        "rows at other thresholds": {"threshold": torch.tensor([0.0, 2.0])},
        "with attention": {"output_attentions": True},
        "with scores": {"output_routing_scores": True},
        "without a cache": {"use_cache": False},
    }

    @pytest.fixture(params=["hybrid", "linear_attention", "full_attention"])
    def model(self, request, tiny_config):
        types = ["hybrid", request.param]
        return distinct(HAMForCausalLM(tiny_config(layer_types=types, num_hidden_layers=2))).eval()

    @pytest.mark.parametrize("number", [1, 5, 12, 100])
    @pytest.mark.parametrize("setting", list(SETTINGS))
    def test_all_else_stays_as_it_is(self, model, setting, number):
        arguments = {"input_ids": tokens(2, 12)} | self.SETTINGS[setting]
        full, last = model(**arguments), model(**arguments, logits_to_keep=number)
        assert last.logits.shape[1] == min(number, 12)
        torch.testing.assert_close(last.logits, full.logits[:, -number:])
        for name in ("attentions", "routing_scores"):
            recorded = full.get(name, ()), last.get(name, ())
            assert bool(recorded[0]) == (f"output_{name}" in arguments)
            assert all(torch.equal(x, y) for x, y in zip(*recorded, strict=True))
        if full.cache is not None:
            assert torch.equal(full.cache.kept_tokens(), last.cache.kept_tokens())
            following = [model(tokens(2, 1) * 0 + 5, cache=x.cache).logits for x in (full, last)]
            assert torch.equal(*following)

    @pytest.mark.parametrize("number", [0, 1, 5])
    def test_the_last_layer_alone_does_less(self, model, number):
        lengths = {}
        for i, layer in enumerate(model.model.layers):
            for name, module in {"mlp": layer.mlp, "o_proj": layer.mixer.o_proj, "q_proj": layer.mixer.q_proj}.items():
                place = (i, name)
                module.register_forward_hook(lambda _, x, out, place=place: lengths.update({place: out.shape[1]}))
        model(tokens(2, 12), logits_to_keep=number)
        less = number or 12
        assert [lengths[0, name] for name in ("q_proj", "o_proj", "mlp")] == [12, 12, 12]
        assert [lengths[1, name] for name in ("q_proj", "o_proj", "mlp")] == [12, less, less]

    @pytest.mark.parametrize("turns", [1, 2])
    def test_attention_reads_for_these_only_unless_more_is_held(self, model, turns, monkeypatch):
        """In a further turn the last layer attends for all tokens, as what is held has an operation of its own."""
        queries, sparse = [], mixer_ham.HAMMixer.attend
        monkeypatch.setattr(
            mixer_ham.HAMMixer, "attend", lambda self, q, *x: queries.append(q.shape[1]) or sparse(self, q, *x)
        )
        input_ids, cache = tokens(2, 24), HAMCache(model.config)
        for part in input_ids.split(24 // turns, 1):
            queries.clear()
            last = model(part, cache=cache, logits_to_keep=2).logits
        reads = 2 if turns == 1 else 12
        assert queries == [24 // turns] + [reads] * (model.config.layer_types[1] != "linear_attention")
        torch.testing.assert_close(last, model(input_ids).logits[:, -2:])

    @pytest.mark.parametrize("use_reentrant", [None, False, True])
    def test_gradients(self, model, use_reentrant):
        """Those of thresholds that are being learned, too, and with checkpoints."""
        input_ids, results = tokens(2, 12), []
        model.train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for number in (0, 3):
            model.zero_grad()
            model(input_ids, logits_to_keep=number).logits[:, -3:].square().sum().backward()
            results.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        assert results[0].keys() == results[1].keys()
        assert any(name.endswith("threshold") for name in results[0])
        for name, grad in results[0].items():
            torch.testing.assert_close(results[1][name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()) + 1e-7)

    def test_prefill_in_chunks(self, model):
        """Each chunk but the first finds a filled cache."""
        input_ids = tokens(2, 12)
        whole, chunks = (generate(model, input_ids, prefill_chunk_size=size) for size in (None, 5))
        assert torch.equal(whole.sequences, chunks.sequences)
        assert torch.equal(whole.cache.kept_tokens(), chunks.cache.kept_tokens())

    @pytest.mark.parametrize("in_config", [False, True])
    def test_hidden_states_that_are_asked_for_are_whole(self, model, in_config):
        input_ids, arguments = tokens(2, 12), {} if in_config else {"output_hidden_states": True}
        model.config.output_hidden_states = in_config
        out = model(input_ids, logits_to_keep=1, **arguments)
        assert out.logits.shape[1] == 1
        assert [x.shape[1] for x in out.hidden_states] == [12] * 3
        with pytest.raises(ValueError, match="`last_n` must be 0 where hidden states are returned"):
            model.model(input_ids, last_n=1, **arguments)

    def test_of_the_model_without_a_head(self, model):
        input_ids = tokens(2, 12)
        last = model.model(input_ids, last_n=3).last_hidden_state
        assert last.shape[1] == 3
        torch.testing.assert_close(last, model.model(input_ids).last_hidden_state[:, -3:])


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


class Recorder(BaseStreamer):
    """Stands for a TextStreamer: notes every piece that it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.fixture
def calls(model):
    """The lengths of the model's forward calls, in order."""
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


class TestGeneration:
    @pytest.mark.parametrize(
        "mode",
        [
            {},
            {"do_sample": True},
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_beams": 2, "do_sample": True},
            {"do_sample": True, "num_return_sequences": 3},
            {"cache_implementation": "offloaded"},
        ],
        ids=str,
    )
    def test_the_cache_changes_no_token(self, model, mode):
        input_ids = tokens(2, 6)
        torch.manual_seed(1)
        out = generate(model, input_ids, **mode)
        assert out.sequences.shape == (2 * mode.get("num_return_sequences", 1), 14)
        torch.manual_seed(1)
        without = {name: x for name, x in mode.items() if name != "cache_implementation"}
        expected = model.generate(input_ids, max_new_tokens=8, use_cache=False, **({"do_sample": False} | without))
        assert torch.equal(out.sequences, expected)
        usage = out.cache.kv_usage()[0]
        assert 0 < usage.mean() < 1, "this model keeps all or nothing, so little was tested"

    def test_streamed_tokens_are_the_generated_ones(self, model):
        streamer = Recorder()
        out = generate(model, tokens(1, 6), streamer=streamer)
        assert torch.equal(torch.cat(streamer.pieces), out.sequences[0])
        assert len(streamer.pieces) == 1 + 8
        assert streamer.ended

    def test_prompts_may_be_read_in_chunks(self, model, calls):
        input_ids = tokens(2, 11)
        expected = generate(model, input_ids).sequences
        calls.clear()
        assert torch.equal(generate(model, input_ids, prefill_chunk_size=4).sequences, expected)
        assert calls[:3] == [4, 4, 3]

    @pytest.mark.parametrize("helper", ["prompt lookup", "small model", "same model"])
    def test_assisted_generation_gives_the_greedy_tokens(self, model, tiny_config, calls, helper):
        input_ids = tokens(1, 4).repeat(1, 3)
        expected = generate(model, input_ids, max_new_tokens=20).sequences
        small = distinct(HAMForCausalLM(tiny_config(num_hidden_layers=1))).eval()
        arguments = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "small model": {"assistant_model": small},
            "same model": {"assistant_model": model},
        }
        calls.clear()
        out = model.generate(
            input_ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, **arguments[helper]
        )
        assert type(out.cache) is HAMCache
        assert torch.equal(out.sequences, expected)
        assert any(1 < length < input_ids.shape[1] for length in calls[1:]), "no candidates were ever checked"

    def test_generation_goes_on_from_a_cache(self, model, calls):
        input_ids = tokens(2, 6)
        expected = generate(model, input_ids, max_new_tokens=10).sequences
        first = generate(model, input_ids, max_new_tokens=4)
        calls.clear()
        second = generate(model, first.sequences, cache=first.cache, max_new_tokens=6)
        assert torch.equal(second.sequences, expected)
        assert second.cache is first.cache
        assert calls == [1] * 6, "tokens in the cache were computed again"

    def test_a_callers_empty_cache_is_filled(self, model):
        cache, input_ids = HAMCache(model.config), tokens(2, 6)
        out = generate(model, input_ids, cache=cache)
        assert out.cache is cache
        assert torch.equal(out.sequences, generate(model, input_ids).sequences)

    def test_prompts_may_be_embeddings(self, model):
        input_ids = tokens(2, 6)
        expected = generate(model, input_ids).sequences
        embeds = model.get_input_embeddings()(input_ids)
        out = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        assert type(out.cache) is HAMCache
        assert torch.equal(out.sequences, expected[:, 6:])

    def test_attention_weights_cover_all_tokens_seen(self, model):
        out = generate(model, tokens(2, 6), max_new_tokens=3, output_attentions=True)
        cache = out.cache
        assert [x[0].shape for x in out.attentions] == [(2, 4, 6, 6), (2, 4, 1, 7), (2, 4, 1, 8)]
        last = out.attentions[-1][0][:, :, 0]
        for row, heads in enumerate(cache.kept_positions(0)):
            for head, kept in enumerate(heads):
                seen = set(kept.tolist()) | {7}
                for query in (2 * head, 2 * head + 1):
                    assert set(last[row, query].nonzero().flatten().tolist()) == seen

    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
    @pytest.mark.parametrize("form", ["rows", "full"])
    def test_each_row_has_its_own_threshold(self, model, mode, form):
        """With beams and return sequences a row becomes several; each must keep the threshold of its row."""
        input_ids = tokens(2, 6)
        values = torch.tensor([-1.0, 2.0])
        layers = model.config.num_hybrid_layers
        threshold = values if form == "rows" else values.view(1, 2, 1).expand(layers, 2, 2).clone()
        out = generate(model, input_ids, threshold=threshold, **mode)
        cache = out.cache
        kept = cache.kept_tokens()[0]
        assert (kept[: len(kept) // 2] == cache.get_seq_length()).all()
        assert (kept[len(kept) // 2 :] == 0).all()
        if "num_beams" in mode:
            for row, value in enumerate(values.tolist()):
                alone = generate(model, input_ids[row : row + 1], threshold=value, **mode).sequences
                assert torch.equal(out.sequences[row], alone[0])

    def test_a_fixed_cache_is_refused(self, model):
        with pytest.raises(ValueError, match="static"):
            model.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")

    def test_a_dense_cache_is_refused(self, model):
        with pytest.raises(TypeError, match="HAMCache"):
            model(tokens(1, 4), cache=DynamicCache())

    def test_the_pipeline_reads_a_batch(self, model, tmp_path):
        words = {f"w{i}": i for i in range(97)}
        backend = Tokenizer(WordLevel(words, unk_token="w1"))
        backend.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        pipe = pipeline("text-generation", str(tmp_path), device="cpu")
        assert type(pipe.model) is HAMForCausalLM
        texts = ["w5 w6 w7", "w8 w9 w10 w11 w12 w13", "w14"]
        arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, "suppress_tokens": [0]}
        together = pipe(texts, batch_size=3, **arguments)
        alone = [pipe(text, **arguments) for text in texts]
        assert together == alone
        assert all(len(out[0]["generated_text"].split()) == 5 for out in alone)


class TestGenerationConfiguration:
    """`threshold`, `kv_usage` and `kv_budget` as entries of a generation configuration."""

    @pytest.fixture
    def routing(self, model):
        """What decides what is kept, of every forward call."""
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


class TestKernels:
    def test_no_file_of_the_model_imports_what_transformers_binds_by_importability(self):
        """Transformers 5.23 with flash-linear-attention installed crashes on CPU tensors; HAM must not care."""
        for path in Path(ham_hf.__file__).parent.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not {name.split(".")[0] for name in names} & {"fla", "triton", "causal_conv1d"}, path.name

    def test_an_importable_fla_is_left_alone(self, tmp_path):
        for name in ("fla", "causal_conv1d"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
        program = (
            "import torch; from ham_hf import HAMConfig, HAMForCausalLM\n"
            "sizes = {'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}\n"
            "config = HAMConfig(vocab_size=9, **sizes)\n"
            "out = HAMForCausalLM(config).generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3)\n"
            "print(tuple(out.shape))"
        )
        root = str(Path(ham_hf.__file__).parents[1])
        path = os.pathsep.join([str(tmp_path), root])
        result = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "(1, 6)"
