# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Shard, one worker's part of a model whose heads are divided over several (tensor parallelism).

A key/value head brings its query heads, its RNN state, its scores and its kept tokens with it, so a worker with some
of the heads is a smaller model of the same kind. Only the outputs of a layer's two parts are sums over all workers.
Embeddings and head are whole in each.
"""

from typing import NamedTuple

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce

from ...configuration_ham import LINEAR_SHAPE, HAMConfig
from ...modeling_ham import HAMForCausalLM

# What is divided among the workers.
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", *LINEAR_SHAPE[:2])
# Parts of a mixer or an MLP with an entry, or rows, for each of its heads, or channels.
BY_ROWS = (
    "q_proj k_proj v_proj z_proj a_proj b_proj A_log dt_bias rnn_gate_proj kv_gate_proj threshold score_quantiles "
    "router.down_proj router.error_weight gate_proj up_proj"
).split()
# Parts that sum over heads, or channels.
SUMS = ("o_proj", "down_proj")


class Shard(NamedTuple):
    """The part of worker `rank` of `size`."""

    rank: int
    size: int

    def config(self, config: HAMConfig) -> HAMConfig:
        """The configuration of the part.

        Raises:
            ValueError: if the model cannot be divided in this way.
        """
        if self.size == 1:
            return config
        divided = {name: getattr(config, name) for name in DIVIDED if getattr(config, name) is not None}
        for name, number in divided.items():
            if number % self.size:
                raise ValueError(
                    f"`tensor_parallel_size` must divide `{name}`, {number} in this model; got {self.size}."
                )
        if config.qk_norm == "projection":
            raise ValueError(f"`tensor_parallel_size` must be 1 with `qk_norm='projection'`, got {self.size}.")
        changes = {name: number // self.size for name, number in divided.items()}
        return HAMConfig.from_dict(config.to_dict() | changes | {"head_importance": None})

    def prepare(self, model: HAMForCausalLM) -> None:
        """Has the part's layers add up their outputs with the others', and number their heads among all."""
        if self.size == 1:
            return
        for layer in model.model.layers:
            for part in (layer.mixer.o_proj, layer.mlp.down_proj):
                part.register_forward_hook(_all_reduced)
            if layer.mixer.layer_type == "hybrid":
                # A random score hashes the number of the head: layer times heads, plus head.
                layer.mixer.router.layer_idx = layer.mixer.layer_idx * self.size + self.rank

    def part(self, name: str, weight: torch.Tensor, config: HAMConfig) -> torch.Tensor:
        """The part of a tensor of the whole model, whose configuration is `config`.

        Args:
            name: as in a checkpoint, `"model.layers.3.mixer.q_proj.weight"`.
            weight: the whole tensor.
        """
        places = name.split(".")
        if self.size == 1 or places[:2] != ["model", "layers"]:
            return weight
        path = ".".join(places[4:]).removesuffix(".weight").removesuffix(".bias")
        if path == "conv":
            parts = weight.split(config.layer_shape(config.layer_types[int(places[2])]).channels)
            return torch.cat([x.chunk(self.size)[self.rank] for x in parts])
        if path in BY_ROWS:
            return weight.chunk(self.size)[self.rank]
        if path not in SUMS:
            return weight
        if name.endswith(".bias"):
            return weight if self.rank == 0 else torch.zeros_like(weight)
        return weight.chunk(self.size, dim=1)[self.rank]


def _all_reduced(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return tensor_model_parallel_all_reduce(output)
