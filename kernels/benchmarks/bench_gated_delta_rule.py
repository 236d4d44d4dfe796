# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Cost of the prediction and its score in the chunked gated delta rule: our kernels with and without, and fla's.

Arithmetic per token and head of dimension `D` = 128 in bfloat16. A tensor `[T, H, D]` is 256 bytes of it, the states
before chunks of 64 tokens `2 D D / 64` = 512 bytes, the inverses 128.

| stage of the forward | bytes read + written | multiply-adds |
|---|---|---|
| inverses | 256 + 128 | 64 D + 4 * 64 * 64 = 25k |
| `w`, `u` | 640 + 512 | 2 * 64 D = 16k |
| states | 768 + 768 | 2 D D = 33k |
| output | 1280 + 256 | D D + 2 * 64 D = 33k |
| the prediction beside it | 512; `k`, the states from L2 again | D D + 2 * 64 D = 33k |
| or its score | 256 + 64 and 72 | as much |

So 4,608 bytes without the prediction, which is float32 and adds 512: at the memory's speed 11%. Only training of a
router with a gradient through the prediction needs it. The score reads `v` instead of writing the prediction, writes 4
sums for 32 columns each and reads these again, from L2 if there are few tokens: 320 to 392 bytes, 7 to 8.5%. It saves
the router its passes over `v` and the prediction, 768 bytes at least. On an H100 (3.35 TB/s, 990 TFLOP/s) the bytes
take 1.4 ns, all products 0.28 ns, the prediction's 0.07 ns: they hide behind the memory as long as the blocks of a
multiprocessor overlap. `T = 8192` and 16 heads move 0.64 GB, 0.19 ms at best. For both sides the states come on top, a
recurrence that is bound by latency in a single row; fla also sums the gates in a kernel of its own, and clears the
inverses first, 128 bytes that we do not write.

The forward is also compared with our own without either. Forward and backward are compared where fla allows its
backward, which is not on Hopper with Triton 3.4.0 to 3.7.0.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timing import main, median_ms, row

from ham_kernels.gated_delta_rule import gated_delta_rule_with_prediction

DEVICE = "cuda"
HEADS = 16
HEAD_DIM = 128
LENGTHS = (8192, 32768)
# The target of the forward. A prediction costs its bytes, which nothing hides; the backward here has none.
AT_MOST, AT_MOST_WITH_PREDICTION, AT_MOST_WITH_BACKWARD = 1.08, 1.12, 1.08
Tensors = list[torch.Tensor]


def random_inputs(length: int) -> Tensors:
    """`q, k, v, g, beta` of one row, like those of a trained layer: unit keys, slow decay."""
    shape = 1, length, HEADS, HEAD_DIM
    q, k, v = (torch.randn(shape, device=DEVICE) for _ in range(3))
    g = -0.1 * torch.rand(shape[:3], device=DEVICE)
    beta = torch.rand(shape[:3], device=DEVICE)
    return [F.normalize(q, dim=-1).bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16(), g, beta]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Our output, computed with the score."""
    return gated_delta_rule_with_prediction(q, k, v, g, beta, score="cosine")[0]


def with_prediction(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Our output, computed with the prediction."""
    return gated_delta_rule_with_prediction(q, k, v, g, beta)[0]


def without_prediction(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Our output alone."""
    return gated_delta_rule_with_prediction(q, k, v, g, beta, predict=False)[0]


def fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """The output of flash-linear-attention, which has no prediction; it too returns the final state."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)[0]


def both_ways(function: Callable[..., torch.Tensor], inputs: Tensors, dout: torch.Tensor) -> Callable[[], Tensors]:
    """A function that runs forward and backward."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    return lambda: list(torch.autograd.grad(function(*inputs), inputs, dout))


def measured(length: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of forward, and of forward and backward: ours and, where it runs, fla's."""
    torch.manual_seed(seed)
    inputs = random_inputs(length)
    dout = torch.randn_like(inputs[2])
    sides = {"score": ours, "prediction": with_prediction, "neither": without_prediction}
    if importlib.util.find_spec("fla"):
        sides["fla"] = fla
    with torch.no_grad():
        forward = median_ms({name: lambda f=f: f(*inputs) for name, f in sides.items()})
    if "fla" not in sides:
        return forward, {}
    functions = {"ours": both_ways(ours, inputs, dout), "fla": both_ways(fla, inputs, dout)}
    try:
        functions["fla"]()
    except RuntimeError as error:  # fla refuses GPUs on which Triton compiles its backward wrongly
        print(f"fla's backward: {error}")
        return forward, {}
    return forward, median_ms(functions)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Rows for each length; both lengths and several input sets unless `quick`."""
    for length in LENGTHS[:1] if quick else LENGTHS:
        times = [measured(length, seed) for seed in range(1 if quick else 3)]
        forward, backward = ([x[i] for x in times] for i in (0, 1))
        what = f"gated delta rule, T = {length}"
        for other in ("fla", "neither"):
            if other in forward[0]:
                yield _middle_row(f"{what}, forward with score", AT_MOST, forward, "score", other)
                yield _middle_row(
                    f"{what}, forward with prediction", AT_MOST_WITH_PREDICTION, forward, "prediction", other
                )
        if backward[0]:
            yield _middle_row(f"{what}, forward + backward", AT_MOST_WITH_BACKWARD, backward, "ours", "fla")


def _middle_row(what: str, at_most: float, times: list[dict[str, float]], own: str, other: str) -> dict[str, Any]:
    """The row of the input set whose ratio is the median."""
    middle = sorted(times, key=lambda x: x[own] / x[other])[len(times) // 2]
    against = {"fla": "fla's chunk_gated_delta_rule without it", "neither": "our forward without it"}[other]
    return row(what, against, at_most, middle[own], middle[other])


if __name__ == "__main__":
    main(run, __doc__)
