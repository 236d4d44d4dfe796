# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The memory of a converted HAM layer that its source does not have, shut until training opens it.

The source's memory passes a gate of 0.5 (a bias of 0, which a gradient can move) and an output projection twice as
large, both exact in floating point. The new memory's gate has the bias `SHUT`, so that it adds nothing in float32.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..configuration_ham import HAMConfig
from ..mixer_ham import HAMMixer
from ..routing_ham import NUM_QUANTILES
from .declaration import Requirement
from .shards import TensorRule

SHUT = -20.0
KEEP_NOTHING = 1.01
# Tensors that only a shut memory reads.
INERT_RNN = r"\.mixer\.(conv\.weight|a_proj\.weight|b_proj\.weight|A_log|dt_bias|rnn_norm\.weight|score_quantiles)$"
INERT_ATTENTION = r"\.mixer\.(q_norm\.weight|k_norm\.weight|kv_norm\.weight|threshold|score_quantiles)$"
# Parts of a converted hybrid layer that its source does not have: those of the new memory, and what joins the two.
ADDED_RNN = ("conv", "a_proj", "b_proj", "A_log", "dt_bias", "rnn_norm")
ADDED_ATTENTION = ("q_norm", "k_norm", "kv_norm")
ADDED_JOINT = ("rnn_gate_proj", "kv_gate_proj", "router", "threshold")


def new_rnn(prefix: str, config: HAMConfig, keeps_all: bool = True) -> Iterator[TensorRule]:
    """Rules for the RNN of a hybrid layer made from an attention layer: shut, while attention keeps every token.

    The RNN reads the attention's own q, k and v: its convolution passes them on. Decays are spread as in a new HAM:
    `A` from 1 to 16, time steps log-spaced from 0.001 to 0.1. At first neither they nor the write strength (0.5, or 1
    with `allow_neg_eigval`) depend on the token.

    Args:
        prefix: prefix of the layer's tensors, such as `"model.layers.0.mixer"`.
        config: the HAM's configuration.
        keeps_all: False if attention sees the layer's window alone, and keeps nothing.
    """
    hidden, kv_heads = config.hidden_size, config.num_key_value_heads
    spread = (torch.arange(kv_heads) + 0.5) / kv_heads
    dt = torch.exp(math.log(1e-3) + spread.flip(0) * math.log(1e2))
    passing = torch.zeros(sum(config.layer_shape("hybrid").channels), config.conv_kernel_size)
    passing[:, -1] = 1
    yield _new(f"{prefix}.conv.weight", passing)
    yield _new(f"{prefix}.a_proj.weight", torch.zeros(kv_heads, hidden))
    yield _new(f"{prefix}.b_proj.weight", torch.zeros(kv_heads, hidden))
    yield _new(f"{prefix}.A_log", torch.log(1 + 15 * spread), torch.float32)
    yield _new(f"{prefix}.dt_bias", dt + torch.log(-torch.expm1(-dt)), torch.float32)
    yield _new(f"{prefix}.rnn_norm.weight", torch.ones(config.value_head_dim))
    yield from _gates(prefix, config, shut="rnn", threshold=0.0 if keeps_all else KEEP_NOTHING)


def new_attention(prefix: str, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for the attention of a hybrid layer made from a Gated DeltaNet layer: shut, and it keeps no token.

    Arguments as in `new_rnn`.
    """
    yield _new(f"{prefix}.q_norm.weight", torch.ones(config.head_dim))
    yield _new(f"{prefix}.k_norm.weight", torch.ones(config.head_dim))
    yield _new(f"{prefix}.kv_norm.weight", torch.ones(config.value_head_dim))
    yield from _gates(prefix, config, shut="kv", threshold=KEEP_NOTHING)


def doubled(name: str, source: str) -> TensorRule:
    """An output projection behind a gate of 0.5: twice the source's, exactly."""
    return TensorRule(name, (source,), lambda x: x * 2)


def halved(name: str, source: str) -> TensorRule:
    """The inverse of `doubled`."""
    return TensorRule(name, (source,), lambda x: x / 2)


def shut_rnn(prefix: str, keeps_all: bool = True) -> Iterator[Requirement]:
    """Requirements for a hybrid layer to be its attention alone, which keeps all tokens or none."""
    yield from _gates_unmoved(prefix, shut="rnn")
    name = f"{prefix}.threshold"
    if keeps_all:
        yield Requirement(name, lambda x: bool((x <= 0).all()), "is above 0, so that tokens are dropped")
    else:
        yield Requirement(
            name, lambda x: bool((x > 1).all()), "is at most 1, so that tokens beyond the window are kept"
        )


def shut_attention(prefix: str) -> Iterator[Requirement]:
    """Requirements for a hybrid layer to be its RNN alone."""
    yield from _gates_unmoved(prefix, shut="kv")


def added_parameters(mixer: HAMMixer) -> dict[str, nn.Parameter]:
    """The parameters, by name, of a converted hybrid layer's mixer that its source does not have.

    Attention that reads raw projections is a Transformer's, to which conversion added the RNN; attention that reads
    convolved ones was added to a Gated DeltaNet.
    """
    memory = ADDED_ATTENTION if mixer.config.attention_conv else ADDED_RNN
    parts = {*memory, *ADDED_JOINT}
    return {name: x for name, x in mixer.named_parameters() if name.partition(".")[0] in parts}


def is_zero(x: torch.Tensor) -> bool:
    """True if every entry is 0."""
    return not x.any()


def _new(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> TensorRule:
    return TensorRule(name, (), lambda: tensor, dtype)


def _gates(prefix: str, config: HAMConfig, shut: str, threshold: float) -> Iterator[TensorRule]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for memory in ("rnn", "kv"):
        bias = torch.full((heads,), SHUT if memory == shut else 0.0)
        yield _new(f"{prefix}.{memory}_gate_proj.weight", torch.zeros(heads, config.hidden_size))
        yield _new(f"{prefix}.{memory}_gate_proj.bias", bias)
    yield _new(f"{prefix}.threshold", torch.full((kv_heads,), threshold), torch.float32)
    quantiles = torch.zeros(kv_heads, NUM_QUANTILES)
    yield _new(f"{prefix}.score_quantiles", quantiles, torch.float32)


def _gates_unmoved(prefix: str, shut: str) -> Iterator[Requirement]:
    for memory in ("rnn", "kv"):
        weight, bias = f"{prefix}.{memory}_gate_proj.weight", f"{prefix}.{memory}_gate_proj.bias"
        yield Requirement(weight, is_zero, "is no longer zero, so that the gate depends on the token")
        if memory == shut:
            yield Requirement(bias, lambda x: bool((x <= SHUT).all()), f"is above {SHUT}: the gate has opened")
        else:
            yield Requirement(bias, is_zero, "is no longer 0, where the gate is 0.5")
