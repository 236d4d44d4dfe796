# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMConfig keeps every field through JSON, derives what is left out, and is known to Transformers' Auto classes."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from ham_hf import HAMConfig, HAMForCausalLM, configuration_ham
from ham_hf.configuration_ham import LEARNED_ROUTERS, ROUTERS

# A value other than the default for every field of our own.
OTHER_VALUES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "value_head_dim": 12,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-5,
    "use_cache": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "attention_bias": True,
    "mlp_bias": True,
    "layer_types": ["hybrid", "linear_attention", "hybrid"],
    "conv_kernel_size": 3,
    "attention_conv": False,
    "qk_norm": "projection",
    "rnn_output_norm": False,
    "kv_output_norm": False,
    "zero_centered_norms": True,
    "output_norm_eps": 1e-4,
    "output_gate": "sigmoid",
    "linear_output_gate": "silu",
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "allow_neg_eigval": True,
    "attention_post_norm": True,
    "router": "learned_error",
    "attention_window": 5,
    "attention_sinks": [1, 0, 2],
    "router_hidden_size": 7,
    "router_aux_loss_coef": 0.25,
    "target_kv_usage": 0.25,
    "threshold_scope": "model",
    "threshold": [0.3, 1.0],
    "head_importance": [[0.5, 0.0, 2.0], [1.0, 3.5, 1e-9]],
    "usage_division": "even",
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": [7, 8],
}
ALTERNATIVES = [
    {},
    {"threshold": 0.3},
    {"threshold": 1},
    {"attention_window": 64},
    {"attention_sinks": [4, 0]},
    {"threshold": math.inf},
    {"rope_parameters": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    {"output_gate": False},
    {"linear_output_gate": True},
    {"qk_norm": False},
    {"eos_token_id": 3},
    {"head_importance": [[1, 0], [0.5, 2**53]]},
    {"target_kv_usage": 1},
    {"target_kv_usage": None},
    {"target_kv_usage": [0.25, 1]},
    {"target_kv_usage": [0.25, 1.0], "threshold_scope": "layer"},
]


def own_fields():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} - set(HAMConfig.__annotations__)
    return [field for field in dataclasses.fields(HAMConfig) if field.name not in inherited]


def test_every_field_is_covered():
    assert {field.name for field in own_fields()} == set(OTHER_VALUES)


