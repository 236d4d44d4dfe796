# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Cost of compacting kept keys and values: our kernels, a copy of as many bytes, PyTorch's sort and gather.

Bytes per token and head of dimension `D` in bfloat16, at usage `u`. `keep` takes one byte, a token's place among the
kept ones 8 bytes; both are read once for keys and once for values.

| stage | bytes read + written |
|---|---|
| numbering: `keep` twice, the places | 2 + 8 |
| keys and values moved | 2 * 9 + 4 u D + 4 u D |
| backward, from the gradients of what is kept | 2 * 9 + 4 u D + 4 D |

So `28 + 8 u D` forward, 540 at `D` = 128 and `u` = 0.5, and `18 + 4 (1 + u) D` = 786 backward. There is next to no
arithmetic, so a copy of as many bytes is the bound. `T` = 32,768 and 16 heads move 283 MB forward, 0.1 ms at the 2.8
TB/s that an H100 copies at, and 412 MB backward. Zeros written behind heads that keep fewer than the largest are not
counted. The number of columns is given, because waiting for it would be measured too.

PyTorch sorts the flags (radix sort, 8 bytes an index, several passes) and gathers through the order of every head.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import copy_bandwidth, main, median_ms, row

from ham_kernels.compact import compact_kept

DEVICE = "cuda"
HEADS, HEAD_DIM = 16, 128
LENGTHS, USAGES = (8192, 32768, 131072), (0.05, 0.25, 0.5, 1.0)
# Targets: time of a copy, as for the other op that only moves data, and of PyTorch.
OF_BANDWIDTH, OF_PYTORCH = 0.75, 0.5


def sorted_and_gathered(keep: torch.Tensor, columns: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same in PyTorch."""
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :columns].transpose(1, 2)
    return [x.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in tensors]


def bytes_moved(keep: torch.Tensor, dim: int) -> tuple[int, int]:
    """Forward and backward, of keys and values in bfloat16: the table above."""
    tokens, kept = keep.numel(), int(keep.sum())
    return 28 * tokens + 8 * dim * kept, 18 * tokens + 4 * dim * (tokens + kept)


def backward_of(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """A function that runs the backward pass alone, any number of times."""
    grads = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def measured(length: int, usage: float, bandwidth: float) -> list[dict[str, Any]]:
    """Lines of the result table for one length and usage."""
    keep = torch.rand(1, length, HEADS, device=DEVICE) < usage
    columns = int(keep.sum(1).max())
    shape = 1, length, HEADS, HEAD_DIM
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    plain = [x.detach() for x in inputs]
    forward = {
        "ours": lambda: compact_kept(keep, *plain, capacity=columns),
        "pytorch": lambda: sorted_and_gathered(keep, columns, *plain),
    }
    ours, pytorch = compact_kept(keep, *inputs, capacity=columns)[0], sorted_and_gathered(keep, columns, *inputs)
    backward = {"ours": backward_of(ours, inputs), "pytorch": backward_of(pytorch, inputs)}
    rows = []
    for name, functions, num_bytes in zip(
        ("forward", "backward"), (forward, backward), bytes_moved(keep, HEAD_DIM), strict=True
    ):
        ms = median_ms(functions)
        what = f"compact_kept of keys and values, {name}, T={length} u={usage}"
        copy = 1e3 * num_bytes / bandwidth
        rows += [
            row(what, "a copy of its bytes", 1 / OF_BANDWIDTH, ms["ours"], copy),
            row(what, "PyTorch's argsort and gather", OF_PYTORCH, ms["ours"], ms["pytorch"]),
        ]
    return rows


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Every length and usage; one length and two usages if `quick`."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    for length in LENGTHS[1:2] if quick else LENGTHS:
        for usage in (0.25, 1.0) if quick else USAGES:
            yield from measured(length, usage, bandwidth)


if __name__ == "__main__":
    main(run, __doc__)
