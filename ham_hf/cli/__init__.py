# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The command `ham-hf`: one file per command, which imports PyTorch only when it needs to compute."""

from .main import build_parser, main

__all__ = ["build_parser", "main"]
