# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Where states and pages lie in blocks: nothing overlaps, and little is wasted."""

import pytest
import torch

from ham_hf import HAMCache, HAMConfig
from ham_hf.paged_store_ham import PAGE_SIZE
from ham_hf.serving.vllm.layout import ALIGNMENT, BLOCK_PAGES, MemoryLayout
from tests.serving.vllm.engine import small_model

CONFIG = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "hybrid", "full_attention", "hybrid"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "value_head_dim": 12,
    "attention_window": [0, 1, 0, 9],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fields_share_no_byte_and_begin_where_every_dtype_may(dtype):
    layout = MemoryLayout.of(small_model(**CONFIG).config, dtype)
    for fields, size in ((layout.state, layout.state_bytes), (layout.page, layout.page_bytes)):
        memory = torch.zeros(3, size, dtype=torch.int8)
        for field in fields.values():
            assert field.offset % ALIGNMENT == 0
            view = field.view(memory)
            assert view.shape == (3, *field.shape)
            assert view.dtype == field.dtype
            before = int((memory != 0).sum())
            (view if field.shape else view[:, None]).view(torch.int8)[:] = 1
            assert int((memory != 0).sum()) == before + 3 * field.nbytes, "no byte was another field's"
    assert layout.block_bytes % ALIGNMENT == 0


def test_streams_are_those_of_layers_with_attention():
    layout = MemoryLayout.of(small_model(**CONFIG).config, torch.float32)
    assert layout.layers == (1, 2, 3)
    assert (layout.heads, layout.hybrid_streams, layout.full_streams) == (2, 4, 2)
    assert {name for name in layout.state if name.startswith("0.")} == {"0.conv", "0.recurrent"}
    assert {name for name in layout.state if name.startswith("2.")} == {"2.conv"}
    recent = {name for name in layout.state if "recent" in name}
    assert recent == {f"3.recent_{name}" for name in ("keys", "values", "scores", "keep")}


def test_a_state_takes_little_more_than_that_of_a_cache():
    model = small_model(**CONFIG, hidden_size=128)
    cache = HAMCache(model.config)
    model(torch.ones(1, 3, dtype=torch.long), cache=cache)
    rings = sum(x.nbytes for layer in cache.layers if layer.recent is not None for x in layer.recent.tensors())
    exact = cache.state_bytes() + rings
    assert exact < MemoryLayout.of(model.config, torch.float32).state_bytes < 1.02 * exact + 100


def test_pages_at_low_precision_pay_little_for_scores_positions_and_owner():
    config = HAMConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=2, head_dim=64)
    layout = MemoryLayout.of(config, torch.bfloat16)
    assert PAGE_SIZE * (64 + 64) * 2 < layout.page_bytes < 1.04 * PAGE_SIZE * (64 + 64) * 2
    assert layout.block_bytes == BLOCK_PAGES * layout.page_bytes
