# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Bandwidth of `ragged_decode_attention`, beside a copy's, with streams of equal and of unequal length.

32 rows of 16 heads have 512 streams; 32,768 tokens seen at a usage of 0.25 leave 8,192 kept in each, 512 pages of 16.
At head dimension 128 in bfloat16 a kept token has 2 x 128 x 2 = 512 bytes of key and value:

    512 x 8,192 x 512 = 2,147 MB to read: 0.77 ms where a copy moves 2.8 TB/s

| beside it | bytes | share |
|---|---|---|
| of a page's 8,192 bytes: owner and rank, two addresses written, and read again | 8 + 16 + 16 | 0.5% |
| of a split's 262,144 bytes: its partial result written, and read again | 520 + 520 | 0.4% |
| of a stream's 4,194,304 bytes: its open page | 8,192 | 0.2% |

4 floating-point operations per key and dimension are 2.1 GFLOP. One query fills one of the 16 rows of a tensor core's
tile, which makes 34 of them: 0.07 ms at half an H100's rate without its asynchronous products, hidden by the reading.

4 or 8 tokens, as in the verification of drafts, fill 4 or 8 rows of the same tile: the keys are still read once, with
the same 34 GFLOP. Beside the keys, 8 tokens have

| of | bytes | share |
|---|---|---|
| a split's 262,144 bytes: 8 partial results written, and read again | 4,160 + 4,160 | 3.2% |
| a stream's 4,194,304 bytes: queries, keys and values of the tokens, and the outputs | 8 x 1,024 | 0.2% |

and each of the 4,096 queries of the merge reads its stream's open page and the tokens before it, 50 MB in all, which
come from the L2 cache for all but a stream's first.

Heads that keep between 1% and 100% have shares spaced evenly on a logarithmic scale, 0.235 on average: 2,016 MB. The
target is a time of at most 1 / 0.75 of what the copy bandwidth needs for the bytes of kept keys and values alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timing import captured, copy_bandwidth, main, median_ms, row

from ham_kernels.ragged_decode_attention import ragged_decode_attention, slab_table

PAGE, HEADS, DIM, SEEN, USAGE = 16, 16, 128, 32768, 0.25
TARGET = 0.75


def kept_counts(streams: int, balanced: bool) -> list[int]:
    """Kept tokens of each stream; unbalanced, a row's heads keep between 1% and 100% of what is seen."""
    if balanced:
        return [int(SEEN * USAGE)] * streams
    shares = [0.01 * 100 ** (h / (HEADS - 1)) for h in range(HEADS)]
    return [int(SEEN * shares[n % HEADS]) for n in range(streams)]


def stored(counts: list[int], slabs: int) -> tuple[list, tuple, tuple, list]:
    """`pages`, `tail` and `index` of streams with these counts, their pages shuffled, and what keeps `index` valid."""
    held = torch.tensor(counts, device="cuda")
    owner = torch.repeat_interleave(held // PAGE).int()
    owner = owner[torch.randperm(len(owner), device="cuda")]
    order, first = owner.argsort(stable=True), (held // PAGE).cumsum(0) - held // PAGE
    rank = torch.empty_like(owner)
    rank[order] = (torch.arange(len(owner), device="cuda") - first[owner[order].long()]).int()
    whole = []
    for owners, ranks in zip(owner.tensor_split(slabs), rank.tensor_split(slabs), strict=True):
        keys, values = torch.randn(2, len(owners), PAGE, DIM, device="cuda", dtype=torch.bfloat16)
        whole.append((keys, values, owners.clone(), ranks.clone()))
    tail_k, tail_v = torch.randn(2, len(counts), PAGE, DIM, device="cuda", dtype=torch.bfloat16)
    return [slab[:3] for slab in whole], (tail_k, tail_v, held % PAGE), (slab_table(whole), held), whole


def measured(rows: int, balanced: bool, slabs: int, tokens: int, bandwidth: float) -> dict[str, Any]:
    """One line of the result table."""
    streams = rows * HEADS
    counts = kept_counts(streams, balanced)
    pages, tail, index, _whole = stored(counts, slabs)
    q, k, v = torch.randn(3, streams, tokens, DIM, device="cuda", dtype=torch.bfloat16)
    keep = torch.rand(streams, tokens, device="cuda") < USAGE

    def attend() -> torch.Tensor:
        return ragged_decode_attention(q.unsqueeze(2), k, v, keep, pages, tail, index=index)

    ours = median_ms({"ours": captured(attend)})["ours"]
    other = 1e3 * sum(counts) * 2 * DIM * q.element_size() / bandwidth
    shares = f"u = {USAGE}" if balanced else "heads keep 1% to 100%"
    what = f"ragged_decode_attention, {tokens} new in {rows} rows, {SEEN} seen, {shares}, {slabs} slabs"
    return row(what, "bytes of kept keys and values / copy bandwidth", 1 / TARGET, ours, other)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """One token and several, heads that keep alike and others, after one prefill and, unless `quick`, many turns."""
    bandwidth = copy_bandwidth()
    for slabs in (1,) if quick else (1, 40):
        for tokens in (1, 4, 8):
            for balanced in (True, False):
                yield measured(32, balanced, slabs, tokens, bandwidth)


if __name__ == "__main__":
    main(run, __doc__)
