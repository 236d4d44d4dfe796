# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Every way to generate gives the tokens that the model alone would give."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from ham_hf import HAMCache, HAMForCausalLM
from tests.model.models import distinct, tokens
from tests.model.transformers_contract.generation import generate


class Recorder(BaseStreamer):
    """Stands for a TextStreamer: notes every piece that it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        self.ended = True


@pytest.fixture
def calls(model):
    """The lengths of the model's forward calls, in order."""
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


class TestGeneration:
    @pytest.mark.parametrize(
        "mode",
        [
            {},
            {"do_sample": True},
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_beams": 2, "do_sample": True},
            {"do_sample": True, "num_return_sequences": 3},
            {"cache_implementation": "offloaded"},
        ],
        ids=str,
    )
    def test_the_cache_changes_no_token(self, model, mode):
        input_ids = tokens(2, 6)
        torch.manual_seed(1)
        out = generate(model, input_ids, **mode)
        assert out.sequences.shape == (2 * mode.get("num_return_sequences", 1), 14)
        torch.manual_seed(1)
        without = {name: x for name, x in mode.items() if name != "cache_implementation"}
        expected = model.generate(input_ids, max_new_tokens=8, use_cache=False, **({"do_sample": False} | without))
        assert torch.equal(out.sequences, expected)
        usage = out.cache.kv_usage()[0]
        assert 0 < usage.mean() < 1, "this model keeps all or nothing, so little was tested"

    def test_streamed_tokens_are_the_generated_ones(self, model):
        streamer = Recorder()
        out = generate(model, tokens(1, 6), streamer=streamer)
        assert torch.equal(torch.cat(streamer.pieces), out.sequences[0])
        assert len(streamer.pieces) == 1 + 8
        assert streamer.ended

    def test_prompts_may_be_read_in_chunks(self, model, calls):
        input_ids = tokens(2, 11)
        expected = generate(model, input_ids).sequences
        calls.clear()
        assert torch.equal(generate(model, input_ids, prefill_chunk_size=4).sequences, expected)
        assert calls[:3] == [4, 4, 3]

    @pytest.mark.parametrize("helper", ["prompt lookup", "small model", "same model"])
    def test_assisted_generation_gives_the_greedy_tokens(self, model, tiny_config, calls, helper):
        input_ids = tokens(1, 4).repeat(1, 3)
        expected = generate(model, input_ids, max_new_tokens=20).sequences
        small = distinct(HAMForCausalLM(tiny_config(num_hidden_layers=1))).eval()
        arguments = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "small model": {"assistant_model": small},
            "same model": {"assistant_model": model},
        }
        calls.clear()
        out = model.generate(
            input_ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, **arguments[helper]
        )
        assert type(out.cache) is HAMCache
        assert torch.equal(out.sequences, expected)
        assert any(1 < length < input_ids.shape[1] for length in calls[1:]), "no candidates were ever checked"

    def test_generation_goes_on_from_a_cache(self, model, calls):
        input_ids = tokens(2, 6)
        expected = generate(model, input_ids, max_new_tokens=10).sequences
        first = generate(model, input_ids, max_new_tokens=4)
        calls.clear()
        second = generate(model, first.sequences, cache=first.cache, max_new_tokens=6)
        assert torch.equal(second.sequences, expected)
        assert second.cache is first.cache
        assert calls == [1] * 6, "tokens in the cache were computed again"

    def test_a_callers_empty_cache_is_filled(self, model):
        cache, input_ids = HAMCache(model.config), tokens(2, 6)
        out = generate(model, input_ids, cache=cache)
        assert out.cache is cache
        assert torch.equal(out.sequences, generate(model, input_ids).sequences)

    def test_prompts_may_be_embeddings(self, model):
        input_ids = tokens(2, 6)
        expected = generate(model, input_ids).sequences
        embeds = model.get_input_embeddings()(input_ids)
        out = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        assert type(out.cache) is HAMCache
        assert torch.equal(out.sequences, expected[:, 6:])

    def test_attention_weights_cover_all_tokens_seen(self, model):
        out = generate(model, tokens(2, 6), max_new_tokens=3, output_attentions=True)
        cache = out.cache
        assert [x[0].shape for x in out.attentions] == [(2, 4, 6, 6), (2, 4, 1, 7), (2, 4, 1, 8)]
        last = out.attentions[-1][0][:, :, 0]
        for row, heads in enumerate(cache.kept_positions(0)):
            for head, kept in enumerate(heads):
                seen = set(kept.tolist()) | {7}
                for query in (2 * head, 2 * head + 1):
                    assert set(last[row, query].nonzero().flatten().tolist()) == seen

    @pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
    @pytest.mark.parametrize("form", ["rows", "full"])
    def test_each_row_has_its_own_threshold(self, model, mode, form):
        """With beams and return sequences a row becomes several; each must keep the threshold of its row."""
        input_ids = tokens(2, 6)
        values = torch.tensor([-1.0, 2.0])
        layers = model.config.num_hybrid_layers
        threshold = values if form == "rows" else values.view(1, 2, 1).expand(layers, 2, 2).clone()
        out = generate(model, input_ids, threshold=threshold, **mode)
        cache = out.cache
        kept = cache.kept_tokens()[0]
        assert (kept[: len(kept) // 2] == cache.get_seq_length()).all()
        assert (kept[len(kept) // 2 :] == 0).all()
        if "num_beams" in mode:
            for row, value in enumerate(values.tolist()):
                alone = generate(model, input_ids[row : row + 1], threshold=value, **mode).sequences
                assert torch.equal(out.sequences[row], alone[0])

    def test_a_fixed_cache_is_refused(self, model):
        with pytest.raises(ValueError, match="static"):
            model.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")

    def test_a_dense_cache_is_refused(self, model):
        with pytest.raises(TypeError, match="HAMCache"):
            model(tokens(1, 4), cache=DynamicCache())

    def test_the_pipeline_reads_a_batch(self, model, tmp_path):
        words = {f"w{i}": i for i in range(97)}
        backend = Tokenizer(WordLevel(words, unk_token="w1"))
        backend.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        pipe = pipeline("text-generation", str(tmp_path), device="cpu")
        assert type(pipe.model) is HAMForCausalLM
        texts = ["w5 w6 w7", "w8 w9 w10 w11 w12 w13", "w14"]
        arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, "suppress_tokens": [0]}
        together = pipe(texts, batch_size=3, **arguments)
        alone = [pipe(text, **arguments) for text in texts]
        assert together == alone
        assert all(len(out[0]["generated_text"].split()) == 5 for out in alone)
