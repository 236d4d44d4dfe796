# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Chunks of tokens, and the constants, tile shapes and decays that the kernels of this folder share."""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 256

# ptxas 12.8, part of Triton 3.4 to 3.7, miscompiles some pairs of products for Hopper: the second reads a factor at
# an address that was never computed. It was seen where a tile of 16 columns, or one wider than the head, holds a whole
# head; where the narrower of keys and values had the narrower tile; and, in the output stage, where one tile holds all
# keys. No tile shape of this folder is affected: tests/ham_kernels/test_compile.py disassembles each one.
SMALLEST_TILE = 32


def tile_width(dim: int, largest: int) -> int:
    """Smallest power of two that holds a dimension, at least `SMALLEST_TILE` and at most `largest`."""
    return min(largest, max(SMALLEST_TILE, triton.next_power_of_2(dim)))


def tile_configs(warps: tuple[int, ...], stages: tuple[int, ...], **tiles: tuple[int, ...]) -> list[triton.Config]:
    """Every combination; the first one is used where nothing is measured."""
    shapes = [dict(zip(tiles, sizes, strict=True)) for sizes in itertools.product(*tiles.values())]
    return [triton.Config(x, num_warps=w, num_stages=s) for x in shapes for w in warps for s in stages]


def no_wider_than_a_head(
    configs: list[triton.Config], arguments: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """The tile shapes no wider than keys and values; wider ones are slower, or wrong, see `SMALLEST_TILE`."""
    widest = tile_width(min(constants["K"], constants["V"]), MAX_HEAD_DIM)
    return [x for x in configs if x.kwargs["BV"] <= widest] or configs[:1]


NO_WIDER = {"early_config_prune": no_wider_than_a_head}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels. In all files of this folder arguments in capitals are constants of the compilation: `HK` key/value
# heads, `GROUP` query heads to each, `K` and `V` head dimensions, `BT` tokens of a chunk, `BK`, `BV` tile widths. `T`
# and `NT` are tokens and chunks of a row, `bucket` stands for the number of programs. Gates are float32; `gc`
# `[B, T, HK, 2]` holds the running sum of `g` in units of log 2, in float32, and what rounding it left out: decays are
# small differences of these large sums. A program's tokens are `start <= t < end`; those past `end` load as zero.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def chunk_bounds(borders, i_c, T, NT, BT: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk `i_c` and the one past its last."""
    if PACKED:
        start = tl.load(borders + i_c)
        end = tl.load(borders + i_c + 1)
    else:
        i_b = i_c // NT
        start = i_b.to(tl.int64) * T + (i_c - i_b * NT) * BT
        end = tl.minimum(start + BT, (i_b + 1).to(tl.int64) * T)
    return start, end


@triton.jit
def sequence_bounds(sequences, i_n, T, NT, PACKED: tl.constexpr):
    """Sequence `i_n`: its first token, the one past its last, its first chunk, the rows of its two states (or -1)."""
    if PACKED:
        begin = tl.load(sequences + i_n * 5)
        end = tl.load(sequences + i_n * 5 + 1)
        first = tl.load(sequences + i_n * 5 + 2)
        row_in = tl.load(sequences + i_n * 5 + 3)
        row_out = tl.load(sequences + i_n * 5 + 4)
    else:
        row_in = i_n.to(tl.int64)
        row_out = row_in
        begin = row_in * T
        end = begin + T
        first = row_in * NT
    return begin, end, first, row_in, row_out


@triton.jit
def load_sums(gc, token, mask):
    """`G` of tokens (counted in heads): rounded, and the rest. A token past the end has a decay of zero."""
    return tl.load(gc + 2 * token, mask=mask, other=-1e30), tl.load(gc + 2 * token + 1, mask=mask, other=0.0)


@triton.jit
def decay_between(b_g, b_rest, lower):
    """`exp(G_i - G_j)` where `lower`, 0 elsewhere. The mask comes first: above the diagonal it may overflow."""
    b_d = (b_g[:, None] - b_g[None, :]) + (b_rest[:, None] - b_rest[None, :])
    return tl.exp2(tl.where(lower, b_d, float("-inf")))


@triton.jit
def decay_to_end(gc, b_g, b_rest, last, real):
    """`exp(G_last - G)` of a chunk's tokens, and `exp(G_last)`; `last` is its last token (counted in heads)."""
    g_last, rest = tl.load(gc + 2 * last), tl.load(gc + 2 * last + 1)
    b_d = tl.where(real, (g_last - b_g) + (rest - b_rest), float("-inf"))
    return tl.exp2(b_d), tl.exp2(g_last)


class Chunks(NamedTuple):
    """Chunks and sequences of the tokens of `[B, T]`, as every kernel takes them.

    Without packing each row is one sequence, and kernels compute the bounds. With packing, chunk `c` has tokens
    `borders[c]` to `borders[c + 1]` of the flattened batch, and `table` holds the five numbers of `sequence_bounds`
    for each document.
    """

    size: int
    length: int
    per_row: int
    total: int
    sequences: int
    borders: torch.Tensor | None = None
    table: torch.Tensor | None = None


def split_rows(batch: int, length: int, size: int) -> Chunks:
    """Chunks of rows, each of which is one sequence."""
    per_row = triton.cdiv(length, size)
    return Chunks(size, length, per_row, batch * per_row, batch)


def split_documents(seq_idx: torch.Tensor, size: int) -> Chunks:
    """Chunks of documents, which begin where `seq_idx` `[B, T]` changes. The host waits for the device once."""
    batch, length = seq_idx.shape
    begins = torch.ones(batch, length, dtype=torch.bool, device=seq_idx.device)
    torch.ne(seq_idx[:, 1:], seq_idx[:, :-1], out=begins[:, 1:])
    begin = begins.cpu().flatten().nonzero().flatten()
    end = torch.cat([begin[1:], begin.new_tensor([batch * length])])
    chunks = (end - begin + size - 1) // size
    first = chunks.cumsum(0) - chunks
    none = torch.full_like(begin, -1)
    row_in = torch.where(begin % length == 0, begin // length, none)
    row_out = torch.where(end % length == 0, begin // length, none)
    document = torch.repeat_interleave(chunks)
    borders = begin[document] + (torch.arange(len(document)) - first[document]) * size
    borders = torch.cat([borders, end[-1:]]).to(seq_idx.device)
    table = torch.stack([begin, end, first, row_in, row_out], 1).to(seq_idx.device)
    return Chunks(size, length, 0, len(document), len(begin), borders, table)


def chunk_constants(k: torch.Tensor, v: torch.Tensor, chunks: Chunks) -> dict[str, Any]:
    """Arguments that every kernel over chunks takes."""
    return {
        "T": chunks.length,
        "NT": chunks.per_row,
        "HK": k.shape[2],
        "K": k.shape[3],
        "BT": chunks.size,
        "PACKED": chunks.borders is not None,
        # TF32 has 10 bits; three products in TF32 restore those of float32. 16-bit numbers lose none.
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",
    }
