# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Losses of a causal language model on windows of text, token by token, and the bytes that its cache holds."""

import inspect
import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel

from ..cache_ham import HAMCache

# Part of a window that is repeated at its end to measure recall.
REPEATED = 1 / 8
# Equal parts of a window whose losses are told apart.
PARTS = 8
# Tokens that must have occurred in this order before, for the last of them to count as repeated.
GRAM = 3


class WindowFigures(NamedTuple):
    """What a model made of one window of T tokens.

    Attributes:
        loss: mean loss of all tokens but the first (nats per token).
        second_time: that of the end of the window, after replacing the last eighth by a copy of the first, without
            the first token of the copy, which nothing announces.
        first, repeated: that of the tokens that `repeated_tokens` tells apart; `None` where there are none.
        parts: that of each eighth of the window.
        kept: fraction of the tokens that the router kept, mean over layers and heads; `None` of a model that is no
            HAM, or whose layers have no attention.
        held: fraction of the tokens in memory, those of a window and sinks included; `None` as before.
        kv_bytes: bytes that keys and values of the window take; `None` if the model returns no cache.
        full_kv_bytes: bytes that all tokens' keys and values would take.
        state_bytes: bytes of what does not grow with the window.
    """

    loss: float
    second_time: float
    first: float | None
    repeated: float | None
    parts: list[float]
    kept: float | None
    held: float | None
    kv_bytes: int | None
    full_kv_bytes: int | None
    state_bytes: int | None


def repeated_size(length: int) -> int:
    """Number of tokens at the end of a window of `length` that `with_repeated_end` replaces."""
    return int(length * REPEATED)


def with_repeated_end(tokens: torch.Tensor) -> torch.Tensor:
    """`tokens` `[B, T]` with a copy of the first eighth in place of the last one."""
    size = repeated_size(tokens.shape[1])
    return torch.cat([tokens[:, :-size], tokens[:, :size]], dim=1)


