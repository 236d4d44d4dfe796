# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""From a checkpoint to the Hub: model cards and pushing."""
