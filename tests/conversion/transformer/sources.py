# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the models that become HAMs, and changes to what is saved of them."""

import json

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SOURCES = {
    "llama": LlamaConfig(**SHAPE),
    "llama, a key/value head each": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "llama, one key/value head, tied": LlamaConfig(**SHAPE | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "llama, biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, wide heads, scaled RoPE": LlamaConfig(**SHAPE, head_dim=20, rope_parameters=LLAMA3),
    "llama, no padding": LlamaConfig(**SHAPE | {"pad_token_id": -1}),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "mistral, a window that is never left": MistralConfig(**SHAPE, sliding_window=512),
    "mistral, sliding": MistralConfig(**SHAPE, sliding_window=20),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3, sliding in one layer": Qwen3Config(
        **SHAPE, head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen2, sliding in one layer": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3, biased, tied, yarn": Qwen3Config(
        **SHAPE, head_dim=8, attention_bias=True, tie_word_embeddings=True, rope_parameters=YARN, hidden_act="gelu"
    ),
}


def only_sentencepiece(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")


def tokenizer_with_code(folder):
    only_sentencepiece(folder)
    config = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
