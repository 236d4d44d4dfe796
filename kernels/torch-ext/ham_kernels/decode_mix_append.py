# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The end of one token in one launch: gates, norms and mix of the two memories, and the kept token's place in a page.

With a window a token goes to a ring of its stream, over the one that comes of age, which goes to a page or is dropped.

A program has one stream, a row's key/value head with the query heads that share it: its open page belongs to no other
program, so it is updated where it lies. All that streams share is the number of full pages, which each adds 1 to when
its page is full; in which order they do so shows nowhere, because pages are found by owner and rank.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .decode_update import DTYPES, DecodeUpdate, block_sizes, check_sinks, check_tensors
from .ragged_decode_attention import SLAB_FIELDS
from .tuning import check_platform

GATE_ACTIVATIONS = ("silu", "sigmoid")
# Numbers of a slab for the append: also the addresses of scores and positions.
APPEND_FIELDS = SLAB_FIELDS + 2
# Slabs that a program searches at once for the one that holds a page.
SLAB_BLOCK = 64


@triton.jit
def _mixed(o, weight, place, o_v, mask, eps, V: tl.constexpr):
    """Outputs `[heads, V]` of a memory, after their RMSNorm if there is one."""
    x = tl.load(o + place, mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        x *= tl.rsqrt(tl.sum(x * x, 1) / V + eps)[:, None]
        x *= tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _gate(logits, head, mask):
    return tl.sigmoid(tl.load(logits + head, mask=mask, other=0.0).to(tl.float32))[:, None]


@triton.jit(do_not_specialize=["num_slabs", "num_slots"])
def decode_mix_append_fwd_kernel(
    o_rnn, o_kv, rnn_gate, kv_gate, z, rnn_weight, kv_weight, out, positions, real, real_tokens, k, v, scores, keep,
    tail_k, tail_v, tail_scores, tail_positions, counts, full_pages, slabs, num_slabs,
    window_k, window_v, window_scores, window_keep, num_slots, eps,
    HK: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, FIELDS: tl.constexpr,
    SILU: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One token of one stream: mixes the outputs of its memories, and appends it to the pages if it is kept.

    With a window it appends the token that comes of age instead, if that is kept.
    """
    stream = tl.program_id(0).to(tl.int64)
    row = stream // HK
    o_g, o_v = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    in_g = o_g < G
    mask = in_g[:, None] & (o_v < V)[None, :]
    place = (stream * G + o_g[:, None]) * V + o_v[None, :]
    mixed = _mixed(o_rnn, rnn_weight, place, o_v, mask, eps, V)
    if o_kv is not None:
        mixed *= _gate(rnn_gate, stream * G + o_g, in_g)
        mixed += _gate(kv_gate, stream * G + o_g, in_g) * _mixed(o_kv, kv_weight, place, o_v, mask, eps, V)
    if z is not None:
        gate = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
        activation = tl.sigmoid(gate)
        if SILU:
            activation *= gate
        mixed *= activation
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=mask)

    position = tl.load(positions + row)
    is_real = tl.full([], 1, dtype=tl.int1)
    if real is not None:
        is_real = tl.load(real + row) != 0
    tl.store(real_tokens + row, position + 1, mask=(stream % HK == 0) & is_real)
    if o_kv is not None:
        if window_k is None:
            if tl.load(keep + stream) != 0:
                key, value, score = _token(k, v, scores, stream, K, V, BLOCK_K, BLOCK_V)
                score = _stored_score(score, position, SINKS)
                count = tl.load(counts + stream)
                # Every thread loads the count; all must have read it before one writes.
                tl.debug_barrier()
                _append(
                    key, value, score, position, count, tail_k, tail_v, tail_scores, tail_positions, counts,
                    full_pages, slabs, num_slabs, stream, K, V, PAGE, FIELDS, BLOCK_K, BLOCK_V, BLOCK_S,
                )  # fmt: skip
        elif is_real:
            slot = stream * num_slots + position % num_slots
            key, value, score, kept, count = _exchange(
                k, v, scores, keep, position, window_k, window_v, window_scores, window_keep, counts, slot, stream,
                K, V, SINKS, BLOCK_K, BLOCK_V,
            )  # fmt: skip
            if (position >= num_slots) & kept:
                _append(
                    key, value, score, position - num_slots, count, tail_k, tail_v, tail_scores, tail_positions,
                    counts, full_pages, slabs, num_slabs, stream, K, V, PAGE, FIELDS, BLOCK_K, BLOCK_V, BLOCK_S,
                )  # fmt: skip


@triton.jit
def _token(k, v, scores, place, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Key, value and score at a place."""
    o_k, o_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    key = tl.load(k + place * K + o_k, mask=o_k < K)
    value = tl.load(v + place * V + o_v, mask=o_v < V)
    return key, value, tl.load(scores + place)


@triton.jit
def _stored_score(score, position, SINKS: tl.constexpr):
    """The score of a new token as it is stored: an infinite one for sinks, which no budget and no pruning drops."""
    if SINKS:
        score = tl.where(position < SINKS, float("inf"), score)
    return score


@triton.jit
def _exchange(
    k, v, scores, keep, position, window_k, window_v, window_scores, window_keep, counts, slot, stream,
    K: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes the new token of a stream to a slot of the window, and returns the token that was there.

    That is key, value, score and whether it is kept, and the number of tokens in the stream's pages.
    """
    o_k, o_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    old_key, old_value, old_score = _token(window_k, window_v, window_scores, slot, K, V, BLOCK_K, BLOCK_V)
    old_kept, count = tl.load(window_keep + slot) != 0, tl.load(counts + stream)
    # Several threads load the same numbers, also the count; all must have read them before one writes.
    tl.debug_barrier()
    key, value, score = _token(k, v, scores, stream, K, V, BLOCK_K, BLOCK_V)
    tl.store(window_k + slot * K + o_k, key, mask=o_k < K)
    tl.store(window_v + slot * V + o_v, value, mask=o_v < V)
    tl.store(window_scores + slot, _stored_score(score, position, SINKS))
    tl.store(window_keep + slot, tl.load(keep + stream))
    return old_key, old_value, old_score, old_kept, count


@triton.jit
def _append(
    key, value, score, position, count, tail_k, tail_v, tail_scores, tail_positions, counts, full_pages, slabs,
    num_slabs, stream, K: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Appends a token to its stream; if it fills the open page, copies that to the next free page of a slab."""
    o_k, o_v, o_p, o_s = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, PAGE), tl.arange(0, BLOCK_S)
    in_k, in_v = o_k < K, o_v < V
    position = position.to(tl.int32)
    slot = stream * PAGE + count % PAGE
    tl.store(counts + stream, count + 1)
    if count % PAGE < PAGE - 1:
        tl.store(tail_k + slot * K + o_k, key, mask=in_k)
        tl.store(tail_v + slot * V + o_v, value, mask=in_v)
        tl.store(tail_scores + slot, score)
        tl.store(tail_positions + slot, position)
    else:
        page = tl.atomic_add(full_pages, 1)
        index = 0
        for begin in range(0, num_slabs, BLOCK_S):
            slab = slabs + (begin + o_s) * FIELDS
            in_use = begin + o_s < num_slabs
            end = tl.load(slab + 4, mask=in_use, other=0) + tl.load(slab + 5, mask=in_use, other=0)
            index += tl.sum((in_use & (end <= page)).to(tl.int32), 0)
        slab = slabs + index * FIELDS
        page -= tl.load(slab + 4)
        # The last slot comes from registers: through the open page, other threads would have to see its write.
        last = o_p == PAGE - 1
        slots = stream * PAGE + o_p
        target = page * PAGE + o_p
        keys = tl.load(tail_k + slots[:, None] * K + o_k[None, :], mask=in_k[None, :])
        values = tl.load(tail_v + slots[:, None] * V + o_v[None, :], mask=in_v[None, :])
        element = tl.pointer_type(tail_k.dtype.element_ty)
        slab_k, slab_v = tl.load(slab).to(element), tl.load(slab + 1).to(element)
        tl.store(
            slab_k + target[:, None] * K + o_k[None, :],
            tl.where(last[:, None], key[None, :], keys),
            mask=in_k[None, :],
        )
        tl.store(
            slab_v + target[:, None] * V + o_v[None, :],
            tl.where(last[:, None], value[None, :], values),
            mask=in_v[None, :],
        )
        slab_scores = tl.load(slab + 6).to(tl.pointer_type(tl.float32))
        slab_positions = tl.load(slab + 7).to(tl.pointer_type(tl.int32))
        tl.store(slab_scores + target, tl.where(last, score, tl.load(tail_scores + slots)))
        tl.store(slab_positions + target, tl.where(last, position, tl.load(tail_positions + slots)))
        tl.store(tl.load(slab + 2).to(tl.pointer_type(tl.int32)) + page, stream.to(tl.int32))
        tl.store(tl.load(slab + 3).to(tl.pointer_type(tl.int32)) + page, (count // PAGE).to(tl.int32))


class Window(NamedTuple):
    """The last `R` tokens of `N` streams, kept or not; the token at position `p` of its row is in slot `p % R`.

    Attributes:
        keys, values: `[N, R, K]` and `[N, R, V]`, contiguous.
        scores: `[N, R]` float32, infinite for sinks.
        keep: `[N, R]` bool, true for tokens that are kept when they come of age.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    keep: torch.Tensor


class OpenPages(NamedTuple):
    """The open pages of `N` streams, to which the device appends, and the table of the full ones.

    Attributes:
        keys, values: `[N, p, K]` and `[N, p, V]`, contiguous, `p` a power of two.
        scores, positions: `[N, p]` float32 and int32.
        counts: `[N]` int64 tokens that each stream holds, in open and full pages.
        full_pages: int64 scalar, number of pages in use in all slabs, over all streams.
        slabs: `slab_table` of slabs `(keys, values, owner, rank, scores, positions)`, with a free page for every
            stream whose open page lacks one token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    full_pages: torch.Tensor
    slabs: torch.Tensor


def decode_mix_append_fwd(
    update: DecodeUpdate,
    positions: torch.Tensor,
    real_tokens: torch.Tensor,
    real: torch.Tensor | None,
    norm_weights: tuple[torch.Tensor | None, torch.Tensor | None],
    output_gate: torch.Tensor | None,
    o_kv: torch.Tensor | None,
    gates: tuple[torch.Tensor, torch.Tensor] | None,
    pages: OpenPages | None,
    eps: float,
    gate_activation: str,
    window: Window | None,
    sinks: int,
) -> torch.Tensor:
    """Launches the kernel on arguments that `decode_mix_append` has checked."""
    batch, heads, value_dim = update.o.shape
    kv_heads, key_dim, page, num_slabs = heads, 1, 1, 0
    if pages is not None and update.k is not None:
        _, kv_heads, key_dim = update.k.shape
        page, num_slabs = pages.keys.shape[1], len(pages.slabs)
    groups = heads // kv_heads
    blocks = block_sizes(groups, key_dim, value_dim)
    del blocks["TILE_V"]
    out = update.o.new_empty(batch, heads * value_dim)
    decode_mix_append_fwd_kernel[(batch * kv_heads,)](
        update.o, o_kv, *(gates or (None, None)), output_gate, *norm_weights, out, positions, real, real_tokens,
        *update[2:], *(pages or [None] * len(OpenPages._fields)), num_slabs,
        *(window or [None] * len(Window._fields)), None if window is None else window.keys.shape[1], eps,
        HK=kv_heads, G=groups, K=key_dim, V=value_dim, PAGE=page, FIELDS=APPEND_FIELDS,
        SILU=gate_activation == "silu", SINKS=sinks, **blocks, BLOCK_S=SLAB_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


def decode_mix_append(
    update: DecodeUpdate,
    positions: torch.Tensor,
    real_tokens: torch.Tensor,
    real: torch.Tensor | None = None,
    norm_weights: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    output_gate: torch.Tensor | None = None,
    o_kv: torch.Tensor | None = None,
    gates: tuple[torch.Tensor, torch.Tensor] | None = None,
    pages: OpenPages | None = None,
    eps: float = 1e-6,
    gate_activation: str = "silu",
    window: Window | None = None,
    sinks: int = 0,
) -> torch.Tensor:
    """Mixes the outputs of a token's two memories, and appends the kept tokens to their streams' pages in place.

    `(sigmoid(gates[0]) RMSNorm(o_rnn) + sigmoid(gates[1]) RMSNorm(o_kv)) * silu(output_gate)`; without attention
    `RMSNorm(o_rnn) * silu(output_gate)`; or with a sigmoid in place of the SiLU. A kept token goes to the next slot of
    its stream's open page; if that is then full, it is copied to the next free page of the slabs. With a window of `R`
    tokens this happens to the token `R` positions earlier, whose slot the new one takes, kept or not. One launch, no
    backward; the host never waits, and must have reserved free pages.

    Args:
        update: the result of `decode_update` for `B` rows in bfloat16, float16 or float32. A tensor without a dtype
            below has this one.
        positions: `[B]` int64 index of each token among its row's real ones.
        real_tokens: `[B]` int64 number of real tokens seen, which becomes `positions + 1`.
        real: `[B]` bool, false for padding, which changes nothing and has undefined outputs; `None` if all are real.
        norm_weights: `[V]` each, of the RMSNorms of the two outputs; `None` for no norm.
        output_gate: `[B, H * V]` before its activation, or `None` for no gate.
        o_kv: `[B, H, V]` output of the attention; `o_kv`, `gates` and `pages` are `None` in a layer without attention.
        gates: `[B, H]` each, of the RNN's and the attention's output, before the sigmoid.
        pages: where to append, one stream per row and head, ordered by row; may be a plain tuple.
        eps: of the RMSNorms.
        gate_activation: `"silu"` or `"sigmoid"`, of the output gate.
        window: the streams' last tokens, updated in place, or `None`; may be a plain tuple.
        sinks: number of the first tokens of a row, which are stored with an infinite score.

    Returns:
        `[B, H * V]`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an argument that requires a gradient.
    """
    pages = None if pages is None else OpenPages(*pages)
    window = None if window is None else Window(*window)
    _check_arguments(
        update, positions, real_tokens, real, norm_weights, output_gate, o_kv, gates, pages, gate_activation, window
    )
    check_sinks("sinks", sinks)
    check_platform(update.o.device)
    with torch.cuda.device_of(update.o):
        return decode_mix_append_fwd(
            update, positions, real_tokens, real, norm_weights, output_gate, o_kv, gates, pages, eps, gate_activation,
            window, sinks,
        )  # fmt: skip


def _check_arguments(
    update: DecodeUpdate,
    positions: torch.Tensor,
    real_tokens: torch.Tensor,
    real: torch.Tensor | None,
    norm_weights: tuple[torch.Tensor | None, torch.Tensor | None],
    output_gate: torch.Tensor | None,
    o_kv: torch.Tensor | None,
    gates: tuple[torch.Tensor, torch.Tensor] | None,
    pages: OpenPages | None,
    gate_activation: str,
    window: Window | None,
) -> None:
    if gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(
            f"`gate_activation` must be one of {', '.join(map(repr, GATE_ACTIVATIONS))}, got {gate_activation!r}."
        )
    if update.o.ndim != 3 or update.o.dtype not in DTYPES:
        raise ValueError(
            f"`update.o` must be [B, H, V] of bfloat16, float16 or float32, got {list(update.o.shape)} of "
            f"{update.o.dtype}."
        )
    (batch, heads, value_dim), own, index = update.o.shape, update.o.dtype, torch.int64
    expected = {
        "update.o": (update.o, (batch, heads, value_dim), own),
        "positions": (positions, (batch,), index),
        "real_tokens": (real_tokens, (batch,), index),
    }
    if real is not None:
        expected["real"] = (real, (batch,), torch.bool)
    if output_gate is not None:
        expected["output_gate"] = (output_gate, (batch, heads * value_dim), own)
    for i, weight in enumerate(norm_weights):
        if weight is not None:
            expected[f"norm_weights[{i}]"] = (weight, (value_dim,), own)
    if pages is not None and o_kv is not None and gates is not None and update.k is not None:
        expected["o_kv"] = (o_kv, (batch, heads, value_dim), own)
        expected |= {f"gates[{i}]": (gate, (batch, heads), own) for i, gate in enumerate(gates)}
        expected |= _expected_pages(update.k, value_dim, pages)
        expected |= {} if window is None else _expected_window(update.k, value_dim, window)
    elif any(x is not None for x in (update.k, o_kv, gates, pages)):
        found = {"update.k": update.k, "o_kv": o_kv, "gates": gates, "pages": pages}
        names = [name for name, x in found.items() if x is None]
        raise ValueError(f"`{'`, `'.join(found)}` must all be given, or none of them, got None for {names}.")
    elif window is not None:
        raise ValueError("`window` must be None without `pages`, to which its tokens go, got one.")
    check_tensors(expected, update.o.device)


def _expected_pages(k: torch.Tensor, value_dim: int, pages: OpenPages) -> dict:
    """Tensor, shape and dtype of each field of `pages`, to which `k` `[B, Hk, K]` is appended."""
    batch, kv_heads, key_dim = k.shape
    own, index, streams, page = k.dtype, torch.int64, batch * kv_heads, pages.keys.shape[1]
    if page & (page - 1):
        raise ValueError(f"`pages.keys` must be [N, p, K], `p` a power of two, got {list(pages.keys.shape)}.")
    return {
        "pages.keys": (pages.keys, (streams, page, key_dim), own),
        "pages.values": (pages.values, (streams, page, value_dim), own),
        "pages.scores": (pages.scores, (streams, page), torch.float32),
        "pages.positions": (pages.positions, (streams, page), torch.int32),
        "pages.counts": (pages.counts, (streams,), index),
        "pages.full_pages": (pages.full_pages, (), index),
        "pages.slabs": (pages.slabs, (len(pages.slabs), APPEND_FIELDS), index),
    }


def _expected_window(k: torch.Tensor, value_dim: int, window: Window) -> dict:
    """Tensor, shape and dtype of each field of `window`, which `k` `[B, Hk, K]` enters."""
    batch, kv_heads, key_dim = k.shape
    if window.keys.ndim != 3 or not window.keys.shape[1]:
        raise ValueError(f"`window.keys` must be [N, R, K] with a slot or more, got {list(window.keys.shape)}.")
    streams, slots = batch * kv_heads, window.keys.shape[1]
    return {
        "window.keys": (window.keys, (streams, slots, key_dim), k.dtype),
        "window.values": (window.values, (streams, slots, value_dim), k.dtype),
        "window.scores": (window.scores, (streams, slots), torch.float32),
        "window.keep": (window.keep, (streams, slots), torch.bool),
    }
