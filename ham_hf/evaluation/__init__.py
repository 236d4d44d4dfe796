# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measurements of a HAM: calibration of its scores, and loss and cache bytes against usage."""

from .calibration import calibrate

__all__ = ["calibrate"]
