#!/usr/bin/env python
# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Turns a Gated DeltaNet of flash-linear-attention into a HAM that computes the same, and back.

Every layer becomes a HAM layer whose RNN is the source's; the attention beside it is new, keeps no token and is shut.
The shut gate has too small a gradient to train. To use the attention, heal the HAM with `ham-hf train`, which opens
the gate and raises the usage from 0; README.md in this folder has the recipe.

Needs flash-linear-attention (tested with 0.6.0). Without a GPU its kernels run under Triton's interpreter, which suits
small models: compare fewer tokens of a large one (`--verify-tokens 4`), or none (`--no-verify`).

  python conversion_scripts/convert_gated_deltanet_to_ham.py path/to/gdn-340M gdn-ham
  python conversion_scripts/convert_gated_deltanet_to_ham.py gdn-ham gdn-again --back
"""

import importlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.versions import require_version

# Set before anything imports Triton, which reads it once.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ham_hf import HAMConfig
from ham_hf.conversion.command import main
from ham_hf.conversion.declaration import Conversion, Requirement
from ham_hf.conversion.features import same_fields
from ham_hf.conversion.memories import INERT_ATTENTION, doubled, halved, new_attention, shut_attention
from ham_hf.conversion.run import VERIFIED_ROWS
from ham_hf.conversion.shards import TensorRule, copied

# Seconds per token and block of values in fla's recurrent kernel under the interpreter, and the size of a block.
INTERPRETED_STEP, VALUE_BLOCK = 0.01, 8


def import_fla() -> None:
    """Registers fla's classes with Transformers; `ImportError` says what to install."""
    require_version("flash-linear-attention>=0.6.0", "Install it: pip install 'flash-linear-attention>=0.6.0'")
    importlib.import_module("fla.models.gated_deltanet")


def check_features(config: Any) -> None:
    """Raises `ValueError`, naming the feature, for a configuration that a HAM cannot represent."""
    if not config.use_short_conv:
        raise ValueError("`use_short_conv` must be True, got False: a HAM's RNN always has its convolution.")
    # fla's layer supports such biases; its model, which `config` belongs to, never makes them.
    if getattr(config, "conv_bias", False):
        raise ValueError("`conv_bias` must be False, got True: a HAM's convolution has no bias.")
    if config.attn is not None:
        raise ValueError(
            f"`attn` must be None, got {config.attn}: fla's attention layers have positions and windows of their own."
        )
    if config.attnres_block_size is not None:
        raise ValueError(
            f"`attnres_block_size` must be None, got {config.attnres_block_size}: HAM's residual stream is a sum."
        )
    if config.hidden_act != "swish":
        raise ValueError(f"`hidden_act` must be 'swish', got {config.hidden_act!r}: HAM's MLP has no such gate.")
    if value_heads(config) % config.num_heads:
        raise ValueError(
            f"`num_v_heads` must be a multiple of `num_heads` ({config.num_heads}), got {config.num_v_heads}."
        )


def value_heads(config: Any) -> int:
    """Number of the source's value heads, several of which may share a head of queries and keys."""
    return config.num_heads if config.num_v_heads is None else config.num_v_heads


def ham_config(config: Any) -> HAMConfig:
    """The HAM of the same shape, with a head of queries and keys for every head of values."""
    check_features(config)
    intermediate_size = config.intermediate_size
    if intermediate_size is None:
        # As in fla's `GatedMLP`: a multiple of 256.
        ratio = 4 if config.hidden_ratio is None else config.hidden_ratio
        intermediate_size = -(-int(config.hidden_size * ratio * 2 / 3) // 256) * 256
    gate = "sigmoid" if config.output_gate_activation == "sigmoid" else "silu"
    return HAMConfig(
        **same_fields(config),
        intermediate_size=intermediate_size,
        num_attention_heads=value_heads(config),
        head_dim=config.head_dim,
        value_head_dim=int(config.head_dim * config.expand_v),
        rms_norm_eps=config.norm_eps,
        rope_parameters=None,
        conv_kernel_size=config.conv_size,
        output_gate=gate if config.use_gate else False,
        allow_neg_eigval=config.allow_neg_eigval,
        target_kv_usage=0.0,
    )


def shared_names(config: HAMConfig) -> Iterator[tuple[str, str]]:
    """Pairs of names, in the HAM and in its source, of tensors that are the same in both."""
    yield "model.embed_tokens.weight", "model.embeddings.weight"
    yield "model.norm.weight", "model.norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", f"{layer}.attn_norm.weight"
        yield f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp_norm.weight"
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{layer}.mlp.{name}.weight", f"{layer}.mlp.{name}.weight"
        for name in ("v_proj.weight", "a_proj.weight", "b_proj.weight", "A_log", "dt_bias"):
            yield f"{layer}.mixer.{name}", f"{layer}.attn.{name}"
        yield f"{layer}.mixer.rnn_norm.weight", f"{layer}.attn.o_norm.weight"
        if config.output_gate:
            yield f"{layer}.mixer.z_proj.weight", f"{layer}.attn.g_proj.weight"


def repeated(rows: torch.Tensor, heads: int, times: int) -> torch.Tensor:
    """Repeats every head of `rows` `[heads * size, ...]` for `times` consecutive heads."""
    return rows.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)


def first_of(rows: torch.Tensor, heads: int, times: int) -> torch.Tensor:
    """The inverse of `repeated`."""
    return rows.unflatten(0, (heads, times, -1))[:, 0].flatten(0, 1)


