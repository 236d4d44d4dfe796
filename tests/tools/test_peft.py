# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""LoRA with peft: every projection is adapted and trained, saved and merged; the thresholds stay where they were."""

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig

from ham_hf import HAMForCausalLM

peft = pytest.importorskip("peft")

# peft asks by the old name whether activations are checkpointed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

PROJECTIONS = set(
    "q_proj k_proj v_proj o_proj z_proj a_proj b_proj rnn_gate_proj kv_gate_proj gate_proj up_proj down_proj".split()
)


def adapted(model, **options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **options)
    return peft.get_peft_model(copy.deepcopy(model), config)


def train(model, ids, steps=4):
    """Losses of a few steps on one text; every trained parameter must have been reached by the loss."""
    model.train()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(x.grad is not None for x in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture
def ids(tokenizer):
    return tokenizer("The captain looked at the sea, and the sea looked at the captain", return_tensors="pt").input_ids


def test_train_save_load_and_merge(model, ids, tmp_path):
    lora = adapted(model)
    losses = train(lora, ids)
    assert losses[-1] < 0.7 * losses[0]
    moved = {name.split(".")[-4] for name, x in lora.named_parameters() if ".lora_B." in name and x.any()}
    assert moved == PROJECTIONS
    thresholds = [layer.mixer.threshold for layer in lora.base_model.model.model.layers]
    for threshold, layer in zip(thresholds, model.model.layers, strict=True):
        assert not threshold.requires_grad
        assert torch.equal(threshold, layer.mixer.threshold)

    lora.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = lora(ids).logits
        loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
        assert torch.equal(loaded(ids).logits, logits)
        merged = loaded.merge_and_unload()
        assert type(merged) is HAMForCausalLM
        # W x + B A x and (W + B A) x round differently: 2e-5 measured, of logits up to 28.
        torch.testing.assert_close(merged(ids).logits, logits, atol=2e-4, rtol=0)


def test_learned_router_is_adapted(tiny_config):
    lora = adapted(HAMForCausalLM(tiny_config(router="learned_error")))
    ids = torch.randint(1, 97, (2, 30))
    train(lora, ids, steps=2)
    moved = {name.split(".")[-4] for name, x in lora.named_parameters() if ".lora_B." in name and x.any()}
    assert moved == PROJECTIONS  # the router's MLP has the names of the other one
    for layer in lora.base_model.model.model.layers:
        assert layer.mixer.router.down_proj.lora_B.default.weight.any()
    with torch.no_grad():
        scores = lora(ids, output_routing_scores=True).routing_scores
        merged = lora.merge_and_unload()(ids, output_routing_scores=True).routing_scores
    torch.testing.assert_close(merged, scores, atol=1e-5, rtol=0)


def test_generate_at_a_threshold(model, ids):
    lora = adapted(model)
    train(lora, ids, steps=1)
    sizes = []
    for threshold in (0, 0.5, 2):
        out = lora.generate(input_ids=ids, max_new_tokens=4, threshold=threshold, return_dict_in_generate=True)
        sizes.append(int(out.cache.kept_tokens().sum()))
        with torch.no_grad():
            logits = lora(out.sequences[:, :-1], threshold=threshold).logits
        assert torch.equal(logits[0, ids.shape[1] - 1 :].argmax(-1), out.sequences[0, ids.shape[1] :])
    assert sizes[0] == 6 * 2 * (ids.shape[1] + 3) > sizes[1] > sizes[2] == 0


def test_thresholds_train_beside_the_adapters_when_asked(model, ids, tmp_path):
    """`modules_to_save` takes modules, and a threshold is a parameter: it is told to train, and saved by merging."""
    lora = adapted(model)
    for name, x in lora.named_parameters():
        if name.endswith("mixer.threshold"):
            x.requires_grad_(True)
    train(lora, ids, steps=2)
    trained = [layer.mixer.threshold.detach().clone() for layer in lora.base_model.model.model.layers]
    assert not any(torch.equal(x, y.mixer.threshold) for x, y in zip(trained, model.model.layers, strict=True))
    lora.merge_and_unload().save_pretrained(tmp_path)
    loaded = HAMForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, y.mixer.threshold) for x, y in zip(trained, loaded.model.layers, strict=True))


def test_gradient_checkpointing_changes_no_gradient(model, ids):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        lora = adapted(model, init_lora_weights=False)
        lora.train()
        lora(input_ids=ids, labels=ids).loss.backward()
        assert lora.base_model.model.is_gradient_checkpointing == checkpointing
        gradients.append({name: x.grad for name, x in lora.named_parameters() if x.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_prefix_tuning_is_refused(model, ids):
    """Its keys and values are what attention saw before the text; of what the RNN saw they tell nothing."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(TypeError, match="such as the prefix of peft's prefix tuning"):
        peft.get_peft_model(model, config)(input_ids=ids, labels=ids)


def test_adapters_on_4bit_weights(checkpoint, ids):
    """QLoRA on a CPU: the weights are bitsandbytes' 4-bit ones, and stay so."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", ".*(a_proj|b_proj|rnn_gate_proj|kv_gate_proj)"],
    )
    model = HAMForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, device_map="cpu")
    model = peft.prepare_model_for_kbit_training(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    losses = train(lora, ids)
    assert losses[-1] < 0.7 * losses[0]
    assert lora.base_model.model.model.layers[0].mixer.q_proj.base_layer.weight.dtype == torch.uint8
    out = lora.generate(input_ids=ids, max_new_tokens=4, threshold=0.4)
    assert out.shape[1] == ids.shape[1] + 4
