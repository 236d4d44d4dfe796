# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What HAMCache promises: memory for kept tokens only, appending at a flat cost, operations that move it whole."""

import copy
import gc
import itertools
import math
import statistics
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ham_hf import HAMCache, HAMForCausalLM, cache_file_ham, paged_store_ham
from ham_hf.cache_ham import GROWS, GROWS_WITH_OTHERS
from ham_hf.cache_layer_ham import HAMCacheLayer, LayerStep
from ham_hf.paged_store_ham import MIN_SLAB_PAGES, PAGE_SIZE, SLAB_GROWTH, KeptTokens, PagedStore
from ham_hf.reference import naive_gated_delta_rule_with_prediction as naive_delta_rule
from ham_hf.reference import naive_short_convolution, naive_sparse_attention, naive_surviving_tokens
from ham_hf.routing_ham import cosine_score, random_score

MIXED = ("hybrid", "full_attention", "hybrid", "linear_attention")
MAX_RATIO = 1.15


# --- the store against a list ----------------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """PagedStore against one Python list of `(key, score, position)` per stream."""

    @initialize(streams=st.integers(1, 4))
    def start(self, streams):
        self.store = PagedStore(streams, 3, 2, torch.float32, torch.device("cpu"))
        self.model = [[] for _ in range(streams)]
        self.names = itertools.count(1)
        self.position = itertools.count()
        self.marked = None

    def fresh(self, counts, scores):
        """New tokens with keys that never repeat, as KeptTokens and as rows of the model."""
        rows = [
            (stream, (next(self.names), scores[i % len(scores)], next(self.position)))
            for stream, count in enumerate(counts)
            for i in range(count)
        ]
        return as_tokens(rows), rows

    def append(self, counts, scores):
        tokens, rows = self.fresh(counts, scores)
        self.store.append(tokens)
        for stream, row in rows:
            self.model[stream].append(row)

    SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=1, max_size=5)

    @rule(data=st.data(), scores=SCORES)
    def append_ragged(self, data, scores):
        self.append([data.draw(st.sampled_from([0, 1, 5, 15, 16, 17, 40, 130])) for _ in self.model], scores)

    @rule(data=st.data(), scores=SCORES, steps=st.integers(1, 20))
    def decode(self, data, scores, steps):
        for _ in range(steps):
            self.append([data.draw(st.integers(0, 1)) for _ in self.model], scores)

    @rule()
    def mark(self):
        self.marked = self.store.mark(), copy.deepcopy(self.model)

    @precondition(lambda self: self.marked is not None)
    @rule()
    def rollback(self):
        mark, self.model = self.marked
        self.store.rollback(mark)
        self.marked = None

    @rule(data=st.data(), scores=SCORES)
    def replace_lowest(self, data, scores):
        self.marked = None
        tokens, rows = self.fresh([data.draw(st.integers(0, 1)) for _ in self.model], scores)
        self.store.replace_lowest(tokens)
        for stream, row in rows:
            held = self.model[stream]
            lowest = min(held, key=lambda x: (x[1], x[2]), default=None)
            if lowest is not None and row[1] >= lowest[1]:
                held.remove(lowest)
                held.append(row)

    @rule(data=st.data())
    def select_streams(self, data):
        self.marked = None
        source = data.draw(st.lists(st.integers(0, len(self.model) - 1), min_size=1, max_size=5))
        tokens, streams = self.store.tokens(), self.store.tokens().streams
        index = torch.cat([(streams == s).nonzero()[:, 0] for s in source])
        counts = torch.tensor([len(self.model[s]) for s in source])
        renumbered = torch.arange(len(source)).repeat_interleave(counts)
        self.store = self.store.rebuilt(tokens.select(index, renumbered), len(source))
        self.model = [list(self.model[s]) for s in source]

    @rule(limit=st.sampled_from([0.25, 0.5]))
    def prune(self, limit):
        self.marked = None
        tokens = self.store.tokens()
        self.store = self.store.rebuilt(tokens.select(tokens.scores >= limit))
        self.model = [[row for row in held if row[1] >= limit] for held in self.model]

    @invariant()
    def holds_the_same(self):
        if not hasattr(self, "store"):
            return
        rows = [(stream, row) for stream, held in enumerate(self.model) for row in held]
        expected, found = as_tokens(rows), self.store.tokens()
        for name in ("keys", "values", "scores", "positions", "streams"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)
        assert self.store.counts.tolist() == [len(held) for held in self.model]

    @invariant()
    def wastes_little(self):
        if not hasattr(self, "store"):
            return
        used = sum(self.store.used)
        unused = sum(len(slab["owner"]) for slab in self.store.slabs) - used
        assert used == sum(len(held) // PAGE_SIZE for held in self.model)
        assert 0 <= unused <= max(MIN_SLAB_PAGES, int(used * SLAB_GROWTH))


def as_tokens(rows) -> KeptTokens:
    key = torch.tensor([row[0] for _, row in rows], dtype=torch.float32).view(-1, 1)
    return KeptTokens(
        keys=key + torch.tensor([0.0, 0.25, 0.5]),
        values=-key * torch.tensor([1.0, 2.0]),
        scores=torch.tensor([row[1] for _, row in rows], dtype=torch.float32),
        positions=torch.tensor([row[2] for _, row in rows], dtype=torch.int32),
        streams=torch.tensor([stream for stream, _ in rows], dtype=torch.long),
    )


StoreMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=15, deadline=None)
TestStore = StoreMachine.TestCase


