# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads a text with a HAM and records, token by token, what its routers scored, kept and attended to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ..cache_ham import HAMCache
from .passages import Passage
from .runs import Setting


@dataclass(frozen=True)
class Reading:
    """What the hybrid layers did with `T` tokens of one text at one setting; every tensor is on the CPU.

    Attributes:
        setting: the rule for kept tokens, in words.
        router: `config.router`.
        texts: the tokens as text, `T` strings.
        first: position of the first of these tokens in the text.
        seen: tokens that the model has read, at least `first + T`.
        layers: numbers of the `L` hybrid layers.
        left_out: numbers and kinds of the other layers.
        windows, sinks: `attention_window` and `attention_sinks` of each hybrid layer.
        thresholds: `[L, Hk]` float32, the least score of a kept token.
        scores: `[L, T, Hk]` float32 routing scores.
        kept: `[L, T, Hk]` bool, the tokens that the router, the sinks and a budget left in the cache at the end.
        held: `[L, T, Hk]` bool, the tokens in memory at the end: kept ones and those still in the window.
        decay: `[L, T, Hk]` float32 `exp(g)`, the part of its state that the RNN carries over this token.
        query: position of the token whose attention was recorded, or `None`.
        attention: `[L, H, T]` float32 weights of this query, zero for tokens that it does not see, or `None`.
        visible: `[L, T, Hk]` bool, the tokens that this query sees, or `None`.
    """

    setting: str
    router: str
    texts: tuple[str, ...]
    first: int
    seen: int
    layers: tuple[int, ...]
    left_out: tuple[tuple[int, str], ...]
    windows: tuple[int, ...]
    sinks: tuple[int, ...]
    thresholds: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor
    held: torch.Tensor
    decay: torch.Tensor
    query: int | None = None
    attention: torch.Tensor | None = None
    visible: torch.Tensor | None = None

    @property
    def kept_share(self) -> torch.Tensor:
        """`[L, T]` float32 share of a layer's key/value heads that keep each token."""
        return self.kept.float().mean(-1)

    def part(self, start: int, stop: int) -> "Reading":
        """The tokens at positions `start` to `stop - 1`, to draw them larger.

        Raises:
            ValueError: if there is no such token here.
        """
        low, high = start - self.first, stop - self.first
        if not 0 <= low < high <= len(self.texts):
            end = self.first + len(self.texts)
            raise ValueError(f"`start` and `stop` must rise within {self.first} to {end}, got {start} and {stop}.")
        fields: dict[str, Any] = {
            name: getattr(self, name)[:, low:high] for name in ("scores", "kept", "held", "decay")
        }
        if self.attention is not None and self.visible is not None:
            fields |= {"attention": self.attention[..., low:high], "visible": self.visible[:, low:high]}
        return replace(self, texts=self.texts[low:high], first=start, **fields)


@torch.no_grad()
def read(
    model: Any,
    passage: Passage,
    *,
    threshold: float | list[float] | torch.Tensor | None = None,
    kv_usage: float | None = None,
    kv_budget: int | None = None,
    query: int | None = None,
) -> Reading:
    """Reads a passage once, and leaves nothing behind on the model.

    Memory grows linearly with the text: the attention of `query` is formed in a call of its own, with the tokens
    before it in the cache.

    Args:
        model: a `HAMForCausalLM` with at least one hybrid layer.
        passage: the text.
        threshold, kv_usage, kv_budget: as the model takes them, for its only row; by default its own thresholds.
        query: position of a token whose attention to record, or `None`.

    Raises:
        TypeError: if `model` is not a HAM, or an argument is of the wrong type.
        ValueError: for arguments that do not fit, and for `query` together with `kv_budget`: what has left the cache
            since can no longer be told.
    """
    layers = _hybrid_layers(model)
    length = passage.ids.shape[1]
    if query is not None and not 0 <= query < length:
        raise ValueError(f"`query` must be a position from 0 to {length - 1}, got {query}.")
    if query is not None and kv_budget is not None:
        raise ValueError("`query` cannot be combined with `kv_budget`: give one of them.")
    rule = {"threshold": threshold, "kv_usage": kv_usage, "kv_budget": kv_budget}
    ids = passage.ids.to(model.device)
    cache = HAMCache(model.config)
    # The query goes alone, so that its weights are one row and not a square.
    cuts = [0, length] if query is None else sorted({0, query, query + 1, length})
    scores, attentions = [], None
    with recorded_decays(model) as decays:
        for start, stop in pairwise(cuts):
            asked = {"output_attentions": True} if start == query else {}
            outputs = model(
                ids[:, start:stop], cache=cache, logits_to_keep=1, output_routing_scores=True, **rule, **asked
            )
            scores.append(torch.stack(outputs.routing_scores)[:, 0].float().cpu())
            attentions = outputs.attentions if asked else attentions
    config = model.config
    kept = _marked([cache.kept_positions(i)[0] for i in layers], length)
    windows = tuple(config.window_of(i) for i in layers)
    reading = Reading(
        setting=_in_words(threshold, kv_usage, kv_budget),
        router=config.router,
        texts=passage.texts,
        first=0,
        seen=length,
        layers=layers,
        left_out=tuple((i, x) for i, x in enumerate(config.layer_types) if x != "hybrid"),
        windows=windows,
        sinks=tuple(config.sinks_of(i) for i in layers),
        thresholds=_thresholds(model, layers, rule),
        scores=torch.cat(scores, 1),
        kept=kept,
        # A token that the next query would still see by its age is in memory.
        held=kept | _young(windows, length, length),
        decay=torch.stack([torch.cat(decays[i], 1)[0] for i in layers]),
    )
    if query is None:
        return reading
    return _with_attention(reading, query, [x for x in attentions or [] if x is not None], config.layer_types)


