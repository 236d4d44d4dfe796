#!/usr/bin/env python
# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Turns an OLMo-Hybrid checkpoint into a HAM that computes the same, and back.

Linear layers (Gated DeltaNet) stay as they are. Layers of full attention become HAM layers whose attention is the
source's and keeps every token; the RNN beside it reads the same queries, keys and values and is shut. To keep fewer
tokens, heal the HAM with `ham-hf train`; README.md in this folder has the recipe.

  python conversion_scripts/convert_olmo_hybrid_to_ham.py path/to/Olmo-Hybrid-7B olmo-ham
  python conversion_scripts/convert_olmo_hybrid_to_ham.py olmo-ham olmo-again --back

The way back is exact to the bit, with the tensor names of the released checkpoints.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ham_hf import HAMConfig
from ham_hf.conversion.command import main
from ham_hf.conversion.declaration import Conversion, Requirement
from ham_hf.conversion.features import (
    LAYER_TYPES,
    LINEAR_FIELDS,
    TRANSFORMER_FIELDS,
    check_linear_hybrid,
    check_partial_rotation,
    same_fields,
)
from ham_hf.conversion.memories import INERT_RNN, doubled, halved, is_zero, new_rnn, shut_rnn
from ham_hf.conversion.shards import TensorRule, copied
from ham_hf.conversion.verification import transformers_model

# Set in the source's code, not in its configuration.
OUTPUT_NORM_EPS = 1e-5
# Norms of a linear layer and of a layer with attention, with equal names in the HAM.
NORMS = {
    "linear_attention": ("input_layernorm", "post_attention_layernorm"),
    "hybrid": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
# Tensors of the mixer: the HAM's names and the source's.
MIXER = {
    "linear_attention": {
        **{f"{x}_proj.weight": f"{x}_proj.weight" for x in "qkvabo"},
        "z_proj.weight": "g_proj.weight",
        "rnn_norm.weight": "o_norm.weight",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
    },
    "hybrid": {f"{x}.weight": f"{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")},
}


def rename(name: str) -> str:
    """The released name of a tensor; Transformers saves some under others."""
    for saved, released in (
        ("attention_layer_norm", "input_layernorm"),
        ("feedforward_layer_norm", "post_attention_layernorm"),
    ):
        name = name.replace(f".{saved}.", f".{released}.")
    return name


def check_features(config: Any) -> None:
    """Raises `ValueError`, naming the feature, for a configuration that a HAM cannot represent."""
    check_linear_hybrid(config)
    check_partial_rotation(config)


def ham_config(config: Any) -> HAMConfig:
    """The HAM of the same shape."""
    check_features(config)
    rope = config.rope_parameters
    return HAMConfig(
        **same_fields(config, *TRANSFORMER_FIELDS, *LINEAR_FIELDS),
        head_dim=getattr(config, "head_dim", None),
        # In the source no base means no positions.
        rope_parameters=dict(rope) if rope and rope.get("rope_theta") is not None else None,
        attention_bias=config.attention_bias,
        layer_types=[LAYER_TYPES[layer_type] for layer_type in config.layer_types],
        conv_kernel_size=config.linear_conv_kernel_dim,
        attention_conv=False,
        attention_post_norm=True,
        qk_norm="projection",
        kv_output_norm=False,
        output_norm_eps=OUTPUT_NORM_EPS,
        output_gate=False,
        linear_output_gate="silu",
        allow_neg_eigval=config.linear_allow_neg_eigval,
        target_kv_usage=1.0,
    )


def layers(config: HAMConfig) -> Iterator[tuple[str, str, str]]:
    """The kind of every layer, and the prefixes of its mixer in the HAM and in the source."""
    for i, layer_type in enumerate(config.layer_types):
        kind = "self_attn" if layer_type == "hybrid" else "linear_attn"
        yield layer_type, f"model.layers.{i}.mixer", f"model.layers.{i}.{kind}"


