# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Publishing a checkpoint: what it says of itself, its model card, and the push to the Hub."""