def to_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the HAM."""
    heads = source.num_heads
    repeat = partial(repeated, heads=heads, times=config.num_attention_heads // heads)

    def joined_convolution(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([repeat(q), repeat(k), v]).squeeze(1)

    for name, source_name in shared_names(config):
        yield copied(name, source_name)
    for i in range(config.num_hidden_layers):
        mixer, rnn = f"model.layers.{i}.mixer", f"model.layers.{i}.attn"
        yield TensorRule(f"{mixer}.q_proj.weight", (f"{rnn}.q_proj.weight",), repeat)
        yield TensorRule(f"{mixer}.k_proj.weight", (f"{rnn}.k_proj.weight",), repeat)
        convolutions = tuple(f"{rnn}.{x}_conv1d.weight" for x in "qkv")
        yield TensorRule(f"{mixer}.conv.weight", convolutions, joined_convolution)
        yield doubled(f"{mixer}.o_proj.weight", f"{rnn}.o_proj.weight")
        yield from new_attention(mixer, config)


def from_ham(source: Any, config: HAMConfig) -> Iterator[TensorRule]:
    """Rules for every tensor of the source."""
    heads = source.num_heads
    first = partial(first_of, heads=heads, times=config.num_attention_heads // heads)

    def convolution(n: int, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.split(config.layer_shape("hybrid").channels)[n].unsqueeze(1)
        return rows if n == 2 else first(rows)

    for name, source_name in shared_names(config):
        yield copied(source_name, name)
    for i in range(config.num_hidden_layers):
        mixer, rnn = f"model.layers.{i}.mixer", f"model.layers.{i}.attn"
        yield TensorRule(f"{rnn}.q_proj.weight", (f"{mixer}.q_proj.weight",), first)
        yield TensorRule(f"{rnn}.k_proj.weight", (f"{mixer}.k_proj.weight",), first)
        for n, x in enumerate("qkv"):
            yield TensorRule(f"{rnn}.{x}_conv1d.weight", (f"{mixer}.conv.weight",), partial(convolution, n))
        yield halved(f"{rnn}.o_proj.weight", f"{mixer}.o_proj.weight")


def requirements(source: Any, config: HAMConfig) -> Iterator[Requirement]:
    """Requirements on a HAM for the way back."""
    heads, times = source.num_heads, config.num_attention_heads // source.num_heads

    def rows_equal(rows: torch.Tensor) -> bool:
        return torch.equal(repeated(first_of(rows, heads, times), heads, times), rows)

    def convolution_equal(weight: torch.Tensor) -> bool:
        q, k, _ = weight.split(config.layer_shape("hybrid").channels)
        return rows_equal(q) and rows_equal(k)

    differs = f"no longer has equal rows for the {times} heads of values that share a key in the source"
    for i in range(config.num_hidden_layers):
        mixer = f"model.layers.{i}.mixer"
        yield from shut_attention(mixer)
        yield Requirement(f"{mixer}.q_proj.weight", rows_equal, differs)
        yield Requirement(f"{mixer}.k_proj.weight", rows_equal, differs)
        yield Requirement(f"{mixer}.conv.weight", convolution_equal, differs)


def fla_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, vocabulary]` in float32 by fla's classes and its recurrent kernel, which is exact.

    fla's chunked kernel rounds to TF32 on a GPU, and does not run under Triton's interpreter.
    """
    from fla.models.gated_deltanet import GatedDeltaNetForCausalLM

    model = GatedDeltaNetForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_mode="fused_recurrent").eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        prepare_interpreter(model.config, tokens.shape[1])
    with torch.no_grad():
        return model.to(device)(input_ids=tokens.to(device), use_cache=False).logits.cpu()


def prepare_interpreter(config: Any, length: int) -> None:
    """Makes fla's kernels run without a GPU, and prints an estimate of the time."""
    from triton.runtime.autotuner import Autotuner

    # Without a GPU a kernel's configurations, which differ in speed only, cannot be timed: take the first one.
    Autotuner.do_bench = lambda self, kernel, quantiles: [0.0, 0.0, 0.0]
    blocks = -(-int(config.head_dim * config.expand_v) // VALUE_BLOCK)
    steps = VERIFIED_ROWS * length * config.num_hidden_layers * value_heads(config) * blocks
    print(
        f"  without a GPU, fla's kernels run under Triton's interpreter: about {steps * INTERPRETED_STEP / 60:.1f} "
        "minutes, less with fewer --verify-tokens",
        flush=True,
    )


def source_code(architecture: str) -> str:
    """Name of the code that computed the logits that the HAM's are compared with."""
    import fla

    how = "on a GPU" if torch.cuda.is_available() else "under Triton's interpreter"
    return f"{architecture} of flash-linear-attention {fla.__version__}, its recurrent kernel {how}"


CONVERSION = Conversion(
    script="convert_gated_deltanet_to_ham.py",
    model_types=("gated_deltanet",),
    ham_config=ham_config,
    to_ham=to_ham,
    from_ham=from_ham,
    requirements=requirements,
    inert=INERT_ATTENTION,
    prepare=import_fla,
    logits=fla_logits,
    source_code=source_code,
    summary="The RNN of every layer is the source's; the attention beside it is new, keeps no token and is shut.",
)

if __name__ == "__main__":
    sys.exit(main(CONVERSION, __doc__))
