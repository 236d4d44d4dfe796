# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Classes and parallel plans are those that Transformers asks for, and no file binds what may be installed."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

import ham_hf
from ham_hf import (
    HAMConfig,
    HAMForCausalLM,
    HAMForQuestionAnswering,
    HAMForSequenceClassification,
    HAMForTokenClassification,
    HAMModel,
    HAMPreTrainedModel,
)
from ham_hf.inputs_ham import CACHE_NAME
from tests.model.models import HEADS


def wildcard(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


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


class TestKernels:
    def test_no_file_of_the_model_imports_what_transformers_binds_by_importability(self):
        """Transformers 5.23 with flash-linear-attention installed crashes on CPU tensors; HAM must not care."""
        for path in Path(ham_hf.__file__).parent.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not {name.split(".")[0] for name in names} & {"fla", "triton", "causal_conv1d"}, path.name

    @pytest.mark.slow
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
