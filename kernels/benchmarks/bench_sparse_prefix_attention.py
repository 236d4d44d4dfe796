# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Cost of attention over the kept tokens, beside attention over all: our kernels, flash SDPA, FlexAttention.

Arithmetic for `T` queries of `H` heads of dimension `D` at usage `u` (one row, groups of one). A causal query sees
`T / 2` columns on average, a HAM query `u T / 2` and itself.

| | flash SDPA, causal | ours |
|---|---|---|
| forward, floating-point operations | `2 T^2 D H` (2 products) | `u` times that |
| backward | `5 T^2 D H` (5 products) | `7 u T^2 D H`: logits and their slopes are computed for `dq` and for `dk, dv` |
| forward, bytes from memory | `8 T D H` at least: q, k, v, o | `8 T D H`, and `4 u T D H` of kept keys and values |
| compaction, bytes | | `8 u T D H` read and written, `9 T H` of `keep` and counts |
| self term, bytes | | forward: in the tile of queries; backward: `14 T D H` |

`H` = 16, `D` = 128, `T` = 32,768: the forward of everything is 4.4 TFLOP, 7.4 ms at 60% of an H100's 990 TFLOP/s in
bfloat16 and 11 ms at the 40% expected of FlashAttention-2 there; its backward 11 TFLOP, 28 ms at 40%. Ours at `u` =
0.5 is 2.2 TFLOP forward, 4.4 ms at 50%, and 7.7 TFLOP backward, 15 ms at 50%. Bytes: 0.5 GB or 0.2 ms for the forward,
0.27 GB or 0.1 ms for the compaction, 0.9 GB or 0.3 ms for the backward's self term: 1 to 2% of the time of everything,
and most of the 0.10 and 0.15 that the targets leave is for tiles cut by a boundary. A tile of 128 queries ends with at
most one cut tile of 128 columns, half of it wasted on average: `64 / (u T / 2)` of the work, 0.8% at `u` = 0.5 and `T`
= 32,768; 31% at `u` = 0.05 and `T` = 8,192, which is 0.016 of the time of everything.

On an H200 the forward of everything took 13.3 ms at `T` = 32,768 and ours 4.8 ms at `u` = 0.5, 9.7 ms at 1; the
backwards 33.9, 19.9 and 41.3 ms: `results/` has the tables. At `T` = 8,192 the compaction, for which the host waits to
learn the number of columns, takes 0.3 ms of the 0.6, and makes the forward miss its targets for `u` up to 0.5.

FlexAttention with the mask of kept columns skips empty tiles of 128 x 128. With random columns no tile is empty until
fewer than one in a hundred is kept, so it computes everything and masks it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timing import main, median_ms, row, without_grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ham_kernels.compact import compact_kept
from ham_kernels.sparse_prefix_attention import sparse_prefix_attention

HEADS, HEAD_DIM = 16, 128
LENGTHS, QUICK_LENGTHS = (8192, 32768, 131072), (8192, 32768)
USAGES, QUICK_USAGES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0), (0.05, 0.25, 0.5, 1.0)
FORWARD_EXCESS, BACKWARD_EXCESS = 0.10, 0.15
# How much faster than FlexAttention, by usage.
FASTER_THAN_FLEX = {0.5: 1.6, 0.1: 5.0}
FLASH, FLEX = "flash SDPA over everything", "FlexAttention, mask of kept columns"
Tensors = list[torch.Tensor]


def uniform(length: int, usage: float) -> torch.Tensor:
    """Tokens kept independently of each other, `[1, T, H]`."""
    return torch.rand(1, length, HEADS, device="cuda") < usage


