# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What bfloat16 promises about kept sets, as ham_hf/README.md says: few decisions depend on how a text is cut."""

import pytest
import torch

import ham_hf
from ham_hf import HAMCache, HAMForCausalLM

TINY = f"{ham_hf.__path__[0]}/checkpoints/ham-tiny"


def scores_of(model, ids, sizes):
    """`[L, B, T, H]` scores of a text that is read in pieces of these sizes."""
    cache, parts, start = HAMCache(model.config), [], 0
    for size in sizes:
        scores = model(ids[:, start : start + size], cache=cache, output_routing_scores=True).routing_scores
        parts.append(torch.stack(scores))
        start += size
    return torch.cat(parts, 2)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[70, 58], [1] * 128], ids=["two pieces", "steps"])
@pytest.mark.parametrize(("dtype", "differing"), [(torch.float32, 0.0), (torch.bfloat16, 0.01)], ids=str)
def test_decisions_that_depend_on_the_cut_are_few(dtype, differing, sizes):
    model = HAMForCausalLM.from_pretrained(TINY, dtype=dtype).eval()
    ids = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0))
    whole, cut = scores_of(model, ids, [128]), scores_of(model, ids, sizes)
    # The first layer reads the same numbers however the text is cut, so its scores are equal but for float32 rounding.
    torch.testing.assert_close(cut[0], whole[0], rtol=0, atol=1e-6)
    threshold = whole.median()
    assert ((whole >= threshold) != (cut >= threshold)).float().mean() <= differing  # measured: 0.002 in bfloat16
    assert (whole - cut).abs().mean() < (2e-3 if differing else 1e-6)  # measured: 6e-4 and 6e-8
