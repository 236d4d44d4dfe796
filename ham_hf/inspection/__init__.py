# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What a HAM model keeps while it generates, measured and drawn for a terminal."""