def shared_names(config: HAMConfig) -> Iterator[tuple[str, str]]:
    """Pairs of names, in the HAM and in its source, of tensors that are the same in both."""
    yield "model.embed_tokens.weight", "model.embed_tokens.weight"
    yield "model.norm.weight", "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"
    for layer_type, mixer, source_mixer in layers(config):
        layer = mixer.removesuffix(".mixer")
        for name in (*NORMS[layer_type], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            yield f"{layer}.{name}.weight", f"{layer}.{name}.weight"
        for name, source_name in MIXER[layer_type].items():
            yield f"{mixer}.{name}", f"{source_mixer}.{source_name}"
        if layer_type == "hybrid" and config.attention_bias:
            for x in "qkvo":
                yield f"{mixer}.{x}_proj.bias", f"{source_mixer}.{x}_proj.bias"


def to_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the HAM."""
    for name, source_name in shared_names(config):
        yield copied(name, source_name)
    for layer_type, mixer, source_mixer in layers(config):
        if layer_type == "hybrid":
            yield doubled(f"{mixer}.o_proj.weight", f"{source_mixer}.o_proj.weight")
            yield from new_rnn(mixer, config)
            continue
        # The parts may be cut anywhere: Transformers saves three of about the same size.
        parts = tuple(f"{source_mixer}.{x}_conv1d.weight" for x in "qkv")
        yield TensorRule(f"{mixer}.conv.weight", parts, lambda *x: torch.cat(x).squeeze(1))
        if config.attention_bias:
            sizes = [*config.layer_shape(layer_type).channels, config.hidden_size]
            for x, size in zip("qkvo", sizes, strict=True):
                yield TensorRule(f"{mixer}.{x}_proj.bias", (), partial(torch.zeros, size))


def from_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the source."""
    for name, source_name in shared_names(config):
        yield copied(source_name, name)
    sizes = config.layer_shape("linear_attention").channels

    def part(i: int, weight: torch.Tensor) -> torch.Tensor:
        return weight.split(sizes)[i].unsqueeze(1)

    for layer_type, mixer, source_mixer in layers(config):
        if layer_type == "hybrid":
            yield halved(f"{source_mixer}.o_proj.weight", f"{mixer}.o_proj.weight")
            continue
        for i, x in enumerate("qkv"):
            yield TensorRule(f"{source_mixer}.{x}_conv1d.weight", (f"{mixer}.conv.weight",), partial(part, i))


def requirements(source: Any, config: HAMConfig) -> Iterator[Requirement]:
    """Requirements on a HAM for the way back."""
    for layer_type, mixer, _ in layers(config):
        if layer_type == "hybrid":
            yield from shut_rnn(mixer)
        elif config.attention_bias:
            for x in "qkvo":
                yield Requirement(f"{mixer}.{x}_proj.bias", is_zero, "is not zero, and the source has none")


def empty_source(config: Any) -> nn.Module:
    """The source's model, with three convolutions in place of one, as in the released checkpoints."""
    model = transformers_model(config)
    for layer, layer_type in zip(model.model.layers, config.layer_types, strict=True):
        if layer_type == "linear_attention":
            mixer = layer.linear_attn
            for x, size in zip("qkv", (mixer.key_dim, mixer.key_dim, mixer.value_dim), strict=True):
                convolution = nn.Conv1d(size, size, mixer.conv_kernel_size, groups=size, bias=False)
                mixer.add_module(f"{x}_conv1d", convolution)
            del mixer.conv1d
    return model


CONVERSION = Conversion(
    script="convert_olmo_hybrid_to_ham.py",
    model_types=("olmo_hybrid",),
    ham_config=ham_config,
    to_ham=to_ham,
    from_ham=from_ham,
    requirements=requirements,
    inert=INERT_RNN,
    takes_window=True,
    empty_source=empty_source,
    rename=rename,
    left_out=r"\.rotary_emb\.inv_freq$",
    left_out_because="the configuration gives the frequencies of RoPE",
    summary="Linear layers are the source's. So is the attention of the others, which keeps every token; the RNN "
    "beside it is shut, so what a threshold above 0 drops is lost until the model is trained to remember it.",
)

if __name__ == "__main__":
    sys.exit(main(CONVERSION, __doc__))
