# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Runs a HAM on one prompt at one setting of its cache, and measures its usage, memory, speed and loss."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..cache_ham import HAMCache

# A prompt is read in pieces of this many tokens, so that only the logits of one piece are held at once.
PREFILL_TOKENS = 1024


@dataclass(frozen=True)
class Setting:
    """One rule for the tokens that the cache keeps.

    Attributes:
        name: `"threshold"`, `"kv_usage"` or, for the checkpoint's own thresholds, `"learned"`.
        value: the number asked for; `None` for the checkpoint's own thresholds.
        kv_budget: tokens that a head may keep, or `None`.
    """

    name: str = "learned"
    value: float | None = None
    kv_budget: int | None = None

    @property
    def label(self) -> str:
        """The value as a table shows it."""
        return "learned" if self.value is None else f"{self.value:g}"

    @property
    def title(self) -> str:
        """The whole setting, as a heading shows it."""
        title = "learned thresholds" if self.value is None else f"{self.name.replace('_', '-')} {self.label}"
        return title if self.kv_budget is None else f"{title}, kv-budget {self.kv_budget}"

    def arguments(self) -> dict[str, Any]:
        """The setting as keyword arguments of the model."""
        arguments = {self.name: self.value, "kv_budget": self.kv_budget}
        return {name: value for name, value in arguments.items() if value is not None}


@dataclass(frozen=True)
class Run:
    """Measurements of one run.

    Attributes:
        setting: the run's rule for kept tokens.
        tokens_seen: tokens the cache has read.
        held_per_head: tokens in memory, the mean over the heads of every layer with attention.
        usage_by_layer: fraction held by each layer with attention, the mean over its heads.
        usage: fraction held by all of them.
        kept: fraction that their routers kept, without tokens that are held only while they are in the window.
        kv_bytes: bytes allocated for the held tokens.
        full_kv_bytes: bytes of the keys and values of every token seen.
        state_bytes: bytes of the states of fixed size.
        tokens_per_second: speed of the continuation.
        loss: mean negative log-likelihood (nats per token) of the prompt's second half, if it was scored.
        prompt_heads: for each token of the prompt, the number of heads of the hybrid layers that hold it.
    """

    setting: Setting
    tokens_seen: int
    held_per_head: float
    usage_by_layer: list[float]
    usage: float
    kept: float
    kv_bytes: int
    full_kv_bytes: int
    state_bytes: int
    tokens_per_second: float
    loss: float | None
    prompt_heads: list[int]


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, cache: HAMCache, setting: Setting, score: bool = False) -> float | None:
    """Reads all of `ids` `[1, T]` but the last token into `cache`.

    Returns:
        The mean negative log-likelihood (nats per token) of the second half of `ids` if `score`, else `None`.
    """
    length, first_scored = ids.shape[1], max(1, ids.shape[1] // 2)
    total = 0.0
    for start in range(0, length - 1, PREFILL_TOKENS):
        end = min(start + PREFILL_TOKENS, length - 1)
        # The logits at position `i` predict token `i + 1`.
        scored = max(0, end - max(start, first_scored - 1)) if score else 0
        piece = ids[:, start:end]
        logits = model(piece, cache=cache, logits_to_keep=max(scored, 1), **setting.arguments()).logits
        if scored:
            targets = ids[0, end + 1 - scored : end + 1]
            total += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
    return total / (length - first_scored) if score else None


def run(
    model: Any, ids: torch.Tensor, setting: Setting, score: bool, seed: int, streamer: Any, **generation: Any
) -> Run:
    """Reads a prompt and continues it.

    Args:
        model: a `HAMForCausalLM`.
        ids: `[1, T]` int64 prompt on the model's device.
        setting: rule for the tokens that the cache keeps.
        score: True to measure the loss on the prompt's second half.
        seed: seed of the sampling, the same for every run.
        streamer: receives the new tokens, as in `generate`.
        generation: further arguments of `generate`.
    """
    cache = HAMCache(model.config)
    torch.manual_seed(seed)
    loss = prefill(model, ids, cache, setting, score)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        streamer=streamer,
        **setting.arguments(),
        **generation,
    )
    speed = (output.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
    return measure(cache, setting, ids.shape[1], speed, loss)


def measure(cache: HAMCache, setting: Setting, prompt_tokens: int, speed: float, loss: float | None) -> Run:
    """Reads the measurements of a run from its `cache`."""
    layers = [i for i, layer_type in enumerate(cache.config.layer_types or []) if layer_type != "linear_attention"]
    usage = cache.kv_usage()[layers]
    # As `kv_usage` divides, so that both are equal without a window.
    kept = cache.kept_tokens()[layers].float() / cache.get_seq_length()
    return Run(
        setting=setting,
        tokens_seen=cache.get_seq_length(),
        held_per_head=cache.held_tokens()[layers].float().mean().item(),
        usage_by_layer=usage.mean((1, 2)).tolist(),
        usage=usage.mean().item(),
        kept=kept.mean().item(),
        kv_bytes=cache.memory_bytes() - cache.state_bytes(),
        full_kv_bytes=cache.full_kv_bytes(),
        state_bytes=cache.state_bytes(),
        tokens_per_second=speed,
        loss=loss,
        prompt_heads=heads_that_kept(cache, prompt_tokens),
    )


def heads_that_kept(cache: HAMCache, num_tokens: int) -> list[int]:
    """For each of the first `num_tokens` tokens of the only row, the number of hybrid layers' heads that hold it."""
    heads = torch.zeros(num_tokens, dtype=torch.long)
    for layer_idx, layer_type in enumerate(cache.config.layer_types or []):
        if layer_type == "hybrid":
            positions = torch.cat(cache.kept_positions(layer_idx)[0]).long()
            heads += torch.bincount(positions[positions < num_tokens], minlength=num_tokens)
    return heads.tolist()
