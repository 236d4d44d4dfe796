# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Saved models for the script that converts Llama, Mistral and Qwen models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ham_hf


@pytest.fixture
def source(tmp_path, randomised):
    """A function that saves a random model of a configuration in several shards, with a tokenizer."""

    def save(config, dtype=torch.float32):
        model = randomised(AutoModelForCausalLM.from_config(config)).to(dtype)
        model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
        checkpoint = f"{ham_hf.__path__[0]}/checkpoints/ham-tiny"
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "source")
        assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
        return tmp_path / "source"

    return save
