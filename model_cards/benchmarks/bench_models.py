# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The models that the benchmarks compare: HAM and Transformers' own of the same shape, with random weights."""

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3NextConfig
from transformers.modeling_utils import PreTrainedModel

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.routing_ham import usage_threshold

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "vocab_size": 4096,
    "num_attention_heads": 8,
    "head_dim": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def build_ham(kv_heads: int) -> HAMForCausalLM:
    """A HAM with random weights, calibrated on random tokens."""
    model = HAMForCausalLM(HAMConfig(**SHAPE, num_key_value_heads=kv_heads, rope_parameters=ROPE)).eval()
    calibrate(model, [random_tokens(2048)])
    return model


def learn_thresholds(model: HAMForCausalLM, kv_usage: float) -> None:
    """Sets the learned thresholds of a calibrated model to those that keep a fraction `kv_usage` of random tokens."""
    for layer in model.model.layers:
        layer.mixer.threshold.data = usage_threshold(layer.mixer.score_quantiles, kv_usage)


def build_llama(kv_heads: int) -> LlamaForCausalLM:
    """Transformers' Llama of the same shape."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=kv_heads, rope_parameters=ROPE)).eval()


def build_qwen3_next(kv_heads: int) -> PreTrainedModel:
    """Transformers' Qwen3-Next of the same shape: Gated DeltaNet and attention 3:1, dense MLPs, PyTorch path.

    Its linear layers have as many value heads as the others have query heads, and at least half as many key heads, as
    in the released models.
    """
    # If Transformers finds these packages when it loads the model, it passes them CPU tensors too, for which they have
    # no kernels, and there is no switch for that. A module that is None counts as not installed.
    for package in ("fla", "causal_conv1d"):
        sys.modules[package] = None  # type: ignore[assignment]
    from transformers import Qwen3NextForCausalLM

    heads = SHAPE["num_attention_heads"]
    config = Qwen3NextConfig(
        **SHAPE,
        num_key_value_heads=kv_heads,
        linear_num_key_heads=max(kv_heads, heads // 2),
        linear_num_value_heads=heads,
        linear_key_head_dim=SHAPE["head_dim"],
        linear_value_head_dim=SHAPE["head_dim"],
        mlp_only_layers=list(range(SHAPE["num_hidden_layers"])),
    )
    return Qwen3NextForCausalLM(config).eval()


def random_tokens(length: int, rows: int = 1) -> torch.Tensor:
    """`[rows, length]` token ids."""
    return torch.randint(SHAPE["vocab_size"], (rows, length))
