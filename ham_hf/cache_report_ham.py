# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The report of a cache: what it has seen, what it holds, and the bytes of both, as text."""

from collections.abc import Sequence

import torch

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def unit_of(size: int) -> tuple[str, int]:
    """The largest unit of which `size` bytes hold at least one, and its bytes."""
    return next(((name, unit) for name, unit in UNITS if size >= unit), ("bytes", 1))


def size_in_words(size: int) -> str:
    """Bytes in the unit that suits them."""
    name, unit = unit_of(size)
    return f"{size / unit:,.1f} {name}" if unit > 1 else f"{size} {name}"


def shares_in_words(shares: torch.Tensor) -> str:
    """The mean of fractions `[...]`, and their range."""
    return f"{shares.mean().item():.1%} (from {shares.min().item():.1%} to {shares.max().item():.1%} by head)"


def cache_report(
    real_tokens: torch.Tensor,
    layer_types: Sequence[str],
    usage: torch.Tensor,
    held_bytes: int,
    state_bytes: int,
    full_kv_bytes: int,
    layer_bytes: Sequence[int],
) -> str:
    """The text of a report.

    Args:
        real_tokens: `[B]` tokens that each row has seen, without padding.
        layer_types: the kind of each layer.
        usage: `[layers, B, Hk]` fractions of them in memory.
        held_bytes: bytes that the cache has allocated; state_bytes: those of states, part of them.
        full_kv_bytes: bytes of keys and values of all tokens.
        layer_bytes: bytes that each layer has allocated.
    """
    attends = [i for i, kind in enumerate(layer_types) if kind != "linear_attention"]
    fewest, most = int(real_tokens.min()), int(real_tokens.max())
    seen = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    lines = [f"rows: {len(real_tokens)}, each of {seen} tokens"]
    if attends:
        lines.append(f"held: {shares_in_words(usage[attends])}")
    lines.append(f"memory: {size_in_words(held_bytes)}, {size_in_words(state_bytes)} of them states")
    if full_kv_bytes:
        lines.append(f"keys and values of all tokens: {size_in_words(full_kv_bytes)}")
    width = max(len(kind) for kind in layer_types)
    for i, (kind, size) in enumerate(zip(layer_types, layer_bytes, strict=True)):
        held = f", held {shares_in_words(usage[i])}" if i in attends else ""
        lines.append(f"layer {i:>2}  {kind:<{width}}  {size_in_words(size)}{held}")
    return "\n".join(lines)


__all__ = ["cache_report", "size_in_words", "unit_of"]
