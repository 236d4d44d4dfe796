# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The common tests of Transformers' models, of training, labels and RoPE."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ham_hf import HAMForCausalLM, HAMForSequenceClassification, HAMModel
from tests.model.common_suite.losses import MODELS, loss_of
from tests.model.models import example, moved, tokens

# Newer releases of Transformers call it `activation_checkpointing_enable`.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_:FutureWarning")


class TestTraining:
    @pytest.mark.parametrize("reentrant", [None, False, True])
    @pytest.mark.parametrize("cls", MODELS)
    def test_no_parameter_that_asks_for_a_gradient_goes_without(self, cls, config, reentrant):
        """FSDP and DDP wait for the gradient of each: a fixed threshold has none, and must not ask for one."""
        model = cls(config).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(cls, model, example(cls)).backward()
        without = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
        assert without == []
        frozen = {name.rpartition(".")[2] for name, x in model.named_parameters() if not x.requires_grad}
        assert frozen == (set() if config.threshold is None else {"threshold"})

    def test_loading_leaves_a_fixed_threshold_frozen(self, config, tmp_path):
        HAMForCausalLM(config).save_pretrained(tmp_path)
        for loaded in (
            HAMForCausalLM.from_pretrained(tmp_path),
            HAMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
            AutoModelForCausalLM.from_config(config),
            copy.deepcopy(HAMForCausalLM(config)),
        ):
            learned = {x.requires_grad for name, x in loaded.named_parameters() if name.endswith("threshold")}
            assert learned == {config.threshold is None}

    @pytest.mark.parametrize("cls", MODELS)
    def test_checkpointing_is_switched_on_and_off(self, cls, every_kind):
        model = cls(every_kind).train()
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert len(layers) == every_kind.num_hidden_layers
        computed = []
        layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
        for switch, times in ((None, 1), ("enable", 2), ("disable", 1)):
            if switch is not None:
                getattr(model, f"gradient_checkpointing_{switch}")()
            assert {m.gradient_checkpointing for m in [*layers, model.base_model]} == {times == 2}
            computed.clear()
            loss_of(cls, model, example(cls)).backward()
            assert len(computed) == times

    @pytest.mark.parametrize("reentrant", [None, False, True])
    @pytest.mark.parametrize("cls", MODELS)
    def test_frozen_embeddings_put_out_what_has_a_gradient(self, cls, every_kind, reentrant):
        """As adapters need it: with all weights frozen, checkpoints need inputs that ask for gradients."""
        model = cls(every_kind).train()
        model.requires_grad_(False)
        (adapted := model.base_model.layers[-1].mlp.up_proj).requires_grad_(True)
        if reentrant is None:
            model.enable_input_require_grads()
        else:  # which does the same
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        seen = []
        model.get_input_embeddings().register_forward_hook(lambda module, x, out: seen.append(out))
        loss_of(cls, model, example(cls)).backward()
        assert seen[0].requires_grad
        assert adapted.weight.grad.any()
        model.disable_input_require_grads()
        assert not model.get_input_embeddings()(tokens(1, 2)).requires_grad

    @pytest.mark.parametrize(
        ("kind", "labels", "loss"),
        [
            ("regression", torch.tensor([0.5, -1.0, 2.0]), F.mse_loss),
            ("single_label_classification", torch.tensor([0, 3, 1]), F.cross_entropy),
            (
                "multi_label_classification",
                torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]]),
                F.binary_cross_entropy_with_logits,
            ),
        ],
    )
    @pytest.mark.parametrize("named", [True, False])
    def test_kinds_of_labels(self, every_kind, kind, labels, loss, named, recwarn):
        """Named in the configuration, or told from the labels."""
        every_kind.problem_type = kind if named else None
        every_kind.num_labels = 1 if kind == "regression" else 4
        model = moved(HAMForSequenceClassification(every_kind)).eval()
        out = model(tokens(3, 9), labels=labels)
        assert out.logits.shape == (3, every_kind.num_labels)
        torch.testing.assert_close(out.loss, loss(out.logits.squeeze(-1), labels))
        assert not [w for w in recwarn if "target size" in str(w.message)]
        out.loss.backward()
        assert model.score.weight.grad.any()

    def test_shifted_labels_take_the_place_of_labels(self, model):
        model.train()
        input_ids, shifted, others = tokens(2, 9), tokens(2, 9), tokens(2, 9)
        alone = model(input_ids, shift_labels=shifted).loss
        assert torch.equal(model(input_ids, labels=others, shift_labels=shifted).loss, alone)
        assert not torch.isclose(model(input_ids, labels=shifted, shift_labels=others).loss, alone)

    def test_a_text_is_learned_by_heart(self, config):
        """A few steps on one text: gradients point downhill in every kind of layer, and generation says the text."""
        model = HAMForCausalLM(config).train()
        text = tokens(1, 20)
        optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(text, labels=text).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 * losses[0]
        said = model.eval().generate(text[:, :2], max_new_tokens=18, do_sample=False)
        assert torch.equal(said, text)


class TestRope:
    @pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
    def test_positions_are_scaled(self, tiny_config, kind):
        """Every type changes long texts; the dynamic one leaves alone what was in reach before."""
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        scaled = {"rope_type": kind, "rope_theta": 10000.0, "factor": 10.0, "original_max_position_embeddings": 32}
        if kind != "yarn":
            del scaled["original_max_position_embeddings"]
        outputs = []
        for rope in (plain, scaled):
            torch.manual_seed(0)
            model = HAMModel(tiny_config(max_position_embeddings=32, rope_parameters=rope, threshold=0.0)).eval()
            torch.manual_seed(1)
            outputs.append([model(tokens(1, n)).last_hidden_state for n in (10, 48)])
        (short, long), (scaled_short, scaled_long) = outputs
        assert torch.allclose(short, scaled_short, atol=1e-5) == (kind == "dynamic")
        assert not torch.allclose(long, scaled_long, atol=1e-5)
