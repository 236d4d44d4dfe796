#!/usr/bin/env python
# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Turns a dense Qwen3-Next or Qwen3.5 checkpoint into a HAM that computes the same, and back.

Linear layers (Gated DeltaNet) stay as they are. Layers of full attention become HAM layers whose attention is the
source's and keeps every token; the RNN beside it reads the same queries, keys and values and is shut. The script
converts only the language model of a multimodal checkpoint, and refuses mixtures of experts. For a plain Qwen3 take
convert_transformer_to_ham.py. To keep fewer tokens, heal the HAM with `ham-hf train`; README.md in this folder has the
recipe.

  python conversion_scripts/convert_qwen3_hybrid_to_ham.py path/to/Qwen3.5-0.8B qwen3.5-ham
  python conversion_scripts/convert_qwen3_hybrid_to_ham.py qwen3.5-ham qwen3.5-again --back
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ham_hf import HAMConfig
from ham_hf.conversion.command import main
from ham_hf.conversion.declaration import Conversion, Requirement
from ham_hf.conversion.features import LAYER_TYPES, LINEAR_FIELDS, TRANSFORMER_FIELDS, check_linear_hybrid, same_fields
from ham_hf.conversion.memories import INERT_RNN, doubled, halved, new_rnn, shut_rnn
from ham_hf.conversion.shards import TensorRule, copied
from ham_hf.mixer_ham import HAMRotaryEmbedding, partial_rotary_order

MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def rename(name: str) -> str:
    """The name of a multimodal checkpoint's tensor in the language model alone."""
    return name.replace("model.language_model.", "model.", 1)


def check_features(config: Any) -> None:
    """Raises `ValueError`, naming the feature, for a configuration that a HAM cannot represent."""
    dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    if getattr(config, "num_experts", 0):
        sparse = [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]
        if sparse:
            raise ValueError(
                f"`source` must have a dense MLP in every layer, got a mixture of experts ({config.num_experts} in "
                f"{len(sparse)} of {config.num_hidden_layers} layers): HAM has none."
            )
    check_linear_hybrid(config)
    if config.attention_bias:
        raise ValueError("`attention_bias` must be False, got True: HAM's output gate has no bias.")


def ham_config(config: Any) -> HAMConfig:
    """The HAM of the same shape."""
    check_features(config)
    # Text has the same position in all sections of multimodal RoPE, which then equals RoPE.
    rope = {name: value for name, value in config.rope_parameters.items() if not name.startswith("mrope_")}
    return HAMConfig(
        **same_fields(config, *TRANSFORMER_FIELDS, *LINEAR_FIELDS),
        head_dim=config.head_dim,
        rope_parameters=rope,
        layer_types=[LAYER_TYPES[layer_type] for layer_type in config.layer_types],
        conv_kernel_size=config.linear_conv_kernel_dim,
        attention_conv=False,
        kv_output_norm=False,
        zero_centered_norms=True,
        output_gate="sigmoid",
        linear_output_gate="silu",
        target_kv_usage=1.0,
    )


@dataclass(frozen=True)
class Projection:
    """A projection of the source, which holds several of a HAM's projections.

    Attributes:
        name: its name in the source.
        groups: number of heads by which its rows are grouped.
        rows: number of rows of each of the HAM's projections in a group, in order.
    """

    name: str
    groups: int
    rows: dict[str, int]

    def split(self, weight: torch.Tensor, part: str, order: torch.Tensor | None) -> torch.Tensor:
        """The rows of `part`; those of each group in this `order`."""
        parts = weight.unflatten(0, (self.groups, -1)).split([*self.rows.values()], 1)
        rows = parts[[*self.rows].index(part)]
        return (rows if order is None else rows[:, order]).flatten(0, 1)

    def join(self, *weights: torch.Tensor, orders: list[torch.Tensor | None]) -> torch.Tensor:
        """The projection, joined from its parts in those orders."""
        parts = [weight.unflatten(0, (self.groups, -1)) for weight in weights]
        parts = [x if order is None else x[:, order.argsort()] for x, order in zip(parts, orders, strict=True)]
        return torch.cat(parts, 1).flatten(0, 1)


def projections(source: Any, layer_type: str) -> list[Projection]:
    """The source's input projections of a layer."""
    if layer_type == "hybrid":
        heads, kv_heads, dim = source.num_attention_heads, source.num_key_value_heads, source.head_dim
        return [
            Projection("q_proj", heads, {"q": dim, "z": dim}),
            Projection("k_proj", kv_heads, {"k": dim}),
            Projection("v_proj", kv_heads, {"v": dim}),
        ]
    groups, key = source.linear_num_key_heads, source.linear_key_head_dim
    heads = source.linear_num_value_heads
    served = heads // groups
    value = served * source.linear_value_head_dim
    if source.model_type == "qwen3_next":
        return [
            Projection("in_proj_qkvz", groups, {"q": key, "k": key, "v": value, "z": value}),
            Projection("in_proj_ba", groups, {"b": served, "a": served}),
        ]
    return [
        Projection("in_proj_qkv", 1, {"q": groups * key, "k": groups * key, "v": groups * value}),
        Projection("in_proj_z", 1, {"z": groups * value}),
        Projection("in_proj_b", 1, {"b": heads}),
        Projection("in_proj_a", 1, {"a": heads}),
    ]


