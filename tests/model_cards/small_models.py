# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The small models that tests of the studies train."""

from model_cards.study.fitting import build_model, config_of_size

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rope_parameters": None,
    "target_kv_usage": 0.25,
}


def small_model(settings, parameters):
    return build_model(config_of_size(settings, parameters), seed=0)
