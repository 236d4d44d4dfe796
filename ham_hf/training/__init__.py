# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Training: recipes and `ham-hf train`, control of the usage, distillation, LoRA."""
