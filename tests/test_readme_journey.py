# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The README's way from a Transformer on disk to a HAM on the Hub and back, every command as it stands there."""


