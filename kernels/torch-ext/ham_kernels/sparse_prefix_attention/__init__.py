# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Attention of each query over a span of compacted kept tokens, a window and itself, forward and backward.

The tiles are FlashAttention-2's (arXiv 2307.08691); the mask differs. Query `t` sees the columns
`begin[t] <= c < end[t]` of its head, so a tile of queries visits `end - begin` columns instead of `t`, for any pattern
of kept tokens. It also sees its own key and value, which start the online softmax. `begin` and `end` never fall along
`T`, so the first and last query of a tile determine which columns all of its queries see; only the other tiles of
columns are masked. A window is a second loop of the same steps, over the tokens' own keys and values; its bounds never
fall along `T` either. All query heads of a key/value head share its tiles: the rows of a tile are pairs of a query and
a head of the group.
"""

from .forward import sparse_prefix_attention_fwd
from .op import sparse_prefix_attention

__all__ = ["sparse_prefix_attention", "sparse_prefix_attention_fwd"]
