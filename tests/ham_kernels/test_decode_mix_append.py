# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares the end of a decoding step with the model's own mix, and the appended tokens with the host's."""

import importlib

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from ham_hf.cache_ham import GROWS
from ham_hf.paged_store_ham import PAGE_SIZE, KeptTokens, PagedStore
from ham_kernels.decode_mix_append import OpenPages, decode_mix_append
from ham_kernels.decode_update import DecodeUpdate
from ham_kernels.ragged_decode_attention import ragged_decode_attention, slab_table

# The package gives the function this name.
module = importlib.import_module("ham_kernels.decode_mix_append")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = (*PagedStore.FIELDS, "streams")


class DeviceStore(PagedStore):
    """A store with a table of its slabs, on a CPU too, and NaN in its free slots and pages."""

    def _new_pages(self, pages, device):
        new = super()._new_pages(pages, device)
        for name in ("keys", "values", "scores"):
            new[name].fill_(torch.nan)
        return new

    def make_room(self):
        """Reserves pages before a step, as HAMCache does for its stores."""
        if not self.reserved_steps:
            counts = self.counts.cpu()
            self.reserve(counts, grow=self.shortage(counts) >= GROWS)

    def index(self):
        if not self.slabs:
            return None
        if self._slab_table is None:
            names = ("keys", "values", "owner", "rank", "scores", "positions")
            self._slab_table = slab_table([tuple(slab[name] for name in names) for slab in self.slabs])
        return self._slab_table, self.counts


def rms_norm(x, weight, eps):
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def composed(o_rnn, o_kv, gates, output_gate, norm_weights, eps=1e-6, gate_activation="silu"):
    """Output of `HAMMixer.mix` before the projection."""
    mixed = rms_norm(o_rnn, norm_weights[0], eps)
    if o_kv is not None:
        mixed = gates[0].sigmoid()[..., None] * mixed
        mixed = mixed + gates[1].sigmoid()[..., None] * rms_norm(o_kv, norm_weights[1], eps)
    activation = {"silu": F.silu, "sigmoid": torch.sigmoid}[gate_activation]
    return mixed.flatten(1) if output_gate is None else mixed.flatten(1) * activation(output_gate)


def make(device, batch=2, kv_heads=2, groups=1, key_dim=16, value_dim=16, dtype=torch.float32, without=()):
    """Random arguments of the mix, by name; an update; an empty store. `without` names absent parts."""
    heads = kv_heads * groups

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    attention = "attention" not in without
    weights = [1 + randn(value_dim) / 5 if name not in without else None for name in ("rnn_norm", "kv_norm")]
    mix = {
        "o_rnn": randn(batch, heads, value_dim),
        "o_kv": randn(batch, heads, value_dim) if attention else None,
        "gates": (randn(batch, heads), randn(batch, heads)) if attention else None,
        "output_gate": randn(batch, heads * value_dim) if "output_gate" not in without else None,
        "norm_weights": (weights[0], weights[1] if attention else None),
    }
    update = DecodeUpdate(mix["o_rnn"])
    store = DeviceStore(batch * kv_heads, key_dim, value_dim, dtype, torch.device(device))
    if attention:
        update = update._replace(
            q=randn(batch, heads, key_dim),
            k=randn(batch, kv_heads, key_dim),
            v=randn(batch, kv_heads, value_dim),
            scores=torch.rand(batch, kv_heads, device=device),
            keep=torch.ones(batch, kv_heads, dtype=torch.bool, device=device),
        )
    return mix, update, store


def run(mix, update, store, position=0, real=None, real_tokens=None, **options):
    """Runs the kernel, which appends to the store, and counts the step; `position` is a number or one for each row."""
    positions = torch.zeros(len(update.o), dtype=torch.long, device=update.o.device) + position
    arguments = {name: x for name, x in mix.items() if name != "o_rnn"}
    if update.k is not None:
        store.make_room()
        store.reserved_steps -= 1
        arguments["pages"] = store.open_pages()
    return decode_mix_append(
        update,
        positions,
        positions.clone() if real_tokens is None else real_tokens,
        real=real,
        **arguments,
        **options,
    )


