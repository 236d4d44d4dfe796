# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The decoding kernel reads the pages of a server's arena where they lie, given their addresses in place of slabs."""

import importlib
import random

import pytest
import torch

pytest.importorskip("triton")

from ham_hf import HAMConfig
from ham_hf.attention_ham import ragged_decode_attention as torch_ragged_decode_attention
from ham_hf.paged_store_ham import PAGE_SIZE
from ham_hf.serving.vllm.layout import BLOCK_PAGES, MemoryLayout
from ham_kernels.ragged_decode_attention import ragged_decode_attention

# The package gives the function this name.
module = importlib.import_module("ham_kernels.ragged_decode_attention")
CONFIG = HAMConfig(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=24,
    value_head_dim=16, num_key_value_heads=2, layer_types=["hybrid", "linear_attention", "full_attention"],
)  # fmt: skip
# Tokens of each head of each of the two layers with attention, of three requests.
COUNTS = [[[40, 3], [64, 64]], [[0, 0], [17, 17]], [[200, 31], [230, 230]]]


class ListOfAddresses:
    """Stands in the place of the kernel that lists the pages of slabs: the arena's addresses are the list."""

    def __init__(self, addresses):
        self.addresses = addresses

    def __getitem__(self, grid):
        return lambda slabs, page_start, page_list, *sizes, **constants: page_list.copy_(self.addresses)


def arena(layout, dtype, device):
    """A pool full of NaN, and the pages `[request][layer][head]` that hold random tokens, each request's in turns."""
    order = random.Random(0)
    blocks = 80
    pool = torch.full((blocks * BLOCK_PAGES, layout.page_bytes), -1, dtype=torch.int8, device=device)
    fields = {name: field.view(pool) for name, field in layout.page.items()}
    assert fields["keys"].isnan().all()
    free = order.sample(range(1, blocks), blocks - 1)
    held = []
    for request in COUNTS:
        places = [(n, h, -(-count // PAGE_SIZE)) for n, layer in enumerate(request) for h, count in enumerate(layer)]
        streams = [(n, h) for n, h, pages in places for _ in range(pages)]
        order.shuffle(streams)
        own = [free.pop() for _ in range(-(-len(streams) // BLOCK_PAGES))]
        ids = [block * BLOCK_PAGES + i for block in own for i in range(BLOCK_PAGES)]
        pages = [[[] for _ in layer] for layer in request]
        for page, (n, h) in zip(ids, streams, strict=False):
            pages[n][h].append(page)
            # The last page of a stream has unused slots.
            used = min(PAGE_SIZE, request[n][h] - PAGE_SIZE * (len(pages[n][h]) - 1))
            fields["keys"][page, :used] = torch.randn(used, CONFIG.head_dim, device=device).to(dtype)
            fields["values"][page, :used] = torch.randn(used, CONFIG.value_head_dim, device=device).to(dtype)
        held.append(pages)
    return fields, held


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_are_read_in_place(layer, dtype, device, monkeypatch, assert_error_within):
    layout = MemoryLayout.of(CONFIG, dtype)
    fields, held = arena(layout, dtype, device)
    ids = [(page, stream) for stream, pages in enumerate(p for r in held for p in r[layer]) for page in pages]
    counts = torch.tensor([count for request in COUNTS for count in request[layer]], device=device)
    full = [[p for p, s in ids if s == stream][: int(n) // PAGE_SIZE] for stream, n in enumerate(counts)]
    opened = [([p for p, s in ids if s == stream][int(n) // PAGE_SIZE :] or [0])[0] for stream, n in enumerate(counts)]
    listed = torch.tensor([page for pages in full for page in pages], device=device)
    owner = torch.tensor([s for s, pages in enumerate(full) for _ in pages], dtype=torch.int32, device=device)
    tail = fields["keys"][opened], fields["values"][opened], counts % PAGE_SIZE

    streams, groups = len(counts), 2
    q = torch.randn(streams, 1, groups, CONFIG.head_dim, device=device).to(dtype)
    k = torch.randn(streams, 1, CONFIG.head_dim, device=device).to(dtype)
    v = torch.randn(streams, 1, CONFIG.value_head_dim, device=device).to(dtype)
    keep = torch.ones(streams, 1, dtype=torch.bool, device=device)

    addresses = torch.stack([fields[name].data_ptr() + listed * layout.page_bytes for name in ("keys", "values")])
    monkeypatch.setattr(module, "page_list_fwd_kernel", ListOfAddresses(addresses))
    # Of the slab only its size is read.
    empty = [torch.full((len(listed), PAGE_SIZE, x.shape[-1]), torch.nan, dtype=dtype, device=device) for x in (k, v)]
    out = ragged_decode_attention(q, k, v, keep, [(*empty, owner)], tail)

    copied = [(fields["keys"][listed], fields["values"][listed], owner)]
    clean = tail[0].nan_to_num(), tail[1].nan_to_num(), tail[2]
    exact = torch_ragged_decode_attention(
        q.double(), k.double(), v.double(), keep, [(copied[0][0].double(), copied[0][1].double(), owner)],
        (clean[0].double(), clean[1].double(), clean[2]),
    )  # fmt: skip
    assert_error_within(out, exact, torch_ragged_decode_attention(q, k, v, keep, copied, clean))
