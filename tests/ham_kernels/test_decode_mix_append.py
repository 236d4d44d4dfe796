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


def run(mix, update, store, position=0, real=None, real_tokens=None):
    """Runs the kernel, which appends to the store, and counts the step."""
    batch, device = len(update.o), update.o.device
    arguments = {name: x for name, x in mix.items() if name != "o_rnn"}
    if update.k is not None:
        store.make_room()
        store.reserved_steps -= 1
        arguments["pages"] = store.open_pages()
    return decode_mix_append(
        update,
        torch.full((batch,), position, device=device),
        torch.full((batch,), position, device=device) if real_tokens is None else real_tokens,
        real=real,
        **arguments,
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


@pytest.mark.parametrize("prompt", [0, 14, 100])
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


def test_slabs_that_lack_scores_are_refused():
    mix, update, store = make("cpu")
    store.make_room()
    pages = (*store.open_pages()[:-1], store.open_pages()[-1][:, :6].contiguous())
    arguments = {name: x for name, x in mix.items() if name != "o_rnn"} | {"pages": pages}
    with pytest.raises(ValueError, match=r"`pages.slabs` must be \[1, 8\]"):
        decode_mix_append(update, torch.zeros(2).long(), torch.zeros(2).long(), **arguments)