def _with_attention(reading: Reading, query: int, attentions: list[torch.Tensor], layer_types: list[str]) -> Reading:
    """Adds the weights `[1, H, 1, query + 1]` of each layer with attention."""
    with_attention = [i for i, layer_type in enumerate(layer_types) if layer_type != "linear_attention"]
    weights = torch.stack([attentions[with_attention.index(i)][0, :, 0].float().cpu() for i in reading.layers])
    visible = reading.kept | _young(reading.windows, query, len(reading.texts))
    visible[:, query] = True
    visible[:, query + 1 :] = False
    return replace(
        reading, query=query, attention=F.pad(weights, (0, len(reading.texts) - query - 1)), visible=visible
    )


def _hybrid_layers(model: Any) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "ham":
        raise TypeError(f"`model` must be a HAMForCausalLM, got {type(model).__name__}.")
    layers = tuple(i for i, layer_type in enumerate(model.config.layer_types) if layer_type == "hybrid")
    if not layers:
        raise ValueError("`model` must have a layer of type 'hybrid', got a model without one.")
    return layers


def _in_words(threshold: Any, kv_usage: float | None, kv_budget: int | None) -> str:
    if threshold is None:
        name = "learned" if kv_usage is None else "kv_usage"
        return Setting(name, kv_usage, kv_budget).title
    if isinstance(threshold, (list, tuple, torch.Tensor)):
        return "thresholds of each layer" if kv_budget is None else f"thresholds of each layer, kv-budget {kv_budget}"
    return Setting("threshold", threshold, kv_budget).title


def _thresholds(model: Any, layers: tuple[int, ...], rule: dict[str, Any]) -> torch.Tensor:
    rules = model.model.retention(1, **rule)
    heads = model.config.num_key_value_heads
    in_force = [model.model.layers[i].mixer.threshold_in_force(rules[i].threshold, model.device) for i in layers]
    return torch.stack([x[0].expand(heads).float().cpu() for x in in_force])


def _marked(positions: list[list[torch.Tensor]], length: int) -> torch.Tensor:
    """`[L, T, Hk]` bool, true at the positions of each layer and head."""
    marks = torch.zeros(len(positions), length, len(positions[0]), dtype=torch.bool)
    for layer, heads in enumerate(positions):
        for head, kept in enumerate(heads):
            marks[layer, kept.long(), head] = True
    return marks


def _young(windows: tuple[int, ...], query: int, length: int) -> torch.Tensor:
    """`[L, T, 1]` bool, the tokens before `query` that it sees by their age alone."""
    age = query - torch.arange(length)
    return torch.stack([(age > 0) & (age < window) for window in windows])[..., None]


@contextmanager
def recorded_decays(model: Any) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Records the RNN's decays, which no output has, while the block runs.

    Yields:
        For the number of each hybrid layer, `exp(g)` `[B, T, Hk]` of every call, float32 on the CPU.
    """
    mixers = [layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]
    decays: dict[int, list[torch.Tensor]] = {mixer.layer_idx: [] for mixer in mixers}

    def record(mixer: Any, module: Any, args: Any, out: torch.Tensor) -> None:
        g = -mixer.A_log.float().exp() * F.softplus(out.float() + mixer.dt_bias.float())
        decays[mixer.layer_idx].append(g.exp().cpu())

    handles = [mixer.a_proj.register_forward_hook(partial(record, mixer)) for mixer in mixers]
    try:
        yield decays
    finally:
        for handle in handles:
            handle.remove()
