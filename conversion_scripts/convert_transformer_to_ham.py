#!/usr/bin/env python
# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Turns a Llama, Mistral, Qwen2 or Qwen3 checkpoint into a HAM that computes the same, and back.

Every layer becomes a HAM layer whose attention is the source's and keeps every token, or, in a layer with a sliding
window, sees that window and keeps none; its RNN reads the same queries, keys and values and is shut by a gate with too
small a gradient to train. A threshold keeps fewer tokens: those in the window (--window) and the first ones (--sinks)
stay in any case. To lose less, heal the HAM with `ham-hf train`, which opens the gate; README.md in this folder has
the recipe.

  python conversion_scripts/convert_transformer_to_ham.py path/to/Qwen3-0.6B qwen3-ham
  python conversion_scripts/convert_transformer_to_ham.py path/to/model.Q4_K_M.gguf model-ham
  python conversion_scripts/convert_transformer_to_ham.py qwen3-ham qwen3-again --back
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ham_hf import HAMConfig
from ham_hf.conversion.command import main
from ham_hf.conversion.declaration import Conversion, Requirement
from ham_hf.conversion.features import TRANSFORMER_FIELDS, check_partial_rotation, same_fields, sliding_windows
from ham_hf.conversion.memories import INERT_RNN, doubled, halved, is_zero, new_rnn, shut_rnn
from ham_hf.conversion.shards import TensorRule, copied

MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def ham_config(config: Any) -> HAMConfig:
    """The HAM of the same shape."""
    check_partial_rotation(config)
    windows = sliding_windows(config)
    return HAMConfig(
        **same_fields(config, *TRANSFORMER_FIELDS),
        head_dim=getattr(config, "head_dim", None),
        hidden_act=config.hidden_act,
        rope_parameters=dict(config.rope_parameters),
        # Qwen2 always has biases on q, k and v, regardless of its configuration.
        attention_bias=config.model_type == "qwen2" or getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        attention_conv=False,
        qk_norm=config.model_type == "qwen3",
        kv_output_norm=False,
        output_gate=False,
        target_kv_usage=1.0,
        attention_window=windows if any(windows) else 0,
    )


def shared_names(config: HAMConfig) -> Iterator[tuple[str, str]]:
    """Pairs of names, in the HAM and in its source, of tensors that are the same in both."""
    yield "model.embed_tokens.weight", "model.embed_tokens.weight"
    yield "model.norm.weight", "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"
    mixer = [f"{x}_proj.weight" for x in "qkv"]
    if config.attention_bias:
        mixer += [f"{x}_proj.bias" for x in "qkv"]
    if config.qk_norm:
        mixer += ["q_norm.weight", "k_norm.weight"]
    same = [f"{norm}.weight" for norm in NORMS] + [f"mlp.{x}.weight" for x in MLP]
    if config.mlp_bias:
        same += [f"mlp.{x}.bias" for x in MLP]
    for i in range(config.num_hidden_layers):
        for name in mixer:
            yield f"model.layers.{i}.mixer.{name}", f"model.layers.{i}.self_attn.{name}"
        for name in same:
            yield f"model.layers.{i}.{name}", f"model.layers.{i}.{name}"


def to_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the HAM."""
    windows = sliding_windows(source)
    for name, source_name in shared_names(config):
        yield copied(name, source_name)
    for i in range(config.num_hidden_layers):
        mixer, attention = f"model.layers.{i}.mixer", f"model.layers.{i}.self_attn"
        yield doubled(f"{mixer}.o_proj.weight", f"{attention}.o_proj.weight")
        if source.model_type == "qwen2":
            yield TensorRule(f"{mixer}.o_proj.bias", (), lambda: torch.zeros(config.hidden_size))
        elif config.attention_bias:
            yield copied(f"{mixer}.o_proj.bias", f"{attention}.o_proj.bias")
        yield from new_rnn(mixer, config, keeps_all=not windows[i])


def from_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the source."""
    for name, source_name in shared_names(config):
        yield copied(source_name, name)
    for i in range(config.num_hidden_layers):
        mixer, attention = f"model.layers.{i}.mixer", f"model.layers.{i}.self_attn"
        yield halved(f"{attention}.o_proj.weight", f"{mixer}.o_proj.weight")
        if config.attention_bias and source.model_type != "qwen2":
            yield copied(f"{attention}.o_proj.bias", f"{mixer}.o_proj.bias")


def requirements(source: Any, config: HAMConfig) -> Iterator[Requirement]:
    """Requirements on a HAM for the way back."""
    windows = sliding_windows(source)
    for i in range(config.num_hidden_layers):
        if windows[i] and (config.window_of(i), config.sinks_of(i)) != (windows[i], 0):
            raise ValueError(
                f"The way back would lose something: layer {i} must have its source's window of {windows[i]} and no "
                f"sinks, got {config.window_of(i)} and {config.sinks_of(i)}."
            )
        yield from shut_rnn(f"model.layers.{i}.mixer", keeps_all=not windows[i])
        if source.model_type == "qwen2":
            yield Requirement(f"model.layers.{i}.mixer.o_proj.bias", is_zero, "is not zero, and Qwen2 has none")


CONVERSION = Conversion(
    script="convert_transformer_to_ham.py",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    ham_config=ham_config,
    to_ham=to_ham,
    from_ham=from_ham,
    requirements=requirements,
    inert=INERT_RNN,
    reads_gguf=True,
    takes_window=True,
    left_out=r"\.rotary_emb\.inv_freq$",
    left_out_because="the configuration gives the frequencies of RoPE",
    summary="The attention of every layer is the source's and keeps every token; the RNN beside it is shut, so what a "
    "threshold above 0 drops is lost until the model is trained to remember it.",
)

if __name__ == "__main__":
    sys.exit(main(CONVERSION, __doc__))