def cast(mix, dtype):
    def one(x):
        return tuple(map(one, x)) if isinstance(x, tuple) else x.to(dtype) if isinstance(x, torch.Tensor) else x

    return {name: one(x) for name, x in mix.items()}


@pytest.mark.parametrize("without", [(), ("rnn_norm",), ("kv_norm", "output_gate"), ("attention",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mix_is_the_model_s(dtype, without, device, assert_error_within, arithmetic_as_on_a_gpu):
    mix, update, store = make(device, batch=8, groups=2, dtype=dtype, without=without)
    baseline, reference = composed(**mix), composed(**cast(mix, torch.float64))
    out = run(mix, update, store)
    assert out.dtype == baseline.dtype
    assert_error_within(out, reference, baseline)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "kv_heads": 1, "groups": 1, "key_dim": 16, "value_dim": 33},
        {"batch": 3, "kv_heads": 2, "groups": 3, "key_dim": 12, "value_dim": 20},
        {"batch": 1, "kv_heads": 3, "groups": 4, "key_dim": 6, "value_dim": 5},
    ],
    ids=str,
)
def test_odd_sizes(sizes, device, assert_error_within):
    mix, update, store = make(device, **sizes)
    out = run(mix, update, store)
    assert_error_within(out, composed(**cast(mix, torch.float64)), composed(**mix))
    tokens = store.tokens()
    assert torch.equal(tokens.keys, update.k.flatten(0, 1))
    assert torch.equal(tokens.values, update.v.flatten(0, 1))