def repeated_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """`[B, T]` bool: the token and the two before it have occurred in this order earlier in its row `[B, T]`.

    A model that remembers can look such tokens up, after the "associative recall hits" of Zoology (arXiv 2312.04927),
    which are pairs that are rare in training; three tokens need no count of the training data.
    """
    repeated = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(GRAM, len(ids) + 1):
            gram = tuple(ids[end - GRAM : end])
            repeated[row, end - 1] = gram in seen
            seen.add(gram)
    return repeated


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, tokens: torch.Tensor, last: int = 0, **memory: Any
) -> tuple[torch.Tensor, Any]:
    """The loss of each token given those before it.

    Args:
        model: a causal language model.
        tokens: `[B, T]` ids, on any device.
        last: return the last so many alone; 0 returns all T - 1, as nothing predicts the first token.
        memory: further arguments of the model's call.

    Returns:
        `[B, T - 1]` or `[B, last]` float32 losses on the CPU (nats), and the model's outputs.
    """
    count = last or tokens.shape[1] - 1
    ids = tokens.to(model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        memory["logits_to_keep"] = count + 1
    outputs = model(input_ids=ids, **memory)
    # A row at a time: float32 logits of a whole batch may be larger than the model.
    losses = [
        F.cross_entropy(x[-count - 1 : -1].float(), y[-count:], reduction="none")
        for x, y in zip(outputs.logits, ids, strict=True)
    ]
    return torch.stack(losses).cpu(), outputs


def window_figures(model: PreTrainedModel, tokens: torch.Tensor, **memory: Any) -> list[WindowFigures]:
    """Measures `[B, T]` windows that the model reads in one call each.

    Args:
        model: a causal language model; a HAM also tells what it keeps.
        tokens: int64 ids without padding.
        memory: `threshold`, `kv_usage` and `kv_budget` of a HAM.

    Raises:
        ValueError: if a window is too short to repeat two tokens of it.
    """
    size = repeated_size(tokens.shape[1])
    if size < 2:
        raise ValueError(f"`tokens` must have windows of at least {int(2 / REPEATED)}, got {tokens.shape[1]}.")
    second_time, _ = token_losses(model, with_repeated_end(tokens), size - 1, use_cache=False, **memory)
    losses, outputs = token_losses(model, tokens, use_cache=True, **memory)
    repeated = repeated_tokens(tokens.cpu())[:, 1:]
    usage = usage_of(cache_of(outputs), len(tokens))
    return [
        WindowFigures(
            loss=x.mean().item(),
            second_time=again.mean().item(),
            first=mean_or_none(x[~mask]),
            repeated=mean_or_none(x[mask]),
            parts=[part.mean().item() for part in x.tensor_split(PARTS)],
            **figures,
        )
        for x, again, mask, figures in zip(losses, second_time, repeated, usage, strict=True)
    ]


def mean_or_none(losses: torch.Tensor) -> float | None:
    """The mean, or `None` of nothing."""
    return losses.mean().item() if len(losses) else None


def cache_of(outputs: Any) -> Any:
    """The cache that a model returned under one of Transformers' names, or `None`."""
    for name in ("cache", "past_key_values", "cache_params"):
        if outputs.get(name) is not None:
            return outputs[name]
    return None


def usage_of(cache: Any, rows: int) -> list[dict[str, Any]]:
    """The fields of `WindowFigures` from `kept` on, for each row of a batch; bytes are shared evenly."""
    if not isinstance(cache, HAMCache):
        of_keys, of_states = cache_bytes(cache)
        nothing = {"kept": None, "held": None, "full_kv_bytes": None}
        share = {"kv_bytes": of_keys and of_keys // rows, "state_bytes": of_states and of_states // rows}
        return [nothing | share for _ in range(rows)]
    attends = [i for i, kind in enumerate(cache.config.layer_types) if kind != "linear_attention"]
    kept: list[float | None] = [None] * rows
    held = kept
    if attends:
        assert cache.real_tokens is not None, "a model has filled the cache"
        seen = cache.real_tokens.cpu()
        kept, held = (
            (x[attends].float().mean((0, 2)) / seen).tolist() for x in (cache.kept_tokens(), cache.held_tokens())
        )
    sizes = {
        "kv_bytes": (cache.memory_bytes() - cache.state_bytes()) // rows,
        "full_kv_bytes": cache.full_kv_bytes() // rows,
        "state_bytes": cache.state_bytes() // rows,
    }
    return [{"kept": x, "held": y, **sizes} for x, y in zip(kept, held, strict=True)]


def cache_bytes(cache: Any) -> tuple[int | None, int | None]:
    """Bytes of the keys and values, and of every other tensor, in a cache of Transformers; `None` for another kind."""
    if not isinstance(cache, Cache):
        return None, None
    of_keys = of_states = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            # Some layers hold several states by their number.
            tensors = value.values() if isinstance(value, dict) else [value]
            size = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
            if name in ("keys", "values"):
                of_keys += size
            else:
                of_states += size
    return of_keys, of_states


def summary(windows: list[WindowFigures]) -> dict[str, Any]:
    """The means of all windows, and the `losses` of each, as `usage.json` holds them.

    The losses of first and of repeated tokens are means over the windows that have such tokens.
    """

    def mean(name: str) -> float | None:
        values = [getattr(x, name) for x in windows if getattr(x, name) is not None]
        return statistics.mean(values) if values else None

    def whole(name: str) -> int | None:
        value = mean(name)
        return None if value is None else round(value)

    return {
        "usage": mean("kept"),
        "held": mean("held"),
        "loss": mean("loss"),
        "losses": [x.loss for x in windows],
        "recall_loss": mean("second_time"),
        "first_loss": mean("first"),
        "repeated_loss": mean("repeated"),
        "losses_by_part": [statistics.mean(part) for part in zip(*(x.parts for x in windows), strict=True)],
        "kv_bytes": whole("kv_bytes"),
        "full_kv_bytes": whole("full_kv_bytes"),
        "state_bytes": whole("state_bytes"),
    }
