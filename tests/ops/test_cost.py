# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds the operations to the work and the memory that they promise."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ham_hf import HAMModel, prefix_attention_ham
from ham_hf.prefix_attention_ham import QUERY_BLOCK
from ham_hf.reference import naive_gated_delta_rule_with_prediction, naive_sparse_attention
from tests.ops.comparison import assert_close
from tests.ops.inputs import attention_inputs, delta_inputs, filled_layer, sparse_attention


def test_attention_work_is_proportional_to_what_is_kept(blocks, monkeypatch):
    monkeypatch.setattr(prefix_attention_ham, "MANY_COLUMNS", torch.inf)
    length = 16 * QUERY_BLOCK
    inputs = attention_inputs(length, key_dim=2, value_dim=2)
    work = {}
    for fraction in (0.0, 0.125, 0.5, 1.0):
        blocks.clear()
        keep = torch.rand(2, length, 2) < fraction
        sparse_attention(**inputs, keep=keep)
        work[fraction] = sum(streams * rows * columns for streams, rows, columns in blocks)
        # A block reads what was kept before it in the fullest of its streams and, not counted here, itself.
        least = sum(keep[:, :start].sum() * QUERY_BLOCK for start in range(0, length, QUERY_BLOCK))
        assert least * 0.99 <= work[fraction] <= 1.2 * least
    assert work[0.0] == 0
    assert work[0.125] < 0.15 * work[1.0]
    assert 0.45 * work[1.0] < work[0.5] < 0.55 * work[1.0]


def test_one_dense_head_does_not_make_the_others_pay(blocks):
    length = 8 * QUERY_BLOCK
    keep = torch.rand(1, length, 8) < torch.tensor([1.0] + [0.01] * 7)
    sparse_attention(**attention_inputs(length, batch=1, heads=8, kv_heads=8), keep=keep)
    work = sum(streams * rows * columns for streams, rows, columns in blocks)
    dense_head = sum(i * QUERY_BLOCK**2 for i in range(8))
    assert dense_head <= work < 1.15 * dense_head, "a padded batch would cost 8 times the dense head"


class Recorder(TorchDispatchMode):
    """Counts dispatched operations and remembers the largest tensor that any of them formed."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                # Storage, not shape: an expanded view takes no memory.
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


class MemoryMeter(TorchDispatchMode):
    """Measures the most bytes that were held at once by what operations formed."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.most = max(self.most, sum(self.held.values()))
        return out


def record_model(model, length, train):
    """The recorder of one forward (and backward), and how many numbers were saved for backward."""
    ids = torch.randint(1, 97, (1, length))
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        Recorder() as recorder,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.set_grad_enabled(train),
    ):
        hidden = model(ids, use_cache=False).last_hidden_state
        if train:
            hidden.square().sum().backward()
    return recorder, sum(saved.values())


@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_memory_is_linear_in_the_sequence(threshold, train, tiny_config):
    model = HAMModel(tiny_config(router="random", threshold=threshold, head_dim=4)).train(train)
    short, short_saved = record_model(model, 2048, train)
    long, long_saved = record_model(model, 4096, train)
    assert long.largest <= 2.1 * short.largest
    assert long.largest < 4096 * 4096 / 2, "no tensor may come near tokens times tokens"
    assert bool(short_saved) == train
    assert long_saved <= 2.1 * short_saved


@pytest.mark.parametrize("new", [1, 4, 40])
def test_new_tokens_are_not_padded_to_the_longest_head(new):
    """One head of 32 holds 4,096 tokens and the others 1%: 24 times as many columns as there are tokens."""
    layer, q, k, v, keep = filled_layer([4096] + [41] * 31, new, key_dim=32, value_dim=32)
    call = [x[:, -new:].clone() for x in (q, k, v, keep, torch.ones(keep.shape))]
    stored = sum(x.nbytes for x in layer.store.tensors())
    unbound = 10**6
    with torch.no_grad():
        with MemoryMeter() as meter:
            out = layer.attend(*call, None)
        with MemoryMeter() as padded:
            expected = layer.attend(*call, unbound)
    assert_close(out, expected, 1e-10)
    # What is stored itself is counted, once. Measured: 1.0, 1.2 and 4.2 times; padded 65.
    assert meter.most < 5 * stored
    assert new == 1 or padded.most > 24 * stored, "a budget pads, which the meter must see"


def test_prefill_has_no_loop_over_tokens(tiny_config):
    config = tiny_config(router="random", threshold=0.5)
    model = HAMModel(config).eval()
    short, long = (record_model(model, length, train=False)[0].operations for length in (1024, 2048))
    # A loop over tokens dispatches ten operations for each and in each layer; the model does for a chunk or a block.
    with Recorder() as loop:
        naive_gated_delta_rule_with_prediction(**delta_inputs(1024))
    assert loop.operations > 10 * 1024
    assert 4 * (long - short) < config.num_hidden_layers * loop.operations


def test_half_precision_gradients_do_not_grow_with_the_number_of_blocks():
    """At most twice the error of a dense masked softmax in the same precision."""
    length, key_dim = 16 * QUERY_BLOCK, 16
    inputs = attention_inputs(length, batch=1, heads=2, kv_heads=2, key_dim=key_dim, value_dim=key_dim)
    keep = torch.rand(1, length, 2) < 0.25
    direction = torch.randn(1, length, 2, key_dim)

    def gradients(function, dtype):
        leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
        out = function(*leaves)
        return [x.double() for x in torch.autograd.grad(out, leaves, direction.to(out.dtype))]

    def sparse(q, k, v):
        return sparse_attention(q=q, k=k, v=v, keep=keep)[0]

    def dense(q, k, v):
        return naive_sparse_attention(q, k, v, keep)[0]

    exact = gradients(dense, torch.float64)
    ours, theirs = gradients(sparse, torch.bfloat16), gradients(dense, torch.bfloat16)
    for name, a, b, c in zip("qkv", ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm(), name
