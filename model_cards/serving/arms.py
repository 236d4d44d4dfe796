# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What is compared: the embedded HAM and a Llama of its shape, and the prompts that both are given."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ham_hf
from ham_hf import HAMConfig

from ..smollm2.texts import CONTEXT, judged_windows

HAM = Path(ham_hf.__path__[0]) / "checkpoints" / "ham-tiny"


def save_llama(folder: Path) -> Path:
    """Saves a Llama with random weights and as many layers, heads and channels as the HAM, with its tokenizer."""
    ham = HAMConfig.from_pretrained(HAM)
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(ham, name) for name in shared.split()}))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(HAM).save_pretrained(folder)
    return folder


def prompts(count: int, length: int) -> list[list[int]]:
    """`count` different prompts of `length` tokens of English text; with more than there is, prompts come again."""
    tokenizer = AutoTokenizer.from_pretrained(HAM)
    if not 0 < length <= CONTEXT:
        raise ValueError(f"`length` must be from 1 to {CONTEXT}, got {length}.")
    different = judged_windows(tokenizer, 32)
    return [different[i % len(different)][0, :length].tolist() for i in range(count)]
