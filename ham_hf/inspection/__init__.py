# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures the tokens that a HAM keeps while it generates, and draws them on a terminal."""
