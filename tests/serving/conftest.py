# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint to serve, and what `generate` makes of it, for all tests of the server."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import ham_hf
from ham_hf import HAMForCausalLM
from tests.serving.servers import NEW_TOKENS

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """The embedded checkpoint in float32 with a chat template, which keeps nothing unless it is asked to."""
    folder = tmp_path_factory.mktemp("served") / "ham"
    source = Path(ham_hf.__path__[0]) / "checkpoints" / "ham-tiny"
    model = HAMForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.generation_config.threshold = 2.0
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def generated(served):
    """A function that goes on with a text by `generate` itself."""
    model, tokenizer = HAMForCausalLM.from_pretrained(served).eval(), AutoTokenizer.from_pretrained(served)

    def go_on(text, **routing):
        inputs = tokenizer(text, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **routing)
        return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return go_on