def clustered(length: int, usage: float) -> torch.Tensor:
    """Tokens kept in runs of 64."""
    runs = torch.rand(1, length // 64, HEADS, device="cuda") < usage
    return runs.repeat_interleave(64, dim=1)


def unbalanced(length: int, usage: float) -> torch.Tensor:
    """A fraction `usage` of the heads keeps everything, the others one token in a hundred."""
    keep = uniform(length, 0.01)
    keep[:, :, : round(usage * HEADS)] = True
    return keep


def random_inputs(length: int) -> Tensors:
    """`q, k, v` of one row."""
    shape = 1, length, HEADS, HEAD_DIM
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention over everything."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)


def compacted(keep: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Kept keys and values, `begin` and `end`."""
    (k_kept, v_kept), end = compact_kept(keep, k, v)
    return [k_kept, v_kept, torch.zeros_like(end), end]


def whole(keep: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """HAM's attention after the routing decision: compaction and attention."""
    return sparse_prefix_attention(q, k, v, *compacted(keep, k, v))


def backward_of(out: torch.Tensor, inputs: Tensors) -> Callable[[], Any]:
    """A function that runs the backward pass alone, any number of times."""
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def compare_with_flash(
    length: int, usage: float, pattern: Callable[[int, float], torch.Tensor] = uniform
) -> list[dict[str, Any]]:
    """Forward, backward and the whole with compaction. The pattern's own usage sets the targets."""
    q, k, v = random_inputs(length)
    keep = pattern(length, usage)
    usage = keep.float().mean().item()
    what = f"T={length} u={usage:.2f} {pattern.__name__}"
    repeats = 20 if length < 100_000 else 5
    k_kept, v_kept, begin, end = (x.detach() for x in compacted(keep, k, v))
    k_kept, v_kept = k_kept.requires_grad_(), v_kept.requires_grad_()

    def attend() -> torch.Tensor:
        return sparse_prefix_attention(q, k, v, k_kept, v_kept, begin, end)

    forward = {
        "ours": without_grad(attend),
        "whole": without_grad(lambda: whole(keep, q, k, v)),
        "flash": without_grad(lambda: flash(q, k, v)),
    }
    ms = median_ms(forward, repeats)
    rows = [
        row(f"forward, {what}", FLASH, usage + FORWARD_EXCESS, ms["ours"], ms["flash"]),
        row(f"forward with compaction, {what}", FLASH, usage + FORWARD_EXCESS, ms["whole"], ms["flash"]),
    ]
    backward = {
        "ours": backward_of(attend(), [q, k, v, k_kept, v_kept]),
        "whole": backward_of(whole(keep, q, k, v), [q, k, v]),
        "flash": backward_of(flash(q, k, v), [q, k, v]),
    }
    ms = median_ms(backward, repeats)
    return [
        *rows,
        row(f"backward, {what}", FLASH, usage + BACKWARD_EXCESS, ms["ours"], ms["flash"]),
        row(f"backward with compaction, {what}", FLASH, usage + BACKWARD_EXCESS, ms["whole"], ms["flash"]),
    ]


def compare_with_flex(length: int, usage: float) -> dict[str, Any]:
    """The forward of both; FlexAttention's block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x.detach() for x in random_inputs(length))
    keep = uniform(length, usage)
    kept = keep[0].T.contiguous()

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (kept[h, j] & (j < i)) | (i == j)

    mask = create_block_mask(visible, 1, HEADS, length, length, device="cuda", _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    columns = compacted(keep, k, v)
    ms = median_ms(
        {
            "ours": without_grad(lambda: sparse_prefix_attention(q, k, v, *columns)),
            "flex": without_grad(lambda: flex(*heads_first, block_mask=mask)),
        }
    )
    return row(f"forward, T={length} u={usage}", FLEX, 1 / FASTER_THAN_FLEX[usage], ms["ours"], ms["flex"])


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """All comparisons, on the current GPU."""
    torch.manual_seed(0)
    for length in QUICK_LENGTHS if quick else LENGTHS:
        for usage in QUICK_USAGES if quick else USAGES:
            yield from compare_with_flash(length, usage)
    for pattern in (clustered, unbalanced):
        yield from compare_with_flash(32768, 0.25, pattern)
    for usage in FASTER_THAN_FLEX:
        yield compare_with_flex(8192 if quick else 16384, usage)


if __name__ == "__main__":
    main(run, __doc__)
