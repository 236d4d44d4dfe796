# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The studies of the paper's claims on models that a CPU can train: recall, routers, language and needles."""
