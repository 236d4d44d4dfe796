# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Tile shapes of the kernels of sparse prefix attention, the parts that they share, and their launch."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..tuning import next_bucket, tuned

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
# Tile shapes by kernel and by (bytes of an element, head dimension up to): (BLOCK_M query rows, BLOCK_N columns,
# warps, stages). The first is used where nothing is measured. None for 2 bytes and up to 128 spills, which
# tests/ham_kernels/test_compile.py checks.
TILES = {
    "fwd": {
        (2, 64): [(128, 64, 8, 3), (128, 64, 4, 3)],
        (2, 128): [(128, 64, 8, 2), (64, 64, 4, 2)],
        (2, 256): [(128, 32, 8, 2), (64, 32, 4, 1)],
        (4, 128): [(64, 32, 4, 2)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "dq": {
        (2, 64): [(128, 64, 8, 2), (64, 64, 8, 2)],
        (2, 128): [(64, 128, 8, 2), (64, 64, 8, 2)],
        (2, 256): [(64, 32, 8, 1)],
        (4, 128): [(32, 32, 8, 1)],
        (4, 256): [(16, 16, 8, 1)],
    },
    "dkv": {
        (2, 64): [(32, 64, 8, 2)],
        (2, 128): [(64, 64, 8, 2), (32, 64, 8, 2)],
        (2, 256): [(32, 32, 8, 1)],
        (4, 128): [(32, 32, 4, 1)],
        (4, 256): [(16, 16, 4, 1)],
    },
}
# Compute capability 9.0 tries these first: its warp groups multiply from shared memory, which frees registers.
HOPPER_TILES = {
    "fwd": {(2, 64): [(128, 128, 8, 2)], (2, 128): [(128, 128, 8, 2), (128, 64, 8, 3)]},
    "dq": {(2, 128): [(128, 64, 8, 2)]},
    "dkv": {(2, 64): [(64, 128, 8, 2), (64, 64, 4, 2)], (2, 128): [(32, 128, 8, 2)]},
}
# The second loop of a kernel with a window needs registers, so some of these tiles would spill, and others take over.
TILES["fwd_window"] = TILES["fwd"]
TILES["dq_window"] = TILES["dq"] | {(2, 64): [(128, 32, 8, 2)], (2, 128): [(64, 64, 8, 2)], (4, 128): [(32, 32, 8, 2)]}
HOPPER_TILES["fwd_window"] = HOPPER_TILES["fwd"] | {(2, 128): [(128, 64, 8, 3)]}
HOPPER_TILES["dq_window"] = {(2, 64): [(128, 64, 8, 2)], (2, 128): [(128, 64, 8, 2)]}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels. In all files of this folder a stream is a row's key/value head; `HK` key/value heads, `GROUP` query
# heads to each, `K` and `V` head dimensions, `BLOCK_K` and `BLOCK_V` the powers of two that hold them. Row `r` of a
# stream is query `r // GROUP` of head `r % GROUP`. `T_BUCKET` and `M_BUCKET` stand for the lengths where tile shapes
# are measured. Tensors are contiguous; `log2_scale` and `lse` are in units of log 2. `lse_rest` is what rounding took
# from `lse`: at large logits it would change a weight of nearly 1 by more than anything else does. For the same reason
# the backward pass takes a query's weight on itself, `self_weight`, from the forward: another kernel may round that
# logit otherwise.
# The window of a query shows the tokens from its `window_start` up to its own, among `L` of each row (`None` without a
# window) that end with the queries' own, to queries before the token's `shown_until`: `T`, or 0 for padding. In memory
# the columns of a head lie `STRIDE` rows apart: 1 for kept tokens, `HK` for tokens of the window.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_tile(x, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads rows of `D` numbers at `offsets`; zero past `D` and where not `inside`."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + offsets[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tile(x, offsets, values, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(x + offsets[:, None] + d[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def stream_and_tile(length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Stream and tile of this program. The longest tiles of all streams come first, so none runs alone at the end."""
    tiles = tl.cdiv(length, BLOCK)
    streams = tl.num_programs(0) // tiles
    tile = tl.program_id(0) // streams
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return (tl.program_id(0) % streams).to(tl.int64), tile


@triton.jit
def query_rows(start, stream, T, HK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from `start` on: their queries, the place of the first row's token among all tokens and heads (64 bits;
    times `GROUP` among queries), and the distances from there to each row's token and query.
    """
    r = start % GROUP + tl.arange(0, BLOCK)
    base = ((stream // HK) * T + start // GROUP) * HK + stream % HK
    token = (r // GROUP) * HK
    return start // GROUP + r // GROUP, base, token, token * GROUP + r % GROUP


@triton.jit
def own_token(token, stream, T, L, HK: tl.constexpr):
    """Place of a token among the keys from its place among the queries; `L - T` keys of a row come before these."""
    if L is not None:
        token += (stream // HK + 1) * (L - T) * HK
    return token


@triton.jit
def tiles_between(first, last, all_first, all_last, BLOCK: tl.constexpr):
    """Number of tiles that cover `first..last`, and the range of those that lie inside `all_first..all_last`."""
    inside = tl.cdiv(tl.maximum(all_first - first, 0), BLOCK)
    inside_end = inside + tl.maximum(all_last - first - inside * BLOCK, 0) // BLOCK
    return tl.cdiv(tl.maximum(last - first, 0), BLOCK), inside, inside_end


@triton.jit
def visible_columns(begin, end, first, last, T, M, stream, HK: tl.constexpr):
    """Bounds of the columns that some, and that all, of the queries `first..last` of a stream see."""
    base = (stream // HK) * T * HK + stream % HK
    last = tl.minimum(last, T - 1)
    some_first = tl.load(begin + base + first.to(tl.int64) * HK).to(tl.int32)
    some_last = tl.load(end + base + last.to(tl.int64) * HK).to(tl.int32)
    all_first = tl.load(begin + base + last.to(tl.int64) * HK).to(tl.int32)
    all_last = tl.load(end + base + first.to(tl.int64) * HK).to(tl.int32)
    return tl.maximum(some_first, 0), tl.minimum(some_last, M), all_first, tl.minimum(all_last, M)


@triton.jit
def window_columns(window_start, first, last, T, L):
    """Bounds of the tokens before their own that some, and that all, of the queries `first..last` of a row see."""
    last = tl.minimum(last, T - 1)
    some_first = tl.load(window_start + first).to(tl.int32)
    all_first = tl.load(window_start + last).to(tl.int32)
    return tl.maximum(some_first, 0), L - T + last, all_first, L - T + first


@functools.cache
def with_tiles(kernel: Any, name: str, itemsize: int, width: int, hopper: bool) -> Any:
    """The kernel with the tile shapes of `name` for a type of `itemsize` bytes and heads up to `width` wide."""
    kind = next((size, limit) for size, limit in TILES[name] if size == itemsize and width <= limit)
    tiles = (HOPPER_TILES[name].get(kind, []) if hopper else []) + TILES[name][kind]
    configs = [
        triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)
        for block_m, block_n, warps, stages in tiles
    ]
    key = ["T_BUCKET", "M_BUCKET", "GROUP", "K", "V"]
    if name == "dkv":
        key.append("STRIDE")  # far fewer queries see a token of the window than a kept one
    return tuned(configs, key=key)(kernel)


def head_sizes(q: torch.Tensor, k_kept: torch.Tensor, v_kept: torch.Tensor) -> dict[str, int]:
    """The arguments in capitals, except tile shapes and lengths."""
    heads, (kv_heads, key_dim), value_dim = q.shape[2], (k_kept.shape[1], k_kept.shape[3]), v_kept.shape[3]
    block_k, block_v = (max(16, triton.next_power_of_2(x)) for x in (key_dim, value_dim))
    return {
        "HK": kv_heads, "GROUP": heads // kv_heads,
        "K": key_dim, "V": value_dim, "BLOCK_K": block_k, "BLOCK_V": block_v,
    }  # fmt: skip


def launch(
    kernel: Any,
    name: str,
    q: torch.Tensor,
    k_kept: torch.Tensor,
    v_kept: torch.Tensor,
    *arguments: Any,
    **constants: int,
) -> None:
    """Runs a kernel, one program per tile and stream, with the tile shapes of `name`; `arguments` are contiguous."""
    length, columns, sizes = q.shape[1], k_kept.shape[2], head_sizes(q, k_kept, v_kept)
    streams = q.shape[0] * sizes["HK"]

    def grid(meta: dict[str, int]) -> tuple[int]:
        if name == "dkv":
            return (triton.cdiv(columns, meta["BLOCK_N"]) * streams,)
        return (triton.cdiv(length * sizes["GROUP"], meta["BLOCK_M"]) * streams,)

    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) == (9, 0)
    tiled = with_tiles(kernel, name, q.element_size(), max(sizes["K"], sizes["V"]), hopper)
    tiled[grid](*arguments, length, columns, next_bucket(length), next_bucket(columns), **sizes, **constants)
