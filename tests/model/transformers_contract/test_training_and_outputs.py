# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Training reaches every weight, and outputs hold what was asked for."""

import pytest
import torch
import torch.nn.functional as F

from ham_hf import HAMCache, HAMForCausalLM, HAMForSequenceClassification, mixer_ham
from tests.model.models import HEADS, distinct, example, tokens
from tests.model.transformers_contract.generation import generate


def thresholds(model) -> list[torch.Tensor]:
    return [layer.mixer.threshold for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]


class TestTraining:
    @pytest.mark.parametrize("head", HEADS)
    def test_every_weight_of_every_head_learns(self, head, config):
        model = head(config).train()
        out = model(**example(head))
        assert out.loss.isfinite()
        out.loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        still = [name for name, p in model.named_parameters() if not p.grad.any()]
        assert still == [], "no gradient reaches these"

    @pytest.mark.parametrize("head", HEADS)
    def test_thresholds_learn_by_the_control_loop_alone(self, head, config):
        """The gradient is target - usage, whatever the loss is; too many kept tokens raise the threshold."""
        config.target_kv_usage = 0.0
        model = head(config).train()
        inputs = example(head)
        (model(**inputs).loss).backward()
        cache = HAMCache(config)
        model.eval().model(inputs["input_ids"], cache=cache)
        usage = cache.kv_usage()[0].mean(0)
        assert usage.any()
        torch.testing.assert_close(model.model.layers[0].mixer.threshold.grad, -usage)

    def test_a_loss_made_from_logits_moves_thresholds_too(self, model):
        model.train()
        logits = model(tokens(2, 9)).logits
        logits.square().mean().backward()
        assert model.model.layers[0].mixer.threshold.grad.any()

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("head", HEADS)
    def test_checkpointing_changes_no_gradient(self, head, config, reentrant):
        model = distinct(head(config)).train()
        inputs = example(head)
        results, calls = [], []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        for checkpointing in (False, True):
            model.zero_grad()
            torch.manual_seed(2)  # the classifiers have dropout
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        assert len(calls) == 1 + 2, "the layer was not computed again for the backward"
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)

    def test_labels_and_shifted_labels_give_the_same_cross_entropy(self, model):
        input_ids = tokens(2, 9)
        labels = input_ids.clone()
        labels[:, :3] = -100
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        out = model(input_ids, labels=labels)
        expected = F.cross_entropy(out.logits.flatten(0, 1), shifted.flatten())
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(model(input_ids, shift_labels=shifted).loss, expected)
        total = model(input_ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
        torch.testing.assert_close(total * 5, expected * 12)

    def test_the_control_loop_adds_nothing_to_the_loss(self, model):
        input_ids = tokens(2, 9)
        assert model.train()(input_ids, labels=input_ids).loss == model.eval()(input_ids, labels=input_ids).loss

    def test_an_argument_that_nobody_takes_is_refused(self, model):
        with pytest.raises(TypeError, match="output_atentions"):
            model(tokens(1, 4), output_atentions=True)


class TestOutputs:
    def test_nothing_is_recorded_unasked(self, model):
        out = model(tokens(2, 9))
        assert (out.hidden_states, out.attentions, out.routing_scores) == (None, None, None)
        assert type(out.cache) is HAMCache
        assert model(tokens(2, 9), use_cache=False).cache is None

    @pytest.mark.parametrize("training", [False, True])
    def test_hidden_states_run_from_embedding_to_norm(self, model, training):
        input_ids = tokens(2, 9)
        out = model.model.train(training)(input_ids, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert all(x.shape == (2, 9, 32) for x in out.hidden_states)
        assert torch.equal(out.hidden_states[0], model.model.embed_tokens(input_ids))
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert torch.equal(model(input_ids, output_hidden_states=True).hidden_states[-1], out.last_hidden_state)

    def test_scores_decide_what_attention_sees(self, model):
        config = model.config
        types = [t for t in config.layer_types if t != "linear_attention"]
        out = model(tokens(2, 12), output_attentions=True, output_routing_scores=True)
        assert len(out.attentions) == len(types)
        assert len(out.routing_scores) == config.num_hybrid_layers
        scores = iter(zip(out.routing_scores, thresholds(model), strict=True))
        for kind, weights in zip(types, out.attentions, strict=True):
            assert weights.shape == (2, 4, 12, 12)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
            visible = torch.ones(2, 2, 12, 12, dtype=torch.bool)
            if kind == "hybrid":
                score, threshold = next(scores)
                assert score.shape == (2, 12, 2)
                assert score.dtype == torch.float32
                assert ((score >= 0) & (score <= 1)).all()
                keep = score >= threshold
                assert 0 < keep.float().mean() < 1
                visible = keep.permute(0, 2, 1)[:, :, None].expand(-1, -1, 12, -1)
            visible = (visible & torch.ones(12, 12).tril().bool()) | torch.eye(12).bool()
            assert torch.equal(weights > 0, visible.repeat_interleave(2, dim=1))

    def test_weights_that_are_returned_carry_the_gradient(self, model):
        """The output is made of them: so are its gradients, which are those of a call that does not form them."""
        input_ids = tokens(2, 12)
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        gradients = []
        for wanted in (True, False):
            out = model(input_ids, attention_mask=mask, output_attentions=wanted)
            for weights in out.attentions or ():
                weights.retain_grad()
            model.zero_grad()
            out.logits.square().mean().backward()
            assert all(weights.grad.abs().max() > 0 for weights in out.attentions or ())
            gradients.append([out.logits] + [x.grad.clone() for x in model.parameters() if x.grad is not None])
        for formed, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(formed, plain, atol=1e-6, rtol=1e-4)

    def test_weights_change_no_row(self, model):
        """Rows at thresholds of their own, padded, or packed: with the weights as without them."""
        input_ids = tokens(2, 12)
        mask = torch.ones_like(input_ids)
        mask[0, :4] = 0
        documents = torch.tensor([[0] * 5 + [1] * 7])
        for arguments in (
            {"input_ids": input_ids, "attention_mask": mask, "threshold": torch.tensor([0.0, 0.55])},
            {"input_ids": input_ids, "attention_mask": mask.flip(1), "threshold": torch.tensor([0.45, 2.0])},
            {"input_ids": input_ids[:1], "seq_idx": documents},
        ):
            found, expected = model(**arguments, output_attentions=True), model(**arguments)
            real = arguments.get("attention_mask", torch.ones(1, 12)).bool()
            # Dense weights and blocks add up in another order: 1.9e-6 measured.
            torch.testing.assert_close(found.logits[real], expected.logits[real], atol=4e-6, rtol=1e-5)
            if expected.cache is not None:
                assert torch.equal(found.cache.kept_tokens(), expected.cache.kept_tokens())

    def test_logits_to_keep_at_positions(self, model):
        input_ids, where = tokens(2, 9), torch.tensor([1, 7])
        full = model(input_ids).logits
        torch.testing.assert_close(model(input_ids, logits_to_keep=where).logits, full[:, where])

    @pytest.mark.parametrize("head", HEADS)
    def test_embeddings_stand_in_for_tokens(self, head, config):
        model = distinct(head(config)).eval()
        input_ids = tokens(2, 9)
        embeds = model.get_input_embeddings()(input_ids)
        outs = (model(input_ids), model(inputs_embeds=embeds, attention_mask=torch.ones_like(input_ids)))
        if head is HAMForSequenceClassification:
            outs = (model(input_ids[:1]), model(inputs_embeds=embeds[:1]))
        for name in ("logits", "start_logits", "end_logits"):
            if name in outs[0]:
                assert torch.equal(outs[0][name], outs[1][name])


class TestLastLogits:
    """For the last logits alone, the last layer does no more than these and the cache need."""

    SETTINGS = {
        "whole rows": {},
        "padded on the left": {"attention_mask": torch.ones(2, 12).index_fill(1, torch.arange(3), 0)},
        "padded on the right": {"attention_mask": torch.tensor([[1] * 12, [1] * 5 + [0] * 7])},
        "packed": {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]},
        "budget": {"kv_budget": 3, "threshold": 0.0},
        "rows at other thresholds": {"threshold": torch.tensor([0.0, 2.0])},
        "with attention": {"output_attentions": True},
        "with scores": {"output_routing_scores": True},
        "without a cache": {"use_cache": False},
    }

    @pytest.fixture(params=["hybrid", "linear_attention", "full_attention"])
    def model(self, request, tiny_config):
        types = ["hybrid", request.param]
        return distinct(HAMForCausalLM(tiny_config(layer_types=types, num_hidden_layers=2))).eval()

    @pytest.mark.parametrize("number", [1, 5, 12, 100])
    @pytest.mark.parametrize("setting", list(SETTINGS))
    def test_all_else_stays_as_it_is(self, model, setting, number):
        arguments = {"input_ids": tokens(2, 12)} | self.SETTINGS[setting]
        full, last = model(**arguments), model(**arguments, logits_to_keep=number)
        assert last.logits.shape[1] == min(number, 12)
        torch.testing.assert_close(last.logits, full.logits[:, -number:])
        for name in ("attentions", "routing_scores"):
            recorded = full.get(name, ()), last.get(name, ())
            assert bool(recorded[0]) == (f"output_{name}" in arguments)
            assert all(torch.equal(x, y) for x, y in zip(*recorded, strict=True))
        if full.cache is not None:
            assert torch.equal(full.cache.kept_tokens(), last.cache.kept_tokens())
            following = [model(tokens(2, 1) * 0 + 5, cache=x.cache).logits for x in (full, last)]
            assert torch.equal(*following)

    @pytest.mark.parametrize("number", [0, 1, 5])
    def test_the_last_layer_alone_does_less(self, model, number):
        lengths = {}
        for i, layer in enumerate(model.model.layers):
            for name, module in {"mlp": layer.mlp, "o_proj": layer.mixer.o_proj, "q_proj": layer.mixer.q_proj}.items():
                place = (i, name)
                module.register_forward_hook(lambda _, x, out, place=place: lengths.update({place: out.shape[1]}))
        model(tokens(2, 12), logits_to_keep=number)
        less = number or 12
        assert [lengths[0, name] for name in ("q_proj", "o_proj", "mlp")] == [12, 12, 12]
        assert [lengths[1, name] for name in ("q_proj", "o_proj", "mlp")] == [12, less, less]

    @pytest.mark.parametrize("turns", [1, 2])
    def test_attention_reads_for_these_only_unless_more_is_held(self, model, turns, monkeypatch):
        """In a further turn the last layer attends for all tokens, as what is held has an operation of its own."""
        queries, sparse = [], mixer_ham.HAMMixer.attend_kept
        monkeypatch.setattr(
            mixer_ham.HAMMixer, "attend_kept", lambda self, q, *x: queries.append(q.shape[1]) or sparse(self, q, *x)
        )
        input_ids, cache = tokens(2, 24), HAMCache(model.config)
        for part in input_ids.split(24 // turns, 1):
            queries.clear()
            last = model(part, cache=cache, logits_to_keep=2).logits
        reads = 2 if turns == 1 else 12
        assert queries == [24 // turns] + [reads] * (model.config.layer_types[1] != "linear_attention")
        torch.testing.assert_close(last, model(input_ids).logits[:, -2:])

    @pytest.mark.parametrize("use_reentrant", [None, False, True])
    def test_gradients(self, model, use_reentrant):
        """Those of thresholds that are being learned, too, and with checkpoints."""
        input_ids, results = tokens(2, 12), []
        model.train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for number in (0, 3):
            model.zero_grad()
            model(input_ids, logits_to_keep=number).logits[:, -3:].square().sum().backward()
            results.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        assert results[0].keys() == results[1].keys()
        assert any(name.endswith("threshold") for name in results[0])
        for name, grad in results[0].items():
            torch.testing.assert_close(results[1][name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()) + 1e-7)

    def test_prefill_in_chunks(self, model):
        """Each chunk but the first finds a filled cache."""
        input_ids = tokens(2, 12)
        whole, chunks = (generate(model, input_ids, prefill_chunk_size=size) for size in (None, 5))
        assert torch.equal(whole.sequences, chunks.sequences)
        assert torch.equal(whole.cache.kept_tokens(), chunks.cache.kept_tokens())

    @pytest.mark.parametrize("in_config", [False, True])
    def test_hidden_states_that_are_asked_for_are_whole(self, model, in_config):
        input_ids, arguments = tokens(2, 12), {} if in_config else {"output_hidden_states": True}
        model.config.output_hidden_states = in_config
        out = model(input_ids, logits_to_keep=1, **arguments)
        assert out.logits.shape[1] == 1
        assert [x.shape[1] for x in out.hidden_states] == [12] * 3
        with pytest.raises(ValueError, match="`last_n` must be 0 where hidden states are returned"):
            model.model(input_ids, last_n=1, **arguments)

    def test_of_the_model_without_a_head(self, model):
        input_ids = tokens(2, 12)
        last = model.model(input_ids, last_n=3).last_hidden_state
        assert last.shape[1] == 3
        torch.testing.assert_close(last, model.model(input_ids).last_hidden_state[:, -3:])
