# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The file of a HAMCache: its format, and checks that run before memory is allocated for its contents."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .configuration_ham import LINEAR_SHAPE, HAMConfig
from .files_ham import whole_file

FILE_FORMAT, FILE_VERSION = "ham_cache", "2"
# Configuration fields that, with tokens and weights, determine the contents of a cache.
CONTENT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "value_head_dim",
    *LINEAR_SHAPE,
    "conv_kernel_size",
    "attention_conv",
    "rope_parameters",
    "rms_norm_eps",
    "qk_norm",
    "rnn_output_norm",
    "kv_output_norm",
    "output_norm_eps",
    "zero_centered_norms",
    "attention_post_norm",
    "output_gate",
    "linear_output_gate",
    "allow_neg_eigval",
    "attention_bias",
    "mlp_bias",
    "router",
    "router_hidden_size",
    "attention_window",
    "attention_sinks",
)
# Fields that older files lack, with the values by which their models computed.
NEWER_FIELDS = {"attention_window": 0, "attention_sinks": 0}
# Number of values that a fingerprint reads from each parameter.
SAMPLES = 8


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests of a few values of each parameter, by name; they tell apart two models of one configuration.

    A parameter whose values cannot be read (offloaded, quantised, sharded) has an empty digest, which matches any.
    """
    digests = {}
    for name, x in model.named_parameters():
        plain = type(x.data) is torch.Tensor and x.is_floating_point() and not x.is_meta
        digests[name] = _digest_of_sample(x.detach().flatten()) if plain else ""
    return digests


def _digest_of_sample(x: torch.Tensor) -> str:
    index = torch.linspace(0, len(x) - 1, SAMPLES, dtype=torch.float64, device="cpu").long().to(x.device)
    return hashlib.sha256(x[index].float().cpu().numpy().tobytes()).hexdigest()[:16]


def check_same_model(argument: str, known: dict[str, str], found: dict[str, str]) -> None:
    """Raises `ValueError` unless both fingerprints belong to one model."""
    different = sorted(name for name in known.keys() & found.keys() if "" not in (known[name], found[name]))
    different = [name for name in different if known[name] != found[name]] or sorted(known.keys() ^ found.keys())
    if different:
        raise ValueError(
            f"`{argument}` was filled by a model with other weights: {len(different)} parameters differ, such as "
            f"{different[0]!r}. Start with an empty cache, or use the model that filled it."
        )


def write_cache(
    path: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    config: HAMConfig,
    seen_tokens: int,
    model: dict[str, str] | None,
) -> None:
    """Writes the file of a cache, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        tensors: contiguous tensors by name.
        config: the configuration of the model that filled the cache.
        seen_tokens: tokens seen, padding included.
        model: the model's fingerprint, `None` if it is not known.

    Raises:
        OSError: if the file cannot be written; it names `path`.
    """
    metadata = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "seen_tokens": str(seen_tokens),
        "config": json.dumps(cache_contents(config)),
        "model": json.dumps(model),
    }
    metadata["checksum"] = checksum(tensors, metadata)
    with whole_file(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of a file's tensors, their names, dtypes and shapes, and the file's other metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_cache(
    path: str | os.PathLike, config: HAMConfig, device: torch.device
) -> tuple[int, dict[str, str] | None, dict[str, torch.Tensor]]:
    """Reads a cache file for a model of `config`; returns tokens seen, the model's fingerprint or `None`, and tensors.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is damaged or not a cache, or if its version or the model's configuration differs.
    """
    path = os.fspath(path)
    not_a_cache = f"`path` {path!r} is not a cache written by `HAMCache.save`"
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "A cache is a file, not a folder", path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise ValueError(f"{not_a_cache}.")
            if metadata.get("version") != FILE_VERSION:
                raise ValueError(
                    f"`path` {path!r} is a cache of format version {metadata.get('version', '1')!r}, this release "
                    f"reads {FILE_VERSION!r}: fill a new cache."
                )
            recorded = metadata.pop("checksum", None)
            seen_tokens, contents, known = _check_metadata(not_a_cache, metadata)
            check_same_contents("path", contents, config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{not_a_cache}, or is not whole: {error}.") from error
    if foreign := [name for name in tensors if not _names_a_part(name, config)]:
        raise ValueError(f"`path` {path!r} holds {foreign[0]!r}, which belongs to no layer.")
    if recorded != checksum(tensors, metadata):
        raise ValueError(f"`path` {path!r} is damaged: its checksum does not match its contents.")
    return seen_tokens, known, {name: x.to(device) for name, x in tensors.items()}


def _names_a_part(name: str, config: HAMConfig) -> bool:
    return name == "padding" or name.startswith(tuple(f"{i}." for i in range(config.num_hidden_layers)))


def _check_metadata(not_a_cache: str, metadata: dict[str, str]) -> tuple[int, dict[str, Any], dict[str, str] | None]:
    """Tokens seen, configuration fields and the model's fingerprint; raises `ValueError` if they are invalid."""
    try:
        contents, known = json.loads(metadata.get("config", "")), json.loads(metadata.get("model", ""))
        seen_tokens = int(metadata.get("seen_tokens", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{not_a_cache}, or is damaged: {error}.") from error
    named = known is None or (isinstance(known, dict) and all(isinstance(x, str) for x in known.values()))
    if not isinstance(contents, dict) or not named or not 0 <= seen_tokens <= torch.iinfo(torch.int32).max:
        raise ValueError(f"{not_a_cache}, or is damaged: configuration {contents!r} and {seen_tokens} tokens seen.")
    return seen_tokens, contents, known


def check_saved_layer(
    where: str, state: dict[str, torch.Tensor], config: HAMConfig, layer_idx: int, seen_tokens: int
) -> None:
    """Checks a saved layer's `state_dict` before memory is allocated for it.

    Raises:
        ValueError: names `where` and the tensor that is missing, unexpected, of a wrong shape or dtype, or
            contradicts others.
    """
    layer_type, recent = config.layer_types[layer_idx], config.window_of(layer_idx) - 1
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
    if recent > 0:
        streams, of_keys = batch * heads, expected["values"][1]
        expected |= {
            "recent_keys": ((streams, recent, key_dim), of_keys),
            "recent_values": ((streams, recent, value_dim), of_keys),
            "recent_scores": ((streams, recent), (torch.float32,)),
            "recent_keep": ((streams, recent), (torch.bool,)),
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
    for name in ("recurrent_state", "conv_state", "keys", "values", "recent_keys", "recent_values"):
        if name in state and not bool(state[name].isfinite().all()):
            raise ValueError(f"{where}: `{name}` must be finite.")
    for name in ("scores", "recent_scores"):
        # Sinks have infinite scores.
        scores = state.get(name, torch.zeros(0))
        if not bool(((scores >= 0) & ((scores <= 1) | (scores == torch.inf))).all()):
            raise ValueError(f"{where}: `{name}` must be between 0 and 1, or infinite for sinks.")
    real = state["real_tokens"]
    if batch == 0 or bool(((real < 0) | (real > seen_tokens)).any()):
        raise ValueError(f"{where}: `real_tokens` must be between 0 and {seen_tokens}, one for each row.")
    if layer_type != "linear_attention":
        # Tokens in the window are not in pages yet.
        of_age = (real - max(recent, 0)).clamp(min=0).repeat_interleave(heads)
        _check_saved_tokens(where, state, of_age, keeps_all=layer_type == "full_attention")


def _check_saved_tokens(where: str, state: dict[str, torch.Tensor], seen: torch.Tensor, keeps_all: bool) -> None:
    """Raises `ValueError` unless each stream has as many of its first `seen` `[N]` tokens as counted, in order."""
    counts, streams, positions = state["counts"], state["streams"], state["positions"]
    fits = counts == seen if keeps_all else (counts >= 0) & (counts <= seen)
    # Compare the sum before `repeat_interleave` allocates memory for the counted tokens.
    fits = fits.all() and counts.sum() == len(streams)
    if not fits or not torch.equal(streams, torch.repeat_interleave(counts)):
        raise ValueError(f"{where}: `counts`, `streams` and `real_tokens` contradict each other.")
    follows = streams[1:] == streams[:-1]
    in_order = (positions[1:] > positions[:-1]) | ~follows
    if not in_order.all() or bool(((positions < 0) | (positions >= seen[streams])).any()):
        raise ValueError(f"{where}: `positions` must rise within each stream, and be those of real tokens.")


def check_saved_padding(where: str, padding: torch.Tensor | None, real_tokens: torch.Tensor, seen_tokens: int) -> None:
    """Raises `ValueError` unless `padding` `[B, n]` bool agrees with the number of real tokens `[B]` of each row."""
    if padding is None:
        fits = bool((real_tokens == seen_tokens).all())
    else:
        fits = padding.dtype == torch.bool and padding.ndim == 2 and len(padding) == len(real_tokens)
        fits = fits and padding.shape[1] <= seen_tokens
        fits = fits and torch.equal(seen_tokens - padding.sum(1), real_tokens)
    if not fits:
        raise ValueError(f"{where}: `padding` and `real_tokens` contradict each other.")


def cache_contents(config: HAMConfig) -> dict[str, Any]:
    """The fields that two models must share, besides their weights, for one to read the other's cache."""
    return {name: getattr(config, name) for name in CONTENT_FIELDS}


def check_same_contents(argument: str, contents: dict[str, Any], config: HAMConfig) -> None:
    """Raises `ValueError` if a cache with these `contents`, given as `argument`, does not fit a model of `config`."""
    contents, expected = NEWER_FIELDS | contents, cache_contents(config)
    wrong = [
        f"`{name}` {contents.get(name)} instead of {expected[name]}"
        for name in CONTENT_FIELDS
        if contents.get(name) != expected[name]
    ]
    if wrong:
        raise ValueError(f"`{argument}` gives the cache of a model of another configuration: {', '.join(wrong)}.")
