# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The file of a HAMCache: its format, and the checks before memory is taken for what it holds."""

import json

import torch

from .configuration_ham import LINEAR_SHAPE, HAMConfig

FILE_FORMAT = "ham_cache"
# The fields of a configuration that decide the shapes of a cache.
SHAPE_FIELDS = (
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "value_head_dim",
    *LINEAR_SHAPE,
    "conv_kernel_size",
    "attention_conv",
)


def check_metadata(path: str, metadata: dict[str, str], config: HAMConfig) -> int:
    """Tokens seen, of a file that says to be a cache for a model of `config`; `ValueError` for any other."""
    not_a_cache = f"`path` {path!r} is not a cache written by `HAMCache.save`"
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"{not_a_cache}.")
    try:
        shape, seen_tokens = json.loads(metadata.get("shape", "")), int(metadata.get("seen_tokens", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{not_a_cache}, whole: {error}.") from error
    if not isinstance(shape, dict) or not 0 < seen_tokens <= torch.iinfo(torch.int32).max:
        raise ValueError(f"{not_a_cache}, whole: of shape {shape!r}, after {seen_tokens} tokens.")
    check_same_shape("path", shape, config)
    return seen_tokens


def check_saved_layer(
    where: str, state: dict[str, torch.Tensor], config: HAMConfig, layer_type: str, seen_tokens: int
) -> None:
    """Refuses what no layer gives as its `state_dict`, before memory is taken for it.

    Raises:
        ValueError: `where`, and which tensor is missing, too many, of another shape or dtype, or contradicts others.
    """
    layer_shape = config.layer_shape(layer_type)
    heads, key_dim, value_dim = layer_shape.value_heads, layer_shape.key_dim, layer_shape.value_dim
    batch = len(state["real_tokens"]) if "real_tokens" in state and state["real_tokens"].ndim else 0
    kept = len(state["streams"]) if "streams" in state and state["streams"].ndim else 0
    integer, floating = (torch.int64,), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {"real_tokens": ((batch,), integer)}
    if layer_type != "full_attention":
        expected["recurrent_state"] = (batch, heads, key_dim, value_dim), floating
    if layer_type != "full_attention" or config.attention_conv:
        expected["conv_state"] = (batch, config.conv_kernel_size - 1, sum(layer_shape.channels)), floating
    if layer_type != "linear_attention":
        expected |= {
            "counts": ((batch * heads,), integer),
            "keys": ((kept, key_dim), floating),
            "values": ((kept, value_dim), (state["keys"].dtype,) if "keys" in state else floating),
            "scores": ((kept,), (torch.float32,)),
            "positions": ((kept,), (torch.int32,)),
            "streams": ((kept,), integer),
        }
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            raise ValueError(f"{where}: `{name}` is {'missing' if name in expected else 'no part of it'}.")
        shape, dtypes = expected[name]
        if state[name].shape != shape or state[name].dtype not in dtypes:
            raise ValueError(
                f"{where}: `{name}` must be {list(shape)} of {' or '.join(map(str, dtypes))}, got "
                f"{list(state[name].shape)} of {state[name].dtype}."
            )
    real = state["real_tokens"]
    if batch == 0 or bool(((real < 0) | (real > seen_tokens)).any()):
        raise ValueError(f"{where}: `real_tokens` must be between 0 and {seen_tokens}, one for each row.")
    if layer_type != "linear_attention":
        _check_saved_tokens(where, state, real.repeat_interleave(heads), keeps_all=layer_type == "full_attention")


def _check_saved_tokens(where: str, state: dict[str, torch.Tensor], seen: torch.Tensor, keeps_all: bool) -> None:
    """`ValueError` unless the tokens of each stream are as many as counted, and in order; `seen` `[N]` per stream."""
    counts, streams, positions = state["counts"], state["streams"], state["positions"]
    fits = counts == seen if keeps_all else (counts >= 0) & (counts <= seen)
    # Only now may memory be taken for as many tokens as are counted.
    fits = fits.all() and counts.sum() == len(streams)
    if not fits or not torch.equal(streams, torch.repeat_interleave(counts)):
        raise ValueError(f"{where}: `counts`, `streams` and `real_tokens` contradict each other.")
    follows = streams[1:] == streams[:-1]
    in_order = (positions[1:] > positions[:-1]) | ~follows
    if not in_order.all() or bool(((positions < 0) | (positions >= seen[streams])).any()):
        raise ValueError(f"{where}: `positions` must rise within each stream, and be those of real tokens.")


def cache_shape(config: HAMConfig) -> dict:
    """What two models must share for one to read the other's cache."""
    return {name: getattr(config, name) for name in SHAPE_FIELDS}


def check_same_shape(argument: str, shape: dict, config: HAMConfig) -> None:
    """`ValueError` if the cache that `argument` gives, of a model of `shape`, does not fit a model of `config`."""
    expected = cache_shape(config)
    wrong = [
        f"`{name}` {shape.get(name)} instead of {expected[name]}"
        for name in SHAPE_FIELDS
        if shape.get(name) != expected[name]
    ]
    if wrong:
        raise ValueError(f"`{argument}` gives the cache of a model of another shape: {', '.join(wrong)}.")
