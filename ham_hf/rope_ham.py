# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The check of a configuration's rotary position embedding."""

from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Parameters that each type of RoPE computes its frequencies from, besides the base.
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
# Smallest value of each number among them. Above the largest, its powers overflow.
ROPE_SMALLEST = {
    "factor": 1,
    "original_max_position_embeddings": 2,
    "attention_factor": 0,
    "beta_fast": 1e-6,
    "beta_slow": 1e-6,
    "low_freq_factor": 1e-6,
    "high_freq_factor": 1e-6,
    "mscale": 0,
    "mscale_all_dim": 0,
}
ROPE_LARGEST = 1e15


def check_rope(parameters: Mapping[str, Any], head_dim: int) -> None:
    """Raises `ValueError` unless `parameters` are rotary position embeddings for heads of `head_dim` dimensions."""
    given = dict(parameters)
    rope_type, theta = given.get("rope_type"), given.get("rope_theta")
    rope_types = ("default", *ROPE_INIT_FUNCTIONS)
    if rope_type not in rope_types:
        raise ValueError(f"`rope_parameters['rope_type']` must be one of {rope_types}, got {rope_type!r}.")
    _check_number("rope_theta", theta, 1)
    if rope_type == "yarn" and theta == 1:
        raise ValueError("`rope_parameters['rope_theta']` must be more than 1 with the type 'yarn', got 1.")
    if rope_type == "dynamic" and head_dim == 2:
        raise ValueError("`head_dim` must be more than 2 with RoPE of the type 'dynamic', got 2.")
    for name in ROPE_NEEDS.get(rope_type, ()):
        if given.get(name) is None:
            raise ValueError(f"`rope_parameters['{name}']` must be given with the type {rope_type!r}.")
    for name, smallest in ROPE_SMALLEST.items():
        if given.get(name) is not None:
            _check_number(name, given[name], smallest)
    if head_dim % 2:
        raise ValueError(f"RoPE needs an even `head_dim`, got {head_dim}; or set `rope_parameters=None`.")
    partial = given.get("partial_rotary_factor", 1.0)
    _check_partial_factor(partial, rope_type, head_dim)
    for name in ("short_factor", "long_factor"):
        if given.get(name) is not None:
            _check_factors(name, given[name], int(head_dim * partial) // 2)


def _check_partial_factor(factor: Any, rope_type: str, head_dim: int) -> None:
    name = "`rope_parameters['partial_rotary_factor']`"
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, got {factor!r}.")
    rotary_dim = int(head_dim * factor)
    # "proportional" stretches the frequencies over whole heads itself.
    if rope_type != "proportional" and (rotary_dim % 2 or not rotary_dim):
        raise ValueError(
            f"{name} times `head_dim` ({head_dim}) must be an even number of dimensions, at least 2, got "
            f"{rotary_dim} with {factor}."
        )


def _check_number(name: str, value: Any, smallest: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not smallest <= value <= ROPE_LARGEST:
        raise ValueError(
            f"`rope_parameters['{name}']` must be a number between {smallest} and {ROPE_LARGEST}, got {value!r}."
        )


def _check_factors(name: str, factors: Any, rotated: int) -> None:
    if not isinstance(factors, list) or len(factors) != rotated:
        raise ValueError(f"`rope_parameters['{name}']` must be a list of {rotated} numbers, got {factors!r}.")
    for factor in factors:
        _check_number(name, factor, 1e-6)


__all__ = ["check_rope"]
