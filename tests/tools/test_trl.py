# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers: packed supervised fine-tuning, preferences and policy gradients, with usage steered on the way."""

from itertools import pairwise

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.training.control import ThresholdCallback, UsageSchedule

# Either may not go with the Transformers or huggingface_hub that is there; the reason is in the error.
datasets = pytest.importorskip("datasets", exc_type=ImportError)
trl = pytest.importorskip("trl", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TEXTS = [
    "The captain looked at the sea.",
    "A ship came in from the north, and nobody knew it.",
    "In the evening they sat by the fire and told what they had seen.",
    "The harbour was quiet.",
]
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
}


def decay_rates(model):
    return torch.cat([layer.mixer.A_log.detach() for layer in model.model.layers])


def logged(trainer, name):
    return [x[name] for x in trainer.state.log_history if name in x]


@pytest.fixture
def settings(tmp_path):
    return COMMON | {"output_dir": str(tmp_path)}


@pytest.fixture
def packed(model, tokenizer, settings):
    def make(callbacks=(), **options):
        arguments = trl.SFTConfig(
            packing=True, padding_free=True, max_length=64, per_device_train_batch_size=2, **(settings | options)
        )
        data = datasets.Dataset.from_dict({"text": TEXTS * 40})
        return trl.SFTTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks)
        )

    return make


def test_documents_packed_by_sft_do_not_see_each_other(packed, model):
    """The collator tells where documents begin in three ways at once."""
    trainer = packed(max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"} <= batch.keys()
    labels = batch["labels"]
    with torch.no_grad():
        together = model(**batch).logits[0]
        begins = batch["cu_seq_lens_q"].tolist()
        assert len(begins) > 4
        for first, last in pairwise(begins):
            alone = model(batch["input_ids"][:, first:last]).logits[0]
            torch.testing.assert_close(together[first:last], alone, atol=1e-3, rtol=0)
            assert labels[0, first] == -100
    trainer.train()
    assert logged(trainer, "loss")[0] > 0


@pytest.mark.slow
def test_packed_sft_meets_its_usage_with_the_optimizer_that_trl_makes(packed, model):
    before = decay_rates(model)
    schedule = UsageSchedule(((0, 0.25),))
    trainer = packed([ThresholdCallback(schedule)], max_steps=30, weight_decay=0.1, gradient_accumulation_steps=2)
    trainer.train()
    usage, loss = logged(trainer, "kv_usage"), logged(trainer, "loss")
    assert usage[0] > 0.35
    assert abs(sum(usage[-10:]) / 10 - 0.25) < 0.04, usage
    assert loss[-1] < 0.5 * loss[0]
    assert (decay_rates(model) - before).abs().max() < 0.05


@pytest.mark.slow
def test_lora_beside_sft(packed, model, tokenizer, settings):
    """peft freezes thresholds, which are therefore not to be steered; usage stays what the checkpoint's make of it."""
    peft = pytest.importorskip("peft")
    arguments = trl.SFTConfig(max_length=64, max_steps=3, per_device_train_batch_size=2, **settings)
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    )
    trainer.train()
    assert trainer.model.peft_config
    moved = [name for name, x in trainer.model.named_parameters() if ".lora_B." in name and x.any()]
    assert len(moved) > 60
    assert not any(layer.mixer.threshold.requires_grad for layer in model.model.layers)
    trainer.add_callback(ThresholdCallback())
    with pytest.raises(ValueError, match="no threshold that learns"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["precomputed", "a model"])
def test_dpo_steers_by_the_calls_it_learns_from(model, tokenizer, settings, reference):
    data = datasets.Dataset.from_dict(
        {
            "prompt": ["The captain looked at", "A ship came in from"] * 8,
            "chosen": [" the sea.", " the north."] * 8,
            "rejected": [" nobody knew.", " told what they."] * 8,
        }
    )
    arguments = trl.DPOConfig(
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        precompute_ref_log_probs=reference == "precomputed",
        **settings,
    )
    copy = None if reference == "precomputed" else HAMForCausalLM.from_pretrained(model.config._name_or_path)
    trainer = trl.DPOTrainer(
        model,
        copy,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[ThresholdCallback(UsageSchedule(((0, 0.25),)))],
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=0.02), "that of a model which is its own reference"
    assert losses[-1] < 0.5
    usage = logged(trainer, "kv_usage")
    assert abs(sum(usage[-4:]) / 4 - 0.25) < 0.06, usage


@pytest.mark.slow
def test_grpo_with_a_reference_model(model, tokenizer, settings):
    """TRL loads the reference by the path of the checkpoint, which has no code beside it."""
    data = datasets.Dataset.from_dict({"prompt": ["The captain looked at", "A ship came in from"] * 4})

    def many_e(completions, **kwargs):
        return [float(text.count("e")) / max(1, len(text)) for text in completions]

    arguments = trl.GRPOConfig(
        max_steps=3,
        beta=0.1,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=12,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=many_e,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[ThresholdCallback(UsageSchedule(((0, 0.25),)))],
    )
    assert type(trainer.accelerator.unwrap_model(trainer.ref_model)) is HAMForCausalLM
    before = model.model.layers[0].mixer.q_proj.weight.detach().clone()
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-3)
    assert not torch.equal(model.model.layers[0].mixer.q_proj.weight, before)
    assert all(x.isfinite().all() for x in model.parameters())
    assert len(logged(trainer, "kv_usage")) == 3
