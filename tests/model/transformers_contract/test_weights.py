# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Weights are initialised, tied, resized, saved and loaded as Transformers does it."""

import pytest
import torch
from safetensors.torch import load_file

from ham_hf import HAMForCausalLM
from tests.model.models import FLOAT32_NAMES, LAYERS, distinct, tensors, tokens


class TestWeights:
    def test_tied_embeddings_are_saved_once_and_tied_again(self, config, tmp_path):
        assert isinstance(HAMForCausalLM._tied_weights_keys, dict)
        config.tie_word_embeddings = True
        model = distinct(HAMForCausalLM(config)).eval()
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        loaded = HAMForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        input_ids = tokens(2, 9)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    @pytest.mark.parametrize("tied", [False, True])
    def test_resized_vocabulary_keeps_the_old_rows(self, config, tied):
        config.tie_word_embeddings = tied
        model = distinct(HAMForCausalLM(config)).eval()
        input_ids = tokens(2, 9)
        before = model(input_ids).logits
        model.resize_token_embeddings(120)
        assert model.config.vocab_size == model.vocab_size == 120
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        after = model(input_ids).logits
        assert after.shape[-1] == 120
        torch.testing.assert_close(after[..., :97], before, rtol=0, atol=1e-6)
        assert model(torch.full((1, 2), 119)).logits.isfinite().all()

    @pytest.mark.parametrize("router", ["cosine", "learned_error"])
    def test_a_model_made_on_the_meta_device_is_initialised_like_any_other(self, tiny_config, router):
        many_heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 4}
        types = LAYERS["mixed"]
        config = tiny_config(layer_types=types, num_hidden_layers=len(types), router=router, **many_heads)
        with torch.device("meta"):
            assert all(x.is_meta for x in tensors(HAMForCausalLM(config)).values())
        # Every weight is missing, so all of it is made on the meta device first and initialised afterwards.
        found = tensors(HAMForCausalLM.from_pretrained(None, config=config, state_dict={}))
        expected = tensors(HAMForCausalLM(config))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            y = found[name]
            assert not y.is_meta, name
            assert y.isfinite().all(), name
            if x.std() == 0 or "inv_freq" in name:
                assert torch.equal(x, y), name
                continue
            levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
            difference = x.float().quantile(levels) - y.float().quantile(levels)
            assert difference.abs().max() < x.std(), name
            assert 0.7 < y.std() / x.std() < 1.4, name

    def test_loaded_weights_are_those_that_were_saved(self, config, tmp_path):
        config.router = "learned_error"
        model = distinct(HAMForCausalLM(config)).eval()
        model.save_pretrained(tmp_path)
        loaded = HAMForCausalLM.from_pretrained(tmp_path)
        saved = tensors(model)
        for name, x in tensors(loaded).items():
            assert x.dtype == saved[name].dtype, name
            assert torch.equal(x, saved[name]), name
        input_ids = tokens(2, 30)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    @pytest.mark.parametrize("missing", [*FLOAT32_NAMES, "down_proj.bias"])
    def test_a_tensor_that_a_checkpoint_lacks_takes_no_neighbour_along(self, config, missing, tmp_path):
        """Loading initialises a second time whatever module is incomplete, and must leave alone what was loaded."""
        config.router = "learned_error"
        model = distinct(HAMForCausalLM(config)).eval()
        state = {name: x for name, x in model.state_dict().items() if not name.endswith(missing)}
        model.save_pretrained(tmp_path, state_dict=state)
        saved = tensors(model)
        for name, x in tensors(HAMForCausalLM.from_pretrained(tmp_path)).items():
            assert torch.equal(x, saved[name]) != name.endswith(missing), name
            assert x.isfinite().all(), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_leaves_decays_and_thresholds_alone(self, config, dtype, tmp_path):
        config.router = "learned_error"
        model = distinct(HAMForCausalLM(config)).eval()
        model.save_pretrained(tmp_path)
        saved = tensors(model)
        seen = set()
        for name, x in tensors(HAMForCausalLM.from_pretrained(tmp_path, dtype=dtype)).items():
            kind = name.rpartition(".")[2]
            if kind in FLOAT32_NAMES:
                seen.add(kind)
                assert x.dtype == torch.float32, name
                assert torch.equal(x, saved[name]), name
            elif "inv_freq" not in name:
                assert x.dtype == dtype, name
        assert seen == set(FLOAT32_NAMES)
