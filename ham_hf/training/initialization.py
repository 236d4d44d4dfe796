# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Initial weights for a model trained from scratch, which give recall a head start."""

import torch

from ..modeling_ham import HAMForCausalLM


@torch.no_grad()
def initialize_recall(model: HAMForCausalLM) -> None:
    """Makes every layer start as a copying layer, which predicts the token after the current one's last occurrence.

    A mimetic initialisation (arXiv 2410.11135): queries and keys share their projection, so that equal tokens match;
    the convolution passes the current token to queries and values and the one before it to keys; the output projection
    is the transpose of the values' projection, so that a value comes out as the token it was made of.
    """
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        mixer = layer.mixer
        keys = mixer.k_proj.weight.unflatten(0, (-1, config.head_dim)) * 3
        mixer.k_proj.weight.copy_(keys.flatten(0, 1))
        mixer.q_proj.weight.copy_(keys.repeat_interleave(groups, 0).flatten(0, 1))
        values = mixer.v_proj.weight.unflatten(0, (-1, config.value_head_dim))
        mixer.o_proj.weight.copy_(values.repeat_interleave(groups, 0).flatten(0, 1).T)
        queries, keys, values = mixer.conv.weight.mul_(0.2).split(mixer.sizes)
        queries[:, -1] += 1
        keys[:, -2] += 1
        values[:, -1] += 1
        # Sharp enough to single out one token among hundreds.
        if mixer.has_attention:
            mixer.q_norm.weight.fill_(2)
            mixer.k_norm.weight.fill_(2)