def rotary_orders(config: HAMConfig, layer_type: str) -> dict[str, torch.Tensor]:
    """The HAM's order of a head's dimensions in each projection that RoPE rotates."""
    if layer_type != "hybrid":
        return {}
    rotary = HAMRotaryEmbedding(config)  # type: ignore[arg-type]  # reads what HAMConfig has too
    order = partial_rotary_order(config.head_dim, 2 * len(rotary.inv_freq))
    return {"q": order, "k": order}


def shared_names(config: HAMConfig) -> Iterator[tuple[str, str]]:
    """Pairs of names, in the HAM and in its source, of tensors that are the same in both."""
    yield "model.embed_tokens.weight", "model.embed_tokens.weight"
    yield "model.norm.weight", "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"
    for i, layer_type in enumerate(config.layer_types):
        layer = f"model.layers.{i}"
        for name in MLP:
            yield f"{layer}.mlp.{name}.weight", f"{layer}.mlp.{name}.weight"
        for name in NORMS:
            yield f"{layer}.{name}.weight", f"{layer}.{name}.weight"
        if layer_type == "linear_attention":
            yield f"{layer}.mixer.A_log", f"{layer}.linear_attn.A_log"
            yield f"{layer}.mixer.dt_bias", f"{layer}.linear_attn.dt_bias"
            yield f"{layer}.mixer.rnn_norm.weight", f"{layer}.linear_attn.norm.weight"
            yield f"{layer}.mixer.o_proj.weight", f"{layer}.linear_attn.out_proj.weight"


def in_order(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A weight in another order."""
    return weight[order]


def to_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the HAM."""
    for name, source_name in shared_names(config):
        yield copied(name, source_name)
    for i, layer_type in enumerate(config.layer_types):
        mixer = f"model.layers.{i}.mixer"
        layer = f"model.layers.{i}.{'self' if layer_type == 'hybrid' else 'linear'}_attn"
        orders = rotary_orders(config, layer_type)
        for projection in projections(source, layer_type):
            for part in projection.rows:
                split = partial(projection.split, part=part, order=orders.get(part))
                yield TensorRule(f"{mixer}.{part}_proj.weight", (f"{layer}.{projection.name}.weight",), split)
        if layer_type == "hybrid":
            for part, order in orders.items():
                norm = f"{part}_norm.weight"
                yield TensorRule(f"{mixer}.{norm}", (f"{layer}.{norm}",), partial(in_order, order=order))
            yield doubled(f"{mixer}.o_proj.weight", f"{layer}.o_proj.weight")
            yield from new_rnn(mixer, config)
        else:
            yield TensorRule(f"{mixer}.conv.weight", (f"{layer}.conv1d.weight",), lambda x: x.squeeze(1))


def from_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the source."""
    for name, source_name in shared_names(config):
        yield copied(source_name, name)
    for i, layer_type in enumerate(config.layer_types):
        mixer = f"model.layers.{i}.mixer"
        layer = f"model.layers.{i}.{'self' if layer_type == 'hybrid' else 'linear'}_attn"
        orders = rotary_orders(config, layer_type)
        for projection in projections(source, layer_type):
            parts = tuple(f"{mixer}.{part}_proj.weight" for part in projection.rows)
            join = partial(projection.join, orders=[orders.get(part) for part in projection.rows])
            yield TensorRule(f"{layer}.{projection.name}.weight", parts, join)
        if layer_type == "hybrid":
            for part, order in orders.items():
                norm = f"{part}_norm.weight"
                yield TensorRule(f"{layer}.{norm}", (f"{mixer}.{norm}",), partial(in_order, order=order.argsort()))
            yield halved(f"{layer}.o_proj.weight", f"{mixer}.o_proj.weight")
        else:
            yield TensorRule(f"{layer}.conv1d.weight", (f"{mixer}.conv.weight",), lambda x: x.unsqueeze(1))


def requirements(source: Any, config: HAMConfig) -> Iterator[Requirement]:
    """Requirements on a HAM for the way back."""
    for i, layer_type in enumerate(config.layer_types):
        if layer_type == "hybrid":
            yield from shut_rnn(f"model.layers.{i}.mixer")


CONVERSION = Conversion(
    script="convert_qwen3_hybrid_to_ham.py",
    # Mixtures of experts among these are refused by their configuration, not by their names.
    model_types=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    ham_config=ham_config,
    to_ham=to_ham,
    from_ham=from_ham,
    requirements=requirements,
    inert=INERT_RNN,
    takes_window=True,
    rename=rename,
    left_out=r"^(model\.visual\.|mtp\.)",
    left_out_because="a HAM has no vision tower (model.visual.*) and no multi-token prediction (mtp.*)",
    summary="Linear layers are the source's. So is the attention of the others, which keeps every token; the RNN "
    "beside it is shut, so what a threshold above 0 drops is lost until the model is trained to remember it.",
)

if __name__ == "__main__":
    sys.exit(main(CONVERSION, __doc__))
