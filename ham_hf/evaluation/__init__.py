# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measuring a HAM: calibration of its scores, loss against usage, speed and memory."""

from .calibration import calibrate

__all__ = ["calibrate"]
