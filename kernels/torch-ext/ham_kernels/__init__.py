# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of Hybrid Associative Memories (arXiv 2603.22325): one file an op, each op's function named here."""

from .tuning import check_platform, platform_problem

__all__ = [
    "check_platform",
    "platform_problem",
]
