# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The gated delta rule with a prediction for each token: forward and backward over chunks, and one decoding step.

The stages are those of flash-linear-attention's `chunk_gated_delta_rule` (arXiv 2412.06464, section 3.3): the WY form
of a chunk, the state's recurrence over chunks, the output. They are written anew because the output stage also yields
the prediction and serves a group of query heads at once, because fla multiplies float32 in TF32, and because fla 0.6
refuses its gated backward on Hopper GPUs with Triton 3.4.0 to 3.7.0 (its issue 640). These versions miscompile a
product whose left operand is the transpose of a product. No kernel here has one: it computes the transpose directly.

Chunk of `BT` tokens, per key/value head, with `G` the running sum of `g` inside the chunk and `S` the state before it:

    A = strictly lower part of beta_i (k_i . k_j) exp(G_i - G_j),   M = (I + A)^-1
    w = M (beta exp(G) k),   u = M (beta v) - w S                   u_i = beta_i (v_i - prediction_i)
    prediction = (strictly lower part of k k^T exp(G_i - G_j)) u + exp(G) k S
    o = scale ((lower part of q k^T exp(G_i - G_j)) u + exp(G) q S)
    S' = exp(G_last) S + (exp(G_last - G) k)^T u
"""

from .op import gated_delta_rule_with_prediction

__all__ = ["gated_delta_rule_with_prediction"]
