# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The embedded checkpoint is what its card says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ham_hf
from ham_hf.inspection.demo_prompt import DEMO_PROMPT

CHECKPOINT = Path(ham_hf.__file__).parent / "checkpoints" / "ham-tiny"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


class TestEmbeddedCheckpoint:
    """Holds the embedded checkpoint to the promises of the package."""

    def test_is_at_most_16_mib(self):
        assert sum(x.stat().st_size for x in CHECKPOINT.rglob("*") if x.is_file()) <= 16 * 2**20

    def test_knows_english_and_more_of_it_the_more_it_keeps(self, model, tokenizer):
        """The held-out figures are in the card; this is a passage in the manner of the training text, twice."""
        passage = (
            "Mr. Harcourt had lived at Thornfield Lodge for many years, and Mr. Harcourt was respected by every body. "
            "When Miss Penelope Wetherby came into the neighbourhood, it was supposed that Mr. Harcourt must admire "
            "her. "
        )
        ids = tokenizer(passage * 3, return_tensors="pt").input_ids
        losses = {u: model(ids, labels=ids, kv_usage=u, use_cache=False).loss.item() for u in (0.0, 0.25, 1.0)}
        assert losses[1.0] < losses[0.25] - 0.2, losses
        assert losses[0.25] < losses[0.0] - 0.2, losses
        assert losses[1.0] < 4.5, "a uniform guess over 4096 tokens would cost 8.3"

    def test_shrinks_its_cache_as_the_threshold_rises(self, model, tokenizer):
        ids = tokenizer("The captain looked at the sea. " * 40, return_tensors="pt").input_ids
        caches = [model(ids, threshold=x, use_cache=True).cache for x in (0.0, 0.3, 0.5, 2.0)]
        kept = [int(x.kept_tokens().sum()) for x in caches]
        assert kept == sorted(kept, reverse=True)
        assert kept[0] == caches[0].kept_tokens().numel() * ids.shape[1]
        assert kept[-1] == 0
        memory = [x.memory_bytes() for x in caches]
        assert memory == sorted(memory, reverse=True)

    def test_recalls_a_rare_name_if_it_kept_it(self, model, tokenizer):
        """The demo shows Quillinan, a name from hundreds of tokens before."""
        ids = tokenizer(DEMO_PROMPT, return_tensors="pt").input_ids
        endings = {}
        for kv_usage in (0.0, 0.5):
            output = model.generate(ids, max_new_tokens=2, do_sample=False, kv_usage=kv_usage)
            endings[kv_usage] = tokenizer.decode(output[0, ids.shape[1] :])
        assert endings[0.5] == "illin", endings
        assert not endings[0.0].startswith("ill"), endings

    def test_writes_words(self, model, tokenizer):
        ids = tokenizer("It was in the autumn of that year that", return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=False)[0])
        words = [word.strip(".,;:!?\"'()-").lower() for word in text.split()]
        known = set(tokenizer.get_vocab())
        assert sum("Ġ" + word in known or word in known for word in words) / len(words) > 0.8
