# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Conversion of other checkpoints to HAMs and back; each script of `conversion_scripts` declares one kind."""