@pytest.mark.parametrize("without", [(), ("attention",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sigmoid_gate_and_another_epsilon(dtype, without, device, assert_error_within, arithmetic_as_on_a_gpu):
    mix, update, store = make(device, batch=8, groups=2, dtype=dtype, without=without)
    mix |= {"gate_activation": "sigmoid", "eps": 0.1}
    out = run(mix, update, store)
    assert_error_within(out, composed(**cast(mix, torch.float64)), composed(**mix))


def assert_same_tokens(found, expected):
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def assert_free_pages_are_not_read(store, update):
    device = update.k.device
    q, new = torch.randn(4, 1, 1, 6, device=device), (x.flatten(0, 1).unsqueeze(1) for x in update[2:4])
    arguments = (q, *new, torch.ones(4, 1, dtype=torch.bool, device=device))
    tail = (store.tail["keys"], store.tail["values"], store.fill)
    whole = [(x["keys"], x["values"], x["owner"]) for x in store.slabs]
    used = [(x["keys"], x["values"], x["owner"]) for x in store.pages()]
    assert sum(len(x[2]) for x in whole) > sum(len(x[2]) for x in used), "free pages are to be seen and not read"
    found = ragged_decode_attention(*arguments, whole, tail, index=store.index())
    torch.testing.assert_close(found, ragged_decode_attention(*arguments, used, tail), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prompt", [14, *(pytest.param(x, marks=pytest.mark.slow) for x in (0, 100))])
def test_appends_what_the_host_would(prompt, device, monkeypatch):
    """Streams that keep all, none and some, over full pages and new slabs; then the host continues with the store."""
    monkeypatch.setattr(module, "SLAB_BLOCK", 2)  # the kernel then searches the slabs in several rounds
    mix, update, store = make(device, batch=2, kv_heads=2, key_dim=6, value_dim=10)
    twin = PagedStore(4, 6, 10, torch.float32, torch.device(device))
    streams = torch.arange(4, device=device)
    positions = torch.arange(prompt, device=device).repeat(4).int()
    held = KeptTokens(
        torch.randn(4 * prompt, 6, device=device),
        torch.randn(4 * prompt, 10, device=device),
        torch.rand(4 * prompt, device=device),
        positions,
        streams.repeat_interleave(prompt),
    )
    store.append(held)
    twin.append(held)
    slabs, synchronised, mark = len(store.slabs), 0, None
    for step in range(70):
        update.k.normal_()
        update.v.normal_()
        update.scores.uniform_()
        update.keep.copy_(torch.tensor([[True, False], [step % 3 == 0, step > 40]]))
        synchronised += not store.reserved_steps
        run(mix, update, store, position=prompt + step)
        keep = update.keep.flatten()
        fields = (update.k.flatten(0, 1), update.v.flatten(0, 1), update.scores.flatten())
        new = (*(x[keep] for x in fields), torch.full_like(streams[keep], prompt + step).int(), streams[keep])
        twin.append(KeptTokens(*new))
        if step == 30:
            mark = store.mark(), twin.mark()
    assert len(store.slabs) > slabs + 1, "growth is to be seen"
    assert synchronised < 40, "steps that need no look from the host are to be seen"
    assert store.counts.tolist() == twin.counts.tolist()
    assert sum(store.used) == sum(twin.used) == int((twin.counts // PAGE_SIZE).sum())
    assert_same_tokens(store.tokens(), twin.tokens())

    assert_free_pages_are_not_read(store, update)
    chosen = torch.tensor([3, 0, 0], device=device)
    assert_same_tokens(store.selected(chosen).tokens(), twin.selected(chosen).tokens())
    store.append(held)
    twin.append(held)
    assert_same_tokens(store.tokens(), twin.tokens())
    lowest = KeptTokens(*(x[keep] for x in fields), torch.full_like(streams[keep], 999).int(), streams[keep])
    store.replace_lowest(lowest)
    twin.replace_lowest(lowest)
    assert_same_tokens(store.tokens(), twin.tokens())
    store.make_room()
    assert len(store.open_pages()[-1]) == len(store.slabs)
    store.rollback(mark[0])
    twin.rollback(mark[1])
    assert len(store.slabs) == mark[0]["slabs"]
    assert len(store.open_pages()[-1]) == len(store.slabs), "the table has slabs that are gone"
    assert store.reserved_steps == 0, "the room was in slabs that are gone"
    assert_same_tokens(store.tokens(), twin.tokens())
    run(mix, update, store, position=prompt + 31)
    assert store.counts.tolist() == (twin.counts + update.keep.flatten()).tolist()


def test_a_store_that_moves_leaves_its_addresses_behind(device):
    _, _, store = make(device)
    store.make_room()
    store.open_pages()
    store.to(torch.device("meta"))
    assert {x.device.type for x in store.tensors()} == {"meta"}


def test_padding_is_neither_kept_nor_counted(device):
    mix, update, store = make(device, batch=3)
    real = torch.tensor([True, False, True], device=device)
    update.keep[1] = False  # as `decode_update` returns it
    real_tokens = torch.tensor([5, 5, 5], device=device)
    run(mix, update, store, position=5, real=real, real_tokens=real_tokens)
    assert real_tokens.tolist() == [6, 5, 6]
    assert store.counts.tolist() == [1, 1, 0, 0, 1, 1]
    assert store.tokens().positions.tolist() == [5] * 4


def test_a_layer_without_attention_counts_tokens(device):
    mix, update, store = make(device, without=("attention",))
    real_tokens = torch.tensor([5, 5], device=device)
    run(mix, update, store, position=5, real_tokens=real_tokens)
    assert real_tokens.tolist() == [6, 6]


class PlainStream:
    """What a stream with a window of `slots` tokens holds, as lists of `(position, key, value, score, keep)`."""

    def __init__(self, slots, sinks):
        self.slots, self.sinks = slots, sinks
        self.kept, self.recent = [], []

    def take(self, position, key, value, score, keep):
        if len(self.recent) == self.slots:
            oldest = self.recent.pop(0)
            if oldest[-1]:
                self.kept.append(oldest)
        self.recent.append((position, key, value, torch.inf if position < self.sinks else score, keep))


def assert_holds_the_same(window, store, streams):
    """Compares windows, slots never written included, and the store with a list of `PlainStream`."""
    expected = [torch.full_like(x, torch.nan) for x in window[:3]] + [torch.zeros_like(window[3])]
    for n, stream in enumerate(streams):
        for position, *fields in stream.recent:
            for x, field in zip(expected, fields, strict=True):
                x[n, position % stream.slots] = field
    for found, x in zip(window, expected, strict=True):
        torch.testing.assert_close(found, x, atol=0, rtol=0, equal_nan=True)
    held, tokens = store.tokens(), [(n, *token) for n, stream in enumerate(streams) for token in stream.kept]
    assert held.streams.tolist() == [n for n, *_ in tokens]
    assert held.positions.tolist() == [position for _, position, *_ in tokens]
    for found, kind in ((held.keys, 2), (held.values, 3)):
        assert torch.equal(found, torch.stack([x[kind] for x in tokens]) if tokens else found[:0])
    assert held.scores.tolist() == [float(x[4]) for x in tokens]


def make_window(store, slots):
    """An empty window beside a store: NaN, and nothing to keep."""
    streams, device = store.num_streams, store.device
    keys, values = (
        torch.full((streams, slots, dim), torch.nan, dtype=store.dtype, device=device)
        for dim in (store.key_dim, store.value_dim)
    )
    scores = torch.full((streams, slots), torch.nan, device=device)
    return keys, values, scores, torch.zeros(streams, slots, dtype=torch.bool, device=device)


@pytest.mark.parametrize(
    ("slots", "sinks", "dtype"),
    [
        pytest.param(1, 0, torch.float32, marks=pytest.mark.slow),
        pytest.param(4, 3, torch.bfloat16, marks=pytest.mark.slow),
        (5, 9, torch.float16),
        (63, 2, torch.float32),
    ],
)
def test_tokens_come_of_age_in_a_window(slots, sinks, dtype, device):
    """Heads that keep all, nothing and some; one row begins with some tokens seen, and pauses with padding."""
    mix, update, store = make(device, key_dim=6, value_dim=10, dtype=dtype)
    window, streams = make_window(store, slots), [PlainStream(slots, sinks) for _ in range(4)]
    position = torch.tensor([0, 7], device=device)
    for seen in range(7):
        for stream in streams[2:]:
            stream.recent.append((seen, *(torch.full_like(x[0, 0], torch.nan) for x in window[:3]), False))
            del stream.recent[:-slots]
    steps = 100 if slots > 50 else 60
    for step in range(steps):
        for x in (update.k, update.v, update.scores):
            x.uniform_(-1, 1)
        real = torch.tensor([True, step % 7 < 5], device=device)
        keep = torch.tensor([[True, False], [step % 3 == 0, step % 20 < 10]], device=device)
        update.keep.copy_(keep & real[:, None])
        real_tokens = position.clone()
        run(mix, update, store, position, real, real_tokens, window=window, sinks=sinks)
        for n in range(4):
            if real[n // 2]:
                fields = (x.flatten(0, 1)[n].clone() for x in (*update[2:4], update.scores, update.keep))
                streams[n].take(int(position[n // 2]), *fields)
        position += real
        assert torch.equal(real_tokens, position)
        if step in (0, 1, slots, slots + 1) or step % 20 == 19:
            assert_holds_the_same(window, store, streams)
    assert int(store.full_pages) >= (steps - slots) // PAGE_SIZE


def test_a_window_leaves_the_mix_as_it_is(device):
    mix, update, store = make(device, groups=2)
    expected = run(mix, update, store)
    assert torch.equal(run(mix, update, store, window=make_window(store, 5)), expected)


def test_sinks_score_infinitely(device):
    """Also without a window."""
    mix, update, store = make(device)
    for position in range(4):
        run(mix, update, store, torch.tensor([position, position + 2], device=device), sinks=3)
    scores = store.tokens().scores.view(4, 4)
    assert (scores == torch.inf).tolist() == [[True] * 3 + [False]] * 2 + [[True] + [False] * 3] * 2
    assert torch.equal(scores[:, 3], update.scores.flatten())


def test_addresses_of_windows_have_64_bits(last_of):
    """The last of very many streams gives the same as alone."""
    slots, dim, page = 32, 256, 16
    update = DecodeUpdate(
        torch.randn(1, 1, dim).half(),
        None,
        *torch.randn(2, 1, 1, dim).half(),
        torch.rand(1, 1),
        torch.ones(1, 1).bool(),
    )
    o_kv, ring, tail = (
        torch.randn(1, 1, dim).half(),
        torch.randn(2, 1, slots, dim).half(),
        torch.zeros(2, 1, page, dim).half(),
    )

    def results(rows):
        opened = OpenPages(
            *(last_of(rows, x) for x in tail),
            torch.zeros(rows, page),
            torch.zeros(rows, page, dtype=torch.int32),
            torch.zeros(rows, dtype=torch.long),
            torch.tensor(0),
            torch.zeros(1, module.APPEND_FIELDS, dtype=torch.long),
        )
        keep = torch.ones(rows, slots, dtype=torch.bool)
        window = (*(last_of(rows, x) for x in ring), last_of(rows, torch.rand(1, slots)), keep)
        gates = (torch.zeros(rows, 1).half(), torch.zeros(rows, 1).half())
        many = DecodeUpdate(*(x if x is None else last_of(rows, x) for x in update))
        positions, real_tokens = torch.full((rows,), 40), torch.zeros(rows, dtype=torch.long)
        decode_mix_append(
            many, positions, real_tokens, o_kv=last_of(rows, o_kv), gates=gates, pages=opened, window=window
        )
        return [x[-1] for x in (*window[:2], *opened[:2], opened.positions, opened.counts)]

    for far, alone in zip(results(2**18 + 1), results(1), strict=True):
        assert torch.equal(far, alone)
    assert torch.equal(alone, torch.tensor(1)), "the token of position 8 has come of age"


@pytest.mark.parametrize("held", [20, 31])
def test_addresses_have_64_bits(held, last_of):
    """The last of very many streams gives the same as alone, whether its open page takes the token or is full."""
    groups, page, dim = 16, 16, 256  # each stream has 4,096 numbers of outputs and as many of pages
    update = DecodeUpdate(
        torch.randn(1, 2 * groups, dim).half(),
        None,
        *torch.randn(2, 1, 2, dim).half(),
        torch.rand(1, 2),
        torch.ones(1, 2, dtype=torch.bool),
    )
    gates, (o_kv, z) = tuple(torch.randn(2, 1, 2 * groups).half()), torch.randn(2, 1, 2 * groups * dim).half()
    tail_k, tail_v = torch.randn(2, 1, 2, page, dim).half()

    def results(rows):
        streams = 2 * rows
        kinds = ((torch.half, dim), (torch.half, dim), (torch.int32, 0), (torch.int32, 0), (torch.float, 1))
        slab = [torch.empty(streams, *([page] if n else []), *([n] if n > 1 else []), dtype=t) for t, n in kinds]
        slab.append(torch.empty(streams, page, dtype=torch.int32))
        opened = OpenPages(
            *(last_of(rows, x).flatten(0, 1) for x in (tail_k, tail_v)),
            torch.zeros(streams, page),
            torch.zeros(streams, page, dtype=torch.int32),
            torch.full((streams,), held),
            torch.tensor(streams - 1),  # one page is free
            slab_table([tuple(slab)]),
        )
        many = DecodeUpdate(*(x if x is None else last_of(rows, x) for x in update))
        out = decode_mix_append(
            many,
            torch.full((rows,), 40),
            torch.zeros(rows, dtype=torch.long),
            output_gate=last_of(rows, z),
            o_kv=last_of(rows, o_kv.view(1, 2 * groups, dim)),
            gates=tuple(last_of(rows, x) for x in gates),
            pages=opened,
        )
        seal = opened.full_pages.item() == streams
        stored = [x[-1] for x in (slab if seal else opened[:4])]
        return seal, [out[-1, groups * dim :], opened.counts[-1], *stored]

    (seal, alone), (sealed, far) = results(1), results(2**18 + 1)
    assert seal == sealed == (held % page == page - 1)
    if seal:  # the page's owner is the stream itself
        assert (alone.pop(4).item(), far.pop(4).item()) == (1, 2**19 + 1)
    for a, b in zip(alone, far, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.zeros(2).int()}, r"`positions` must be \[2\] of torch.int64"),
        ({"real_tokens": torch.zeros(3).long()}, r"`real_tokens` must be \[2\]"),
        ({"real": torch.zeros(2)}, "`real` must be .*bool"),
        ({"norm_weights": (torch.ones(15), None)}, r"`norm_weights\[0\]` must be \[16\]"),
        ({"output_gate": torch.zeros(2, 31)}, r"`output_gate` must be \[2, 32\]"),
        ({"o_kv": torch.zeros(2, 2, 16, requires_grad=True)}, "`o_kv` requires a gradient"),
        ({"o_kv": None}, r"must all be given, or none of them, got None for \['o_kv'\]"),
        ({"gates": (torch.zeros(2, 2), torch.zeros(2))}, r"`gates\[1\]` must be \[2, 2\]"),
        ({"update": DecodeUpdate(torch.zeros(2, 2, 16).double())}, "`update.o` must be .*float64"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    mix, update, store = make("cpu")
    store.make_room()
    arguments = {"update": update, "positions": torch.zeros(2).long(), "real_tokens": torch.zeros(2).long()}
    arguments |= {name: x for name, x in mix.items() if name != "o_rnn"} | {"pages": store.open_pages()}
    with pytest.raises(ValueError, match=message):
        decode_mix_append(**(arguments | changes))
    assert store.counts.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, lambda x: x[:, :0], r"`window.keys` must be \[N, R, K\] with a slot or more, got \[4, 0, 16\]"),
        (0, torch.Tensor.half, "`window.keys` must be .*float16"),
        (1, lambda x: x[:, :4].contiguous(), r"`window.values` must be \[4, 5, 16\] of .*got \[4, 4, 16\]"),
        (2, torch.Tensor.double, r"`window.scores` must be \[4, 5\] of torch.float32.*float64"),
        (3, torch.Tensor.int, r"`window.keep` must be \[4, 5\] of torch.bool"),
        (3, lambda x: x.mT.contiguous().mT, "`window.keep` must be .*contiguous"),
    ],
)
def test_a_bad_window_is_refused(part, change, message):
    mix, update, store = make("cpu")
    window = [change(x) if i == part else x for i, x in enumerate(make_window(store, 5))]
    with pytest.raises(ValueError, match=message):
        run(mix, update, store, window=tuple(window))


def test_options_that_do_not_fit_are_refused():
    mix, update, store = make("cpu")
    with pytest.raises(ValueError, match="`sinks` must be an int of at least 0, got 'four'"):
        run(mix, update, store, sinks="four")
    window = make_window(store, 5)
    mix, update, store = make("cpu", without=("attention",))
    with pytest.raises(ValueError, match="`window` must be None without `pages`"):
        run(mix, update, store, window=window)


def test_slabs_that_lack_scores_are_refused():
    mix, update, store = make("cpu")
    store.make_room()
    pages = (*store.open_pages()[:-1], store.open_pages()[-1][:, :6].contiguous())
    arguments = {name: x for name, x in mix.items() if name != "o_rnn"} | {"pages": pages}
    with pytest.raises(ValueError, match=r"`pages.slabs` must be \[1, 8\]"):
        decode_mix_append(update, torch.zeros(2).long(), torch.zeros(2).long(), **arguments)
