# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Tools that build the data, the tokenizer and the weights of the small embedded checkpoint."""