@pytest.mark.parametrize("overrides", [OTHER_VALUES, *ALTERNATIVES], ids=lambda x: "all" if len(x) > 1 else str(x))
def test_json_keeps_every_field(tiny_config, tmp_path, overrides):
    """Through a dictionary and a folder on disk, where the file is plain JSON; infinity included."""
    config = tiny_config(**overrides)
    for name, value in overrides.items():
        assert getattr(config, name) == value
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == "ham"
    for loaded in (
        HAMConfig.from_dict(config.to_dict()),
        HAMConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert type(loaded) is HAMConfig
        for field in own_fields():
            assert getattr(loaded, field.name) == getattr(config, field.name), field.name
        assert loaded == HAMConfig.from_dict(loaded.to_dict())


def test_defaults():
    config = HAMConfig()
    for field in own_fields():
        if field.name not in DERIVED:
            assert getattr(config, field.name) == field.default, field.name
    assert {name: getattr(config, name) for name in DERIVED} == DERIVED


DERIVED = {
    "num_key_value_heads": 16,
    "head_dim": 128,
    "value_head_dim": 128,
    "router_hidden_size": 512,
    "layer_types": ["hybrid"] * 24,
    "kv_output_norm": True,
    "router_aux_loss_coef": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_derived_fields(tiny_config):
    config = tiny_config(hidden_size=64, num_attention_heads=8, num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim, config.value_head_dim) == (8, 8, 8)
    assert tiny_config(head_dim=6).value_head_dim == 6
    assert tiny_config(head_dim=6, value_head_dim=4).head_dim == 6
    assert tiny_config(hidden_size=32).router_hidden_size == 8


@pytest.mark.parametrize("router", ROUTERS)
def test_no_norm_cancels_a_learned_score_unless_a_checkpoint_has_one(router, tiny_config):
    """Checkpoints of learned routers from before say that they have the norm: they compute and learn as before."""
    config = tiny_config(router=router)
    assert config.kv_output_norm == (router not in LEARNED_ROUTERS)
    assert config.router_aux_loss_coef == float(router == "learned")
    stored = config.to_dict() | {"kv_output_norm": True}
    del stored["router_aux_loss_coef"]
    before = HAMConfig.from_dict(stored)
    assert before.kv_output_norm
    assert before.router_aux_loss_coef == 0
    assert "model.layers.0.mixer.kv_norm.weight" in HAMForCausalLM(before).state_dict()
    assert not tiny_config(router=router, kv_output_norm=False).kv_output_norm
    assert tiny_config(hidden_size=3, num_attention_heads=1, num_key_value_heads=1, head_dim=2).router_hidden_size == 1
    # The default is not shared between configurations.
    one, other = HAMConfig(), HAMConfig()
    one.rope_parameters["rope_theta"] = 5.0
    one.layer_types[0] = "full_attention"
    assert other.rope_parameters["rope_theta"] == 10000.0
    assert other.layer_types[0] == "hybrid"


@pytest.mark.parametrize(
    ("layer_types", "hybrid"),
    [
        (None, 2),
        (["hybrid", "hybrid"], 2),
        (["linear_attention", "hybrid"], 1),
        (["full_attention", "linear_attention"], 0),
    ],
)
def test_layer_kinds(tiny_config, layer_types, hybrid):
    """Each kind has the memories it needs and no others; a list of thresholds has one entry per hybrid layer."""
    config = tiny_config(layer_types=layer_types, threshold=[0.5] * hybrid)
    assert config.num_hybrid_layers == hybrid
    model = HAMForCausalLM(config)
    for kind, layer in zip(layer_types or ["hybrid"] * 2, model.model.layers, strict=True):
        names = {name.split(".")[0] for name, _ in layer.mixer.named_parameters()}
        assert ("A_log" in names) == ("b_proj" in names) == (kind != "full_attention")
        assert ("k_norm" in names) == ("q_norm" in names) == (kind != "linear_attention")
        assert ("threshold" in names) == ("kv_gate_proj" in names) == (kind == "hybrid")
    assert sum("threshold" in name for name, _ in model.named_parameters()) == hybrid


def test_rope_and_nope(tiny_config):
    assert HAMForCausalLM(tiny_config(rope_parameters=None)).model.rotary_emb is None
    assert tiny_config(rope_parameters=None).rope_parameters is None
    assert tiny_config(rope_parameters={}).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    with_yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
    assert HAMForCausalLM(tiny_config(rope_parameters=with_yarn)).model.rotary_emb.rope_type == "yarn"


def test_legacy_keys_as_in_transformers():
    """Keys of older configurations are translated, unknown ones kept as attributes, and both survive saving."""
    config = HAMConfig.from_dict(
        {"num_hidden_layers": 2, "rope_theta": 5e5, "torch_dtype": "bfloat16", "written_by": "me"}
    )
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert str(config.dtype) == "torch.bfloat16"
    assert config.written_by == "me"
    scaled = HAMConfig.from_dict({"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.rope_parameters["rope_type"] == "linear"
    assert scaled.rope_parameters["factor"] == 2.0
    again = HAMConfig.from_dict(json.loads(config.to_json_string()))
    assert again.written_by == "me"
    assert again.rope_parameters == config.rope_parameters
    config, unused = HAMConfig.from_dict(
        {"num_hidden_layers": 2}, return_unused_kwargs=True, threshold=0.3, unheard_of=1
    )
    assert config.threshold == 0.3
    assert unused == {"unheard_of": 1}


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor], ids=lambda x: x.__name__)
def test_scalars_of_others_are_numbers(tiny_config, tmp_path, number):
    """They are kept as Python's, which JSON knows; set one by one, and by `from_pretrained`, as well."""
    config = tiny_config(threshold=number(0.5), target_kv_usage=[number(0.25), 1], hidden_size=np.int64(48))
    config.rms_norm_eps = number(0.125)
    found = config.threshold, config.target_kv_usage, config.hidden_size, config.rms_norm_eps
    assert found == (0.5, [0.25, 1], 48, 0.125)
    assert [type(x) for x in (found[0], found[1][0], *found[2:])] == [float, float, int, float]
    config.head_importance = [[number(0.5), 0.0]] * 2
    assert config.head_importance == [[0.5, 0.0]] * 2
    assert type(config.head_importance[1][0]) is float
    config.save_pretrained(tmp_path)
    loaded = HAMConfig.from_pretrained(tmp_path, threshold=[number(0.5), number(2.0)])
    assert (loaded.threshold, loaded.target_kv_usage) == ([0.5, 2.0], [0.25, 1])


# Of a configuration that Transformers 4 wrote whole.
KEYS_OF_VERSION_4 = """
_name_or_path add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads quantization_config
remove_invalid_values repetition_penalty return_dict return_dict_in_generate rope_scaling rope_theta sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""


class TestUnknownKeys:
    @pytest.fixture
    def warned(self, monkeypatch):
        seen = []
        monkeypatch.setattr(configuration_ham.logger, "warning_once", seen.append)
        return seen

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("hiden_size", "hidden_size"),
            ("treshold", "threshold"),
            ("target_kv_usages", "target_kv_usage"),
            ("num_key_value_head", "num_key_value_heads"),
            ("attention_convolution", "attention_conv"),
            ("written_by", None),
        ],
    )
    def test_a_slip_of_the_pen_is_told(self, tiny_config, tmp_path, warned, key, meant):
        hint = f" Is `{meant}` meant?" if meant else ""
        message = f"HAMConfig knows no field `{key}`: it is kept, and changes nothing.{hint}"
        config = tiny_config(**{key: 7})
        assert warned == [message]
        config.save_pretrained(tmp_path)
        warned.clear()
        # As a file of a newer version, it loads.
        assert getattr(HAMConfig.from_pretrained(tmp_path), key) == 7
        assert warned
        assert set(warned) == {message}

    def test_once_in_a_process(self, tiny_config, caplog, monkeypatch):
        monkeypatch.setattr(configuration_ham.logger, "propagate", True)
        for _ in range(3):
            tiny_config(treshold_of_this_test=7)
        assert len([record for record in caplog.records if "treshold_of_this_test" in record.message]) == 1

    def test_what_transformers_and_its_tools_write_is_known(self, tiny_config, tmp_path, warned):
        """Every field that a configuration of Transformers inherits, and every one of generation, in old files too."""
        written = PreTrainedConfig().to_dict()
        keys = {*KEYS_OF_VERSION_4.split(), *vars(PreTrainedConfig()), *written, *vars(GenerationConfig())}
        own = {x.name for x in dataclasses.fields(HAMConfig)} | {"model_type"}
        for key in keys - own:
            tiny_config(**{key: None})
        quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        tiny_config(quantization_config=quantized, torch_dtype="bfloat16", rope_theta=5.0, num_labels=3, max_length=9)
        assert warned == []

    def test_our_own_files_are_known(self, tmp_path, warned):
        """All fields, of configurations and of models, through `save_pretrained` and back."""
        config = HAMConfig(**OTHER_VALUES)
        HAMForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
        for _ in range(2):
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
            model.save_pretrained(tmp_path)
        for checkpoint in (Path(configuration_ham.__file__).parent / "checkpoints").iterdir():
            AutoConfig.from_pretrained(checkpoint)
        assert warned == []


def test_auto_classes(tiny_config, tmp_path):
    config = AutoConfig.for_model("ham", num_hidden_layers=3, threshold=0.4)
    assert type(config) is HAMConfig
    assert (config.num_hidden_layers, config.threshold) == (3, 0.4)
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is HAMForCausalLM
    tiny_config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, threshold=0.4).threshold == 0.4


def test_the_configuration_describes_itself(tiny_config):
    """The documentation matches the code: every field is documented, and `repr` shows the fields that were set."""
    for field in own_fields():
        if not field.name.endswith("_token_id"):
            assert f" {field.name} (" in HAMConfig.__doc__, field.name
    assert '"threshold": 0.375' in repr(tiny_config(threshold=0.375))
