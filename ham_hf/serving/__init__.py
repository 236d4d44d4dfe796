# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Serving HAM models to many clients at once."""