# --- helpers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_model(tiny_config):
    def make(seed=0, dtype=torch.float32, **overrides):
        torch.manual_seed(seed)
        return HAMForCausalLM(tiny_config(**overrides)).eval().to(dtype).requires_grad_(False)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    """One layer of each kind and a second hybrid one, whose scores depend on what the first kept."""
    return make_model(num_hidden_layers=4, layer_types=list(MIXED))


@pytest.fixture
def ids():
    return torch.randint(1, 97, (3, 60))


@pytest.fixture
def mask():
    """Padding on the left in one row, in the middle in another (a prompt padded on the right, then continued)."""
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, 18:25] = 0
    return mask


def feed(model, cache, ids, cuts=(), mask=None, threshold=0.51, **arguments):
    """Runs the tokens that follow those in the cache, cut at `cuts` (numbers of tokens); returns their logits."""
    seen = cache.get_seq_length()
    ends = [seen, *(seen + cut for cut in cuts), ids.shape[1]]
    logits = [
        model(
            ids[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            cache=cache,
            threshold=threshold,
            **arguments,
        ).logits
        for begin, end in itertools.pairwise(ends)
        if begin < end
    ]
    return torch.cat(logits, 1) if logits else None


def filled(model, ids, cuts=(), mask=None, **arguments):
    cache = HAMCache(model.config)
    feed(model, cache, ids, cuts, mask, **arguments)
    return cache


def contents(cache):
    """Everything that a cache holds, in an order that does not depend on where it is stored."""
    held = {"seen": torch.tensor(cache.get_seq_length()), "real": cache.real_tokens}
    for i, layer in enumerate(cache.layers):
        own = {"conv": layer.conv_state, "rnn": layer.recurrent_state, "real": layer.real_tokens}
        if layer.store is not None:
            own |= vars(layer.store.tokens()) | {"counts": layer.store.counts}
        held |= {f"{i}.{name}": x for name, x in own.items() if x is not None}
    return {name: x.clone() for name, x in held.items()}


def assert_same(found, expected, atol=0.0):
    """Two caches, or what `contents` gave of them, hold the same tokens and, to a tolerance, the same numbers."""
    found, expected = (contents(x) if isinstance(x, HAMCache) else x for x in (found, expected))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        exact = not x.is_floating_point()
        torch.testing.assert_close(
            x, expected[name], rtol=0, atol=0 if exact else atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_continues(model, found, expected, ids, mask=None, atol=1e-5):
    """Both caches hold the same, and go on to the same logits and kept tokens: token by token, then in a block."""
    assert_same(found, expected, atol)
    cuts = (1, 2, 3)
    logits, expected_logits = (feed(model, cache, ids, cuts, mask) for cache in (found, expected))
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=atol)
    assert_same(found, expected, atol)


def random_step(keep, start=0, dim=8, dtype=torch.float32) -> LayerStep:
    """What one forward gives a layer that keeps `[B, T, Hk]` bool, with random contents."""
    batch, length, heads = keep.shape
    return LayerStep(
        positions=torch.arange(start, start + length).expand(batch, -1),
        keys=torch.randn(batch, length, heads, dim, dtype=dtype),
        values=torch.randn(batch, length, heads, dim, dtype=dtype),
        scores=torch.rand(batch, length, heads),
        keep=keep,
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def allocated_bytes(known=frozenset()):
    """Bytes of every distinct storage that some live tensor refers to, but for those at the addresses in `known`."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and x.device.type == "cpu" and x.layout == torch.strided:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(size for address, size in storages.items() if address not in known), frozenset(storages)


def paid_ratio(cache) -> float:
    """Bytes held beyond the fixed states, in units of what the kept tokens need.

    A kept token needs its key and value at the cache's dtype, 4 bytes of score and 4 of position. Fixed are the states
    of the convolution and of the RNN, nothing else: unused slots, open pages, owners of pages and counters all count.
    """
    layer = next(layer for layer in cache.layers if layer.store is not None)
    store = layer.store
    per_token = (store.key_dim + store.value_dim) * store.dtype.itemsize + 8
    return (cache.memory_bytes() - cache.state_bytes()) / (int(cache.kept_tokens().sum()) * per_token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("others", [1.0, 0.01], ids=["balanced", "one-head-keeps-all"])
def test_bytes_follow_kept_tokens(make_model, others, dtype):
    """One prefill, a conversation of turns, growth token by token: never more than 15% beyond what is kept."""
    heads = 8
    model = make_model(
        dtype=dtype,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=16,
        router="random",
    )
    threshold = torch.full((1, 1, heads), 1 - others)
    threshold[..., 0] = 0
    ids = torch.randint(1, 97, (1, 1300))
    ratios = {}
    _, known = allocated_bytes()

    def check(name, cache):
        kept = cache.kept_tokens()[0, 0]
        assert kept[0] == cache.get_seq_length() >= 1000
        assert (kept[1:] <= kept[0] * (others + 0.02)).all()
        ratios[name] = max(paid_ratio(cache), ratios.get(name, 0))

    cache = filled(model, ids[:, :1000], threshold=threshold)
    check("prefill", cache)
    measured, _ = allocated_bytes(known)
    assert cache.memory_bytes() <= measured <= cache.memory_bytes() + 1024, "the count leaves out what is really held"
    for end in range(1001, 1101):
        feed(model, cache, ids[:, :end], threshold=threshold)
        check("prefill, then decoding", cache)
    del cache
    cache = filled(model, ids[:, :600], threshold=threshold)
    for turn in range(600, 1300, 70):
        feed(model, cache, ids[:, : turn + 70], range(60, 70), threshold=threshold)
        if turn >= 930:
            check("turns", cache)
    del cache

    # The same growth from nothing, token by token, without the rest of the model; also with room ahead of need.
    keep = torch.rand(1300, heads) < others
    keep[:, 0] = True
    for ahead in (False, True):
        layer = HAMCacheLayer()
        for t in range(1300):
            layer.update(random_step(keep[None, t : t + 1], t, 16, dtype))
            if ahead and not layer.store.reserved_steps:
                counts = layer.store.counts
                layer.store.reserve(counts, grow=layer.store.shortage(counts) >= GROWS_WITH_OTHERS)
            if t >= 1000:
                store = layer.store
                per_token = 32 * dtype.itemsize + 8
                held = sum(x.untyped_storage().nbytes() for x in layer.tensors())
                ratio = held / (int(store.counts.sum()) * per_token)
                name = "token by token, ahead" if ahead else "token by token"
                ratios[name] = max(ratio, ratios.get(name, 0))
    print("\nbytes held / bytes of kept tokens:", {name: round(ratio, 3) for name, ratio in ratios.items()})
    assert max(ratios.values()) <= MAX_RATIO, ratios
    assert min(ratios.values()) >= 1


@pytest.mark.parametrize("heads", [16, 64])
def test_with_many_heads_only_open_pages_go_beyond(heads):
    """At most 15% beyond what is kept, and what is held when nothing is: an open page a head, whatever is in it.

    The most unequal heads, as kept tokens arrive in a prompt and then one by one. With 8 heads open pages need no
    exception, as the test above shows.
    """
    per_token = 2 * 16 * 4 + 8
    keep = torch.rand(1200, heads) < 0.01
    keep[:, 0] = True
    nothing = HAMCacheLayer()
    nothing.update(random_step(torch.zeros(1, 1, heads, dtype=torch.bool), 0, 16, torch.float32))
    fixed = sum(x.untyped_storage().nbytes() for x in nothing.tensors())
    assert fixed < 1.01 * heads * PAGE_SIZE * per_token + 1024
    layer, worst = HAMCacheLayer(), 0.0
    layer.update(random_step(keep[None, :1000], 0, 16, torch.float32))
    for t in range(1000, 1200):
        layer.update(random_step(keep[None, t : t + 1], t, 16, torch.float32))
        held = sum(x.untyped_storage().nbytes() for x in layer.tensors())
        worst = max(worst, (held - fixed) / (int(layer.store.counts.sum()) * per_token))
    assert worst <= MAX_RATIO


def test_a_copy_does_not_take_over_addresses(monkeypatch):
    """What a kernel knows of the slabs is where they lie, and a copy's lie elsewhere."""
    addresses = lambda slabs: torch.tensor([[x.data_ptr() for x in slab] for slab in slabs])  # noqa: E731
    monkeypatch.setattr(paged_store_ham, "slab_table", addresses)
    store = PagedStore(1, 3, 2, torch.float32, torch.device("cpu"))
    store.append(as_tokens([(0, (float(i), 0.5, i)) for i in range(3 * PAGE_SIZE)]))
    table, _ = store.index()
    twin = copy.deepcopy(store)
    assert torch.equal(store.index()[0], table)
    assert twin.index()[0][0, 0] == twin.slabs[0]["keys"].data_ptr() != table[0, 0]
    assert torch.equal(twin.tokens().keys, store.tokens().keys)


@pytest.mark.parametrize("streams", [1, 3, 40])
def test_room_is_reserved_for_exactly_as_many_steps_as_fit(streams):
    """As many as fill all free pages if every stream keeps everything; and the host does not look before."""
    store = PagedStore(streams, 3, 2, torch.float32, torch.device("cpu"))
    position = itertools.count()
    for turn in range(24):
        more = torch.randint(1, 60, (streams,))
        if turn % 2:
            more += (PAGE_SIZE - 1 - store.counts - more) % PAGE_SIZE  # every page lacks one token
        new = torch.arange(streams).repeat_interleave(more)
        store.append(as_tokens([(n, (0.0, 0.5, next(position))) for n in new.tolist()]))
        assert store.reserved_steps == 0
        shortage = store.shortage(store.counts)
        store.reserve(store.counts, grow=shortage >= GROWS)
        free = store.capacity - sum(store.used)

        def sealed(steps, store=store):
            return int(((store.fill + steps) // PAGE_SIZE).sum())

        assert store.reserved_steps >= 1
        assert sealed(store.reserved_steps) <= free < sealed(store.reserved_steps + 1)
        assert shortage <= 1


class Nothing(TorchDispatchMode):
    """Fails on any operation at all."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_layers_get_room_together(make_model):
    """One wait for all of them, and none while room remains; a slab is made by all that miss a quarter of theirs."""
    cache = filled(make_model(num_hidden_layers=3, num_key_value_heads=2), torch.randint(1, 97, (1, 9)))
    for layer in cache.layers:
        layer.store = layer.store.rebuilt(layer.store.tokens().select(torch.tensor([], dtype=torch.long)))
        layer.update(random_step(torch.ones(1, 8192, 2, dtype=torch.bool), 9, layer.store.key_dim, torch.float32))
    stores = [layer.store for layer in cache.layers]
    assert [store.capacity for store in stores] == [1024] * 3
    cache.reserve()
    assert [store.capacity for store in stores] == [1024 + 64] * 3
    steps = [store.reserved_steps for store in stores]
    assert steps == [16 * 32 + 15] * 3
    with Nothing():
        cache.reserve()
    for layer, more in zip(cache.layers, (416, 200, 60), strict=True):
        layer.update(random_step(torch.ones(1, more, 2, dtype=torch.bool), 9, layer.store.key_dim, torch.float32))
    free = [store.capacity - sum(store.used) for store in stores]
    assert free == [64 - 2 * 26, 64 - 2 * 12, 64 - 2 * 3]
    cache.reserve()
    assert [store.capacity - sum(store.used) for store in stores] == [68, 68, 58]
    assert all(store.reserved_steps for store in stores)


def test_turns_fill_what_is_left_of_a_slab():
    """Turns a little longer than what is left of the last slab must not leave room behind, turn after turn."""
    store = PagedStore(1, 4, 4, torch.float32, torch.device("cpu"))
    position = 0

    def append(n):
        nonlocal position
        tokens = as_tokens([(0, (position + i, 0.5, position + i)) for i in range(n)])
        four = torch.zeros(n, 4)
        store.append(KeptTokens(four, four, tokens.scores, tokens.positions, tokens.streams))
        position += n

    append(8000)
    for _ in range(20):
        append(PAGE_SIZE)
        room = len(store.slabs[-1]["owner"]) - store.used[-1]
        append((room + 1) * PAGE_SIZE)
    pages = sum(len(slab["owner"]) for slab in store.slabs)
    assert pages * PAGE_SIZE <= position * (1 + SLAB_GROWTH) + PAGE_SIZE
    assert store.tokens().positions.tolist() == list(range(position))


def test_memory_falls_with_what_is_kept(make_model):
    """A quarter kept costs a quarter, also in a batch whose rows keep very different numbers."""
    model = make_model(num_hidden_layers=1, router="random")
    ids = torch.randint(1, 97, (2, 2000))
    full = filled(model, ids, threshold=0.0)
    full_bytes = full.memory_bytes() - full.state_bytes()
    for threshold, usage in ((0.75, 0.25), (torch.tensor([0.0, 0.99]), 0.505)):
        cache = filled(model, ids, threshold=threshold)
        assert cache.kv_usage().mean().item() == pytest.approx(usage, abs=0.03)
        assert (cache.memory_bytes() - cache.state_bytes()) / full_bytes == pytest.approx(usage, abs=0.05)


# --- the cost of a step ----------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the size of the largest storage that an operation allocates; views and writes in place allocate none."""

    def __init__(self):
        super().__init__()
        self.largest, self.name = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            new = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs
            if new and x.untyped_storage().nbytes() > self.largest:
                self.largest, self.name = x.untyped_storage().nbytes(), func.__name__
        return out


def test_no_step_copies_the_cache():
    """300 steps on 16,384 kept tokens a head: no operation allocates anything near the stored keys; pages stay put."""
    heads, dim, stored = 2, 64, 16384
    layer = HAMCacheLayer()
    layer.update(random_step(torch.ones(1, stored, heads, dtype=torch.bool), dim=dim))
    key_bytes = heads * stored * dim * 4
    addresses = [x.data_ptr() for slab in layer.store.slabs for x in slab.values()]
    slabs = len(layer.store.slabs)
    appending, reading = Allocations(), Allocations()
    for t in range(stored, stored + 300):
        step = random_step(torch.ones(1, 1, heads, dtype=torch.bool), t, dim)
        with reading:
            layer.attend(torch.randn(1, 1, heads, dim), step.keys, step.values, step.keep, step.scores, None)
        with appending:
            layer.update(step)
    assert len(layer.store.slabs) > slabs, "the store must have grown for this to show anything"
    assert layer.store.counts.tolist() == [stored + 300] * heads
    assert appending.largest <= key_bytes * 1.1 * SLAB_GROWTH, (appending.name, appending.largest)
    assert reading.largest <= key_bytes / 8, (reading.name, reading.largest)
    assert [x.data_ptr() for slab in layer.store.slabs[:slabs] for x in slab.values()] == addresses


def test_appending_does_not_slow_down():
    """The median time of appending one token to a head hardly depends on whether it holds 500 tokens or 50,000."""

    def median_time(stored):
        layer = HAMCacheLayer()
        layer.update(random_step(torch.ones(1, stored, 4, dtype=torch.bool), dim=32))
        steps = [random_step(torch.ones(1, 1, 4, dtype=torch.bool), stored + t, 32) for t in range(200)]
        times = []
        for step in steps:
            begin = time.perf_counter()
            layer.update(step)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    median_time(500)
    assert min(median_time(50_000) for _ in range(3)) < 3 * max(median_time(500) for _ in range(3))


# --- seen and kept ---------------------------------------------------------------------------------------------------


def rotated(x, theta=10000.0):
    """RoPE of `[1, T, H, K]` at positions 0 to T - 1, as a rotation of complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None].double() * theta ** (-torch.arange(half).double() / half)
    turned = (
        torch.complex(x[..., :half].double(), x[..., half:].double())
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat([turned.real, turned.imag], -1).float()


def test_positions_after_thousands_of_dropped_tokens(make_model):
    """3,000 tokens of which hardly any is kept: the logits are those of dense attention at absolute positions."""
    model = make_model(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    ids = torch.randint(1, 97, (1, 3000))
    layer = model.model.layers[0]
    mixer, x = layer.mixer, model.model.embed_tokens(ids)
    h = layer.input_layernorm(x)
    raw = torch.cat([mixer.q_proj(h), mixer.k_proj(h), mixer.v_proj(h)], -1)
    q, k, v = naive_short_convolution(raw, mixer.conv.weight)[0].unsqueeze(2).chunk(3, -1)
    unit_q, unit_k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    g = -mixer.A_log.exp() * torch.nn.functional.softplus(mixer.a_proj(h) + mixer.dt_bias)
    o_rnn, prediction, _ = naive_delta_rule(unit_q, unit_k, v, g, mixer.b_proj(h).sigmoid())
    scores = cosine_score(v, prediction)
    order = scores.flatten().sort().values
    threshold = float(order[-13:-11].mean())
    keep = scores >= threshold
    o_kv, weights = naive_sparse_attention(rotated(mixer.q_norm(q)), rotated(mixer.k_norm(k)), v, keep)
    mixed = mixer.rnn_gate_proj(h).sigmoid() * mixer.rnn_norm(o_rnn)[:, :, 0]
    mixed = mixed + mixer.kv_gate_proj(h).sigmoid() * mixer.kv_norm(o_kv)[:, :, 0]
    x = x + mixer.o_proj(mixed * torch.nn.functional.silu(mixer.z_proj(h)))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    expected = model.lm_head(model.model.norm(x))

    cache = HAMCache(model.config)
    logits = feed(model, cache, ids, (1000, 2500, *range(2980, 3000)), threshold=threshold)
    torch.testing.assert_close(logits[:, -600:], expected[:, -600:], rtol=0, atol=2e-5)
    assert cache.get_seq_length() == 3000
    assert cache.kept_positions(0)[0][0].tolist() == keep[0, :, 0].nonzero()[:, 0].tolist()
    assert int(cache.kept_tokens()) == 12
    assert weights[0, 0, -1, :-1].max() > 0.02, "the kept tokens must matter for this to show anything"


def test_tokens_seen_and_kept_are_two_numbers(model, ids, mask):
    cache = filled(model, ids, (20, 21, 22), mask, threshold=0.51)
    batch, heads, config = 3, 2, model.config
    assert cache.get_seq_length() == 60
    assert all(cache.get_seq_length(i) == 60 for i in range(4))
    assert cache.get_mask_sizes(5, 0) == (65, 0)
    assert cache.batch_size == batch
    assert cache.real_tokens.tolist() == [60, 53, 53] == mask.sum(1).tolist()

    kept = cache.kept_tokens()
    assert kept.shape == (4, batch, heads)
    assert kept.dtype == torch.int64
    assert kept[1].tolist() == [[60, 60], [53, 53], [53, 53]], "full attention keeps every real token"
    assert (kept[3] == 0).all(), "a linear layer keeps none"
    assert (kept[[0, 2]] > 0).all()
    assert (kept[[0, 2]] < cache.real_tokens[:, None]).all()
    usage = cache.kv_usage()
    assert usage.dtype == torch.float32
    torch.testing.assert_close(usage, kept / torch.tensor([60.0, 53, 53])[:, None])
    for layer in (0, 1, 2):
        positions = cache.kept_positions(layer)
        assert [[len(p) for p in row] for row in positions] == kept[layer].tolist()
        for row, real in zip(positions, cache.real_tokens.tolist(), strict=True):
            assert all((p.diff() > 0).all() and p.dtype == torch.int32 and p[0] >= 0 and p[-1] < real for p in row)
    per_token = heads * (config.head_dim + config.value_head_dim) * 4
    assert cache.full_kv_bytes() == 3 * batch * 60 * per_token, "three layers have attention"
    assert cache.state_bytes() == sum(
        x.nbytes for layer in cache.layers for x in (layer.conv_state, layer.recurrent_state) if x is not None
    )
    assert cache.state_bytes() < cache.memory_bytes()


def test_a_model_without_attention_holds_states_only(make_model, ids):
    cache = filled(make_model(layer_types=["linear_attention"] * 2), ids, threshold=None)
    assert (cache.kept_tokens() == 0).all()
    assert cache.full_kv_bytes() == 0
    assert cache.memory_bytes() <= cache.state_bytes() + 8 * 3 * 2
    with pytest.raises(ValueError, match=r"`layer_idx` 0 is a linear layer"):
        cache.kept_positions(0)


def test_the_cache_holds_no_graph(make_model, ids):
    model = make_model(router="learned").requires_grad_(True)
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, ids, (40, 41, 42))
    tensors = [x for layer in cache.layers for x in layer.tensors()]
    assert len(tensors) > 20
    assert not any(x.requires_grad for x in tensors)


def test_a_cache_filled_in_inference_mode_goes_on_outside(model, ids):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    with torch.inference_mode():
        feed(model, cache, ids[:, :20], (17, 18))
        cache.crop(-2)
    feed(model, cache, ids[:, :30], (1, 2))
    with torch.inference_mode():
        feed(model, cache, ids[:, :40], (1, 2))
    assert_same(cache, filled(model, ids[:, :40], (18,)), 1e-5)


@pytest.mark.parametrize("attention_conv", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cache_is_filled_under_autocast(make_model, ids, qk_norm, attention_conv):
    """There projections are in bfloat16, while norms, rotation and the convolution's weights widen what they touch."""
    model = make_model(qk_norm=qk_norm, attention_conv=attention_conv, layer_types=["hybrid", "full_attention"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, cache = feed(model, HAMCache(model.config), ids, threshold=0.0), HAMCache(model.config)
        parts = feed(model, cache, ids, cuts=(17, 18, 20), threshold=0.0)
    assert {store.dtype for store in cache._stores()} == {torch.float32 if attention_conv else torch.bfloat16}
    assert (parts - whole).abs().max() < 0.006  # measured: 0.002, two units of a logit near 0.5


# --- operations on rows ----------------------------------------------------------------------------------------------

ROWS = {
    "reversed": [2, 1, 0],
    "one": [1],
    "repeats": [1, 1, 0, 2, 1],
    "mask": [True, False, True],
    "same": [0, 1, 2],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
def test_selected_rows(model, ids, mask, rows, operation):
    """Selecting rows gives the cache that these rows alone would have filled."""
    rows = torch.tensor(rows)
    cache = filled(model, ids[:, :40], (30, 31), mask)
    getattr(cache, operation)(rows)
    expected = filled(model, ids[rows, :40], (30, 31), mask[rows])
    assert cache.batch_size == len(ids[rows])
    assert_continues(model, cache, expected, ids[rows], mask[rows])


def test_repeated_rows(model, ids, mask):
    cache = filled(model, ids[:, :40], mask=mask)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    assert_continues(model, cache, filled(model, ids[rows, :40], mask=mask[rows]), ids[rows], mask[rows])


def test_copies_part_ways(model, ids):
    """Repeated rows and deep copies share no memory: what one takes in afterwards the other does not see."""
    cache = filled(model, ids[:1, :40])
    other = copy.deepcopy(cache)
    before = contents(other)
    feed(model, cache, ids[:1], (1, 2))
    assert_same(other, before)
    other.batch_repeat_interleave(2)
    feed(model, other, ids[:2], range(1, 20))
    assert_same(
        other, filled(model, torch.cat([ids[:1, :40].expand(2, -1), ids[:2, 40:]], 1), (40, *range(41, 60))), 1e-5
    )


# --- taking tokens back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 2, 5, 14, 15, 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("offloading", [False, True])
def test_cropped_cache_never_saw_the_tokens(model, ids, mask, removed, padded, offloading):
    """Forwards of 1, 14 and 5 tokens are recorded; any number of those tokens can be taken back."""
    mask = mask if padded else None
    if padded:
        mask[0, 30:33] = 0
    cache = HAMCache(model.config, offloading=offloading)
    feed(model, cache, ids[:, :20], mask=mask)
    cache.activate_past_recording()
    assert cache.is_croppable
    assert all(layer.record_past for layer in cache.layers)
    feed(model, cache, ids[:, :40], (1, 15), mask)
    cache.crop(-removed)

    end = 40 - removed
    expected = filled(model, ids[:, :end], (20,), mask)
    assert cache.memory_bytes() == expected.memory_bytes()
    assert cache.state_bytes() == expected.state_bytes()
    with pytest.raises(ValueError, match="recorded"):
        cache.crop(-1)
    later = ids[:, torch.cat([torch.arange(end), torch.arange(40, 60)])]
    mask = None if mask is None else mask[:, torch.cat([torch.arange(end), torch.arange(40, 60)])]
    assert_continues(model, cache, expected, later, mask)


def test_everything_can_be_taken_back(model, ids):
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, ids[:, :30], (10, 11))
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    assert cache.real_tokens.tolist() == [0, 0, 0]
    assert (cache.kept_tokens() == 0).all()
    other = HAMCache(model.config)
    logits, expected = feed(model, cache, ids, (40, 41)), feed(model, other, ids, (40, 41))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert_same(cache, other, 1e-5)


def test_rounds_of_guesses_leave_no_trace(model, ids):
    """As in assisted generation: guess a few tokens, take them back, over pages and slabs; kept sets stay exact."""
    cache = HAMCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, ids[:1, :10])
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        good = 10 + i
        guess = torch.cat([ids[:1, : good + 1], torch.randint(1, 97, (1, 4), generator=generator)], 1)
        feed(model, cache, guess)
        cache.crop(-4)
    expected = HAMCache(model.config)
    feed(model, expected, ids[:1, :10])
    feed(model, expected, ids[:1, :50], range(1, 40))
    assert_continues(model, cache, expected, ids[:1])


def test_crop_makes_final(model, ids):
    cache = filled(model, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids[:, :30], (1, 2))
    before = contents(cache)
    recording = cache.memory_bytes()
    cache.crop(0)
    assert_same(cache, before)
    assert cache.memory_bytes() < recording, "what was remembered for a crop is given back"
    for removed in (-1, -10):
        with pytest.raises(ValueError, match=r"reaches past the 0 tokens recorded"):
            cache.crop(removed)
    feed(model, cache, ids[:, :32])
    cache.crop(-2)
    assert_same(cache, before, 1e-5)


def test_crop_takes_the_number_as_a_tensor_too(model, ids):
    """Transformers 5.17 gives it so in assisted generation."""
    cache = filled(model, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids[:, :25])
    cache.crop(torch.tensor(-3))
    assert cache.get_seq_length() == 22


@pytest.mark.parametrize(
    ("removed", "error", "message"),
    [
        (-11, ValueError, r"past the 10 tokens recorded"),
        (1, ValueError, r"`tokens_to_remove` must be 0 or negative"),
        (-1.0, TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
        (True, TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
        (None, TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
        (torch.tensor([-1]), TypeError, r"`tokens_to_remove` must be 0 or a negative int"),
    ],
)
def test_refused_crop_changes_nothing(model, ids, removed, error, message):
    cache = filled(model, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids[:, :30], (3,))
    before, size = contents(cache), cache.memory_bytes()
    with pytest.raises(error, match=message):
        cache.crop(removed)
    assert_same(cache, before)
    assert cache.memory_bytes() == size
    cache.crop(-10)
    assert_same(cache, filled(model, ids[:, :20]))


def test_reset_forgets_everything(model, ids):
    cache = filled(model, ids, (40, 41))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes() == 0
    assert not cache.is_initialized
    assert_continues(model, cache_after(model, cache, ids[:2, :40]), filled(model, ids[:2, :40]), ids[:2])


def cache_after(model, cache, ids):
    feed(model, cache, ids)
    return cache


# --- devices and files -----------------------------------------------------------------------------------------------


def test_offloading_changes_no_output(model, ids, mask):
    plain, offloaded = HAMCache(model.config), HAMCache(model.config, offloading=True)
    cuts = (20, 21, 22)
    torch.testing.assert_close(
        feed(model, offloaded, ids, cuts, mask), feed(model, plain, ids, cuts, mask), rtol=0, atol=0
    )
    assert_same(offloaded, plain)
    assert offloaded.layers[0].conv_state.device.type == "cpu"


def test_moving_leaves_nothing_behind(model, ids):
    """Every tensor moves, those remembered for a crop too (the device `meta` stands in for one that CI lacks)."""
    cache = HAMCache(model.config)
    feed(model, cache, ids[:, :20])
    cache.activate_past_recording()
    feed(model, cache, ids, (1, 2))
    for layer in cache.layers:
        count = len(layer.tensors())
        layer.to(torch.device("meta"))
        assert len(layer.tensors()) == count
        left = [x for x in tree_leaves([vars(layer), [vars(s) for s in layer._steps]]) if isinstance(x, torch.Tensor)]
        left += layer.tensors()
        assert {x.device.type for x in left} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(make_model, ids, mask, tmp_path, dtype):
    model = make_model(num_hidden_layers=4, layer_types=list(MIXED), dtype=dtype)
    cache = filled(model, ids[:, :40], (20, 21), mask)
    path = tmp_path / "conversation.safetensors"
    cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    loaded = HAMCache.load(path, model.config)
    assert_same(loaded, cache)
    assert loaded.memory_bytes() <= cache.memory_bytes()
    # Heads of bfloat16 sum their pages in another order.
    assert_continues(model, loaded, cache, ids, mask, 1e-5 if dtype == torch.float32 else 0.05)


def test_saving_is_whole_or_not_at_all(model, ids, tmp_path, monkeypatch):
    path = tmp_path / "cache.safetensors"

    def failing(tensors, name, metadata=None):
        with open(name, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    cache = filled(model, ids[:, :30])
    with monkeypatch.context() as patch:
        patch.setattr(cache_file_ham, "save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            cache.save(path)
    assert list(tmp_path.iterdir()) == []
    cache.save(path)
    whole = path.read_bytes()
    feed(model, cache, ids)
    with monkeypatch.context() as patch:
        patch.setattr(cache_file_ham, "save_file", failing)
        with pytest.raises(OSError, match="no space left"):
            cache.save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_wrong_files_are_refused(model, ids, tmp_path):
    good = tmp_path / "good.safetensors"
    filled(model, ids[:, :30]).save(good)
    whole = good.read_bytes()
    contents_of = {"text": b"hello", "empty": b"", "half": whole[: len(whole) // 2], "head": whole[:100]}
    for name, data in contents_of.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"`path` .*{name}\.safetensors.* is not a cache"):
            HAMCache.load(path, model.config)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"0.keys": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match=r"`path` .*foreign\.safetensors.* is not a cache"):
        HAMCache.load(foreign, model.config)
    with pytest.raises(FileNotFoundError, match="missing"):
        HAMCache.load(tmp_path / "missing.safetensors", model.config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 5),
        ("head_dim", 16),
        ("value_head_dim", 16),
        ("num_key_value_heads", 4),
        ("num_attention_heads", 8),
        ("conv_kernel_size", 3),
        ("layer_types", ["hybrid"] * 4),
    ],
)
def test_a_cache_of_another_shape_is_refused(model, tiny_config, ids, tmp_path, field, value):
    """From a file and as `cache` alike, naming what differs."""
    layers = value if field == "num_hidden_layers" else 4
    other = tiny_config(
        **{"num_hidden_layers": layers, "head_dim": 8, "value_head_dim": 8}
        | {"layer_types": [*MIXED, "hybrid"][:layers]}
        | {field: value}
    )
    named = "layer_types" if field == "num_hidden_layers" else field
    cache = filled(model, ids[:, :30])
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"`path` .*`{named}`"):
        HAMCache.load(tmp_path / "cache", other)
    before = contents(cache)
    with pytest.raises(ValueError, match=rf"`cache` .*`{named}`"):
        HAMForCausalLM(other)(ids[:, :1], cache=cache)
    assert_same(cache, before)


# --- pruning and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.55, [0.55], torch.tensor([0.5, 0.6, 2.0]), torch.tensor([[[0.45, 0.6]]])])
def test_pruned_cache_is_the_one_that_threshold_fills(make_model, ids, mask, threshold):
    """In a single layer scores do not depend on what was kept, so pruning equals a second run with that threshold."""
    model = make_model(num_hidden_layers=1)
    cache = filled(model, ids[:, :40], (30, 31), mask, threshold=0.0)
    assert cache.kept_tokens().sum() == 2 * mask[:, :40].sum()
    before = cache.memory_bytes()
    cache.prune(threshold)
    expected = filled(model, ids[:, :40], mask=mask, threshold=threshold)
    assert 0 < expected.kept_tokens().sum() < 2 * mask[:, :40].sum()
    assert cache.memory_bytes() <= before
    assert_continues(model, cache, expected, ids, mask)


def test_prune_goes_by_the_stored_scores(model, ids):
    cache = filled(model, ids, threshold=0.45)
    before = [layer.store.tokens() if layer.store else None for layer in cache.layers]
    limits = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.45
    cache.prune(limits)
    for layer, n in ((0, 0), (2, 1)):
        survives = before[layer].scores >= limits[n].flatten()[before[layer].streams]
        assert 0 < survives.sum() < len(survives)
        expected, found = before[layer].select(survives), cache.layers[layer].store.tokens()
        assert all(torch.equal(getattr(found, name), x) for name, x in vars(expected).items())
    assert len(cache.layers[1].store.tokens().scores) == len(before[1].scores), "full attention is not routed"
    after = contents(cache)
    cache.prune(0.0)
    assert_same(cache, after)
    cache.prune(math.inf)
    assert cache.kept_tokens()[[0, 2]].sum() == 0
    feed(model, cache, torch.cat([ids, ids], 1), (1, 2))


def test_budget_bounds_a_stream(make_model):
    """2,000 tokens stream through room for 48: the highest scores stay, and the memory does not grow."""
    model = make_model(num_hidden_layers=2, router="random")
    budget, length, threshold = 48, 2000, 0.3
    ids = torch.randint(1, 97, (2, length))
    cache, sizes = HAMCache(model.config), []
    cuts = sorted({*range(40, 400), *range(400, 1800, 100), *range(1800, 2000)})
    for begin, end in itertools.pairwise([0, *cuts, length]):
        model(ids[:, begin:end], cache=cache, threshold=threshold, kv_budget=budget)
        assert cache.kept_tokens().max() <= budget
        sizes.append(cache.memory_bytes() - cache.state_bytes())
    assert (cache.kept_tokens() == budget).all()
    assert cache.get_seq_length() == length
    store = cache.layers[0].store
    per_token = (store.key_dim + store.value_dim) * 4 + 8
    slots = 2 * 4 * (budget + PAGE_SIZE) + 2 * MIN_SLAB_PAGES * PAGE_SIZE
    assert max(sizes) <= slots * (per_token + 1)
    for layer in range(2):
        scores = random_score(torch.arange(length)[None], layer, 2)[0]
        positions = cache.kept_positions(layer)
        for head in range(2):
            survivors = naive_surviving_tokens(scores[:, head], scores[:, head] >= threshold, budget)[-1]
            for row in range(2):
                assert positions[row][head].tolist() == survivors.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("cuts", [(), (10, 11, 12, 35), tuple(range(1, 60))], ids=["whole", "chunks", "tokens"])
def test_budget_at_any_cut(model, ids, mask, cuts):
    """A budget gives the same logits however the sequence is cut; layers of full attention are not bounded by it."""
    expected = model(ids, attention_mask=mask, threshold=0.5, kv_budget=9, use_cache=False).logits
    cache = HAMCache(model.config)
    logits = feed(model, cache, ids, cuts, mask, threshold=0.5, kv_budget=9)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert cache.kept_tokens()[[0, 2]].max() == 9
    assert cache.kept_tokens()[1].tolist() == [[60, 60], [53, 53], [53, 53]]


def test_a_budget_can_come_late(model, ids):
    """The first call with a budget drops what is too much; a call without one lets the cache grow again."""
    cache = filled(model, ids[:, :40], threshold=0.0)
    best = cache.layers[0].store.tokens()
    feed(model, cache, ids[:, :41], threshold=2.0, kv_budget=5)
    for stream in range(6):
        scores, positions = best.scores[best.streams == stream], best.positions[best.streams == stream]
        highest = positions[scores.argsort(descending=True)[:5]].sort().values
        assert torch.equal(cache.kept_positions(0)[stream // 2][stream % 2], highest)
    feed(model, cache, ids, (1, 2), threshold=0.0)
    assert (cache.kept_tokens()[[0, 2]] == 24).all()


# --- before the first token ------------------------------------------------------------------------------------------


def test_an_empty_cache(model, tmp_path):
    cache = HAMCache(model.config)
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes() == cache.state_bytes() == 0
    assert not cache.is_initialized
    assert cache.real_tokens is None
    assert cache.batch_size == -1
    assert len(cache) == 4
    for ask in (
        cache.kept_tokens,
        cache.kv_usage,
        cache.full_kv_bytes,
        lambda: cache.kept_positions(0),
        lambda: cache.prune(0.5),
        lambda: cache.save(tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match="seen no tokens yet"):
            ask()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="reaches past the 0 tokens"):
        cache.crop(-1)
    for harmless in (
        cache.reset,
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        harmless()
    assert not cache.is_initialized


def test_rows_and_prune_work_where_an_offloaded_layer_lies(model, ids):
    """An offloaded layer's tensors are not on the device it works on, here one that holds no data."""
    cache, expected = filled(model, ids[:, :20]), filled(model, ids[:, :20])
    for layer in cache.layers:
        layer.device = torch.device("meta")
    rows = torch.arange(cache.batch_size).flip(0)
    for each in (cache, expected):
        each.reorder_cache(rows)
        each.prune(0.5)
    assert torch.equal(cache.kept_tokens(), expected.kept_tokens())
