# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Random inputs of the operations, dense attention, and a cache layer that is filled as a model fills it."""

import torch

from ham_hf import paged_store_ham
from ham_hf.cache_layer_ham import HAMCacheLayer
from ham_hf.layer_step_ham import LayerStep
from ham_hf.ops_ham import l2norm
from ham_hf.prefix_attention_ham import compact_kept, sparse_prefix_attention
from ham_hf.reference import naive_sparse_attention


def documents(lengths, batch):
    """`[B, T]` document numbers, each row with the same lengths in another order."""
    rows = [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).roll(b)) for b in range(batch)]
    return torch.stack(rows)


def delta_inputs(length, batch=2, heads=4, kv_heads=2, key_dim=5, value_dim=7, with_state=True, decay=1.0):
    inputs = {
        "q": l2norm(torch.randn(batch, length, heads, key_dim)),
        "k": l2norm(torch.randn(batch, length, kv_heads, key_dim)),
        "v": torch.randn(batch, length, kv_heads, value_dim),
        "g": -decay * torch.rand(batch, length, kv_heads),
        "beta": torch.rand(batch, length, kv_heads),
    }
    if with_state:
        inputs["initial_state"] = torch.randn(batch, kv_heads, key_dim, value_dim)
    return inputs


def attention_inputs(length, batch=2, heads=4, kv_heads=2, key_dim=4, value_dim=6):
    return {
        "q": 2 * torch.randn(batch, length, heads, key_dim),
        "k": torch.randn(batch, length, kv_heads, key_dim),
        "v": torch.randn(batch, length, kv_heads, value_dim),
    }


def sparse_attention(q, k, v, keep, seq_idx=None, scale=None):
    (k_kept, v_kept), end = compact_kept(keep, k, v)
    begin = torch.zeros_like(end)
    if seq_idx is not None:
        first = (seq_idx[:, :, None] == seq_idx[:, None, :]).int().argmax(-1)
        begin = end.gather(1, first[..., None].expand_as(end))
    return [sparse_prefix_attention(q, k, v, k_kept, v_kept, begin, end, scale=scale)]


def dense_attention(q, k, v, keep, seq_idx=None, scale=None):
    return [naive_sparse_attention(q, k, v, keep, scale, seq_idx)[0]]


def masked_attention(q, k, v, visible):
    """Attention by a mask `[B, Hk, T, S]`, the plainest form of the definition."""
    q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))
    logits = q @ k.permute(0, 2, 3, 1).unsqueeze(2) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1)
    return (weights @ v.transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def filled_layer(counts, new, **sizes):
    """A layer whose heads hold `counts` tokens after appends of many sizes, and all tokens, `new` of them to come."""
    layer, length, heads = HAMCacheLayer(), max(max(counts), 1), len(counts)
    inputs = attention_inputs(length + new, batch=1, heads=2 * heads, kv_heads=heads, **sizes)
    q, k, v = (x.double() for x in inputs.values())
    keep = torch.rand(1, length + new, heads) < 0.5
    for head, count in enumerate(counts):
        keep[0, :length, head] = False
        keep[0, torch.randperm(length)[:count], head] = True
    start = 0
    while start < length:
        stop = min(length, start + int(torch.randint(1, 60, ())))
        cut, scores = slice(start, stop), torch.ones(1, stop - start, heads)
        positions = torch.arange(start, stop)[None]
        layer.update(LayerStep(positions, keys=k[:, cut], values=v[:, cut], scores=scores, keep=keep[:, cut]))
        start = stop
    assert layer.store.counts.tolist() == counts
    assert bool(layer.store.pages()) == (max(counts) >= paged_store_ham.PAGE_SIZE)
    return layer, q, k, v, keep
