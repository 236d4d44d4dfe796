# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A captured decoding step of a HAM model, beside captured steps of a Gated DeltaNet and a Llama of the same shape.

12 layers of width 768, 12 heads of 64 with keys and values of their own, bfloat16, one row. HAM keeps a quarter of
what it has seen; Llama's static cache holds all of it. A step must read these MB, in this time where a copy moves
2.8 TB/s:

| | weights | state, read and written | keys and values at 8,192 | at 32,768 |
|---|---|---|---|---|
| HAM | 12 x (5 x 768^2 + 48 x 768 + 3 x 768 x 2,048) x 2 + head 49 = 235 | 5 | 12 x 12 x 2,048 x 256 = 75 | 302 |
| the time of it | 84 us | 2 us | 27 us | 108 us |
| Gated DeltaNet | as HAM without 24 x 768 a layer: 234 | 5 | | |
| Llama | 12 x (4 x 768^2 + 3 x 768 x 2,048) x 2 + head 49 = 220 | | 302: 108 us | 1,208: 431 us |

2 floating-point operations per weight are 0.23 GFLOP and 4 per kept key and dimension 0.08 at 8,192 (0.3 at 32,768):
negligible beside the reading. But a step is a few hundred small launches in sequence, each of which takes 1.5 to 2 us
in a graph whatever it reads, so their number decides. By the operations that a step dispatches, a layer of HAM has 26
(12 matrix products, 6 kernels of its own, 2 RMSNorms, 6 additions, copies and the like), a Gated DeltaNet of this
repository 19, Transformers' Llama about 46, of which 16 are its own two RMSNorms. The RMSNorm of
`torch.nn` is a single launch because of the CUDA kernel of `aten::_fused_rms_norm` (PyTorch's pull request 153666);
without that kernel it has 8, and a layer 40 and 33. One product for all projections of the mixer would save 8.

The time of HAM's step includes the host's work; the others are replays alone, and repeat one token.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import captured, main, median_ms, row
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ham_hf import HAMCache, HAMConfig, HAMForCausalLM
from ham_hf.cuda_graph_ham import CapturedStep
from ham_hf.inputs_ham import CACHE_NAME
from ham_hf.layer_step_ham import LayerStep

LAYERS, WIDTH, INNER, HEADS, DIM, VOCABULARY = 12, 768, 2048, 12, 64, 32000
USAGE = 0.25
# Steps for which a static cache has room: more than the measurement takes.
SPARE = 128
TO_GDN, TO_LLAMA = 1.3, 1.0
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": DIM,
}
DEVICE, DTYPE = "cuda", torch.bfloat16


def ham_step(layer_type: str, seen: int) -> CapturedStep:
    """Step of a model with layers of one kind, with a cache filled by random tokens as if it had seen `seen`."""
    config = HAMConfig(**SHAPE, layer_types=[layer_type] * LAYERS)
    with torch.device(DEVICE):
        model = HAMForCausalLM(config).to(DTYPE).eval()
    for name, x in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "threshold")):  # in float32, as `from_pretrained(dtype=...)` leaves them
            x.data = x.data.float()
    cache, kept = HAMCache(config), int(USAGE * seen)
    for layer in cache.layers:
        step = LayerStep(
            positions=torch.arange(0, seen, round(1 / USAGE), device=DEVICE)[None, :kept],
            conv_state=torch.randn(1, 3, 3 * HEADS * DIM, device=DEVICE, dtype=DTYPE),
            recurrent_state=torch.randn(1, HEADS, DIM, DIM, device=DEVICE),
        )
        if layer_type == "hybrid":
            step.keys, step.values = torch.randn(2, 1, kept, HEADS, DIM, device=DEVICE, dtype=DTYPE)
            step.scores = torch.rand(1, kept, HEADS, device=DEVICE)
            step.keep = torch.ones(1, kept, HEADS, dtype=torch.bool, device=DEVICE)
        layer.update(step)
        layer.seen_tokens = seen
        layer.real_tokens.fill_(seen)
    return CapturedStep(model, cache)


def llama_step(seen: int) -> Callable[[], Any]:
    """Step of Transformers' Llama with a static cache."""
    config = LlamaConfig(**SHAPE, max_position_embeddings=seen + SPARE, attn_implementation="sdpa")
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(DTYPE).eval()
    cache = StaticCache(config=config, max_cache_len=seen + SPARE)
    cache.early_initialization(1, HEADS, DIM, DTYPE, torch.device(DEVICE))
    for layer in cache.layers:
        layer.cumulative_length.fill_(seen)
    token = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    return lambda: model(token, **{CACHE_NAME: cache}, use_cache=True).logits


def fla_step() -> Callable[[], Any]:
    """Step of flash-linear-attention's Gated DeltaNet."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    config = GatedDeltaNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_heads=HEADS,
        head_dim=DIM,
        expand_v=1.0,
    )
    model = GatedDeltaNetForCausalLM(config).to(DEVICE, DTYPE).eval()
    token = torch.ones(1, 1, dtype=torch.long, device=DEVICE)
    # At most 64 tokens: more would compile and tune its kernels for chunks, which a step does not run.
    cache = model(torch.ones(1, 64, dtype=torch.long, device=DEVICE), use_cache=True).past_key_values
    return lambda: model(token, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Two lengths; against flash-linear-attention's Gated DeltaNet, or this repository's own where that is missing."""
    token = torch.ones(1, dtype=torch.long, device=DEVICE)
    if importlib.util.find_spec("fla"):
        against, gdn = "Gated DeltaNet of flash-linear-attention", captured(fla_step())
    else:
        own = ham_step("linear_attention", 8192)
        against, gdn = "Gated DeltaNet of this repository", lambda: own(token)
    for seen in (8192, 32768):
        step = ham_step("hybrid", seen)
        functions = {"ham": lambda step=step: step(token), "gdn": gdn, "llama": captured(llama_step(seen))}
        found = median_ms(functions, repeats=10 if quick else 40)
        what = f"decoding step, {LAYERS} layers of {WIDTH}, one row, {seen} seen, u = {USAGE}"
        yield row(what, against, TO_GDN, found["ham"], found["gdn"])
        yield row(what, "Transformers' Llama, static cache", TO_LLAMA, found["ham"], found["llama"])


if __name__ == "__main__":
    main(run, __doc__)
