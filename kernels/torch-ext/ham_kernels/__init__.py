# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of Hybrid Associative Memories (arXiv 2603.22325): one file or folder for each op."""

from .compact import compact_kept
from .decode_mix_append import decode_mix_append
from .decode_update import decode_update
from .gated_delta_rule import gated_delta_rule_with_prediction
from .ragged_decode_attention import ragged_decode_attention, slab_table
from .sparse_prefix_attention import sparse_prefix_attention
from .tuning import INTERFACE, check_platform, platform_problem

__all__ = [
    "INTERFACE",
    "check_platform",
    "compact_kept",
    "decode_mix_append",
    "decode_update",
    "gated_delta_rule_with_prediction",
    "platform_problem",
    "ragged_decode_attention",
    "slab_table",
    "sparse_prefix_attention",
]
