# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Shows the tokens that a HAM keeps: on a terminal while it generates, and as figures and a page of one text.

In a notebook:
```python
>>> passage = Passage.of(tokenizer, "It was a dark night, and Captain Ahab")
>>> reading = read(model, passage, threshold=0.4, query=7)
>>> kept_figure(reading)
```
"""

from .drawings import Drawing, drawings
from .figures import attention_figure, decay_figure, kept_figure, score_figure, usage_figure
from .page import html_page
from .passages import Passage
from .readings import Reading, read

__all__ = [
    "Drawing",
    "Passage",
    "Reading",
    "attention_figure",
    "decay_figure",
    "drawings",
    "html_page",
    "kept_figure",
    "read",
    "score_figure",
    "usage_figure",
]
