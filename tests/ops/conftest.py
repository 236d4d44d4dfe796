# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Records the blocks that attention works on, for tests of them and of their cost."""

import pytest

from ham_hf import prefix_attention_ham


@pytest.fixture
def blocks(monkeypatch):
    """Every block that attention works on, as `(streams, rows, columns)` numbers."""
    recorded = []
    original = prefix_attention_ham._blocks

    def recording(*arguments):
        for block in original(*arguments):
            rows, columns = block.rows, block.columns
            recorded.append((len(block.keys), rows.stop - rows.start, columns.stop - columns.start))
            yield block

    monkeypatch.setattr(prefix_attention_ham, "_blocks", recording)
    return recorded
