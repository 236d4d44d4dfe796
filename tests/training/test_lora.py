# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`lora:` in a recipe trains adapters on every projection, and thresholds; it resumes, merges and saves them."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import ham_hf.training.train as train_module
from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.training.recipe import EMBEDDED_TOKENIZER, read_recipe
from ham_hf.training.train import train
from ham_hf.training.trainer import HAMTrainer

peft = pytest.importorskip("peft")

# peft asks by the old name whether activations are checkpointed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

RECIPE = """\
output: {folder}/{name}
model: {{from: {folder}/base}}
data: {{files: {folder}/text.txt, document: paragraph, shuffle_rows: 8}}
steps: 5
context: 32
usage: {{target: 0.25}}
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
evaluation: {{every: 5, rows: 2, usages: [0.25]}}
trainer:
  {{per_device_train_batch_size: 2, save_steps: 2, logging_steps: 1, learning_rate: 0.01, use_cpu: true,
    {checkpointing}: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With text, and a small HAM that has a learned router, to start from."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "text.txt").write_text("\n\n".join(f"The captain looked at {n} grey seas at once." for n in range(200)))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TOKENIZER)
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        router="learned_error",
    )
    HAMForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield


@pytest.fixture(scope="module")
def recipe_of(folder, checkpointing):
    def write(name, old="", new=""):
        assert old in RECIPE
        text = RECIPE.replace(old, new).format(folder=folder, name=name, checkpointing=checkpointing)
        (folder / f"{name}.yaml").write_text(text)
        return read_recipe(folder / f"{name}.yaml")

    return write


class Watch(TrainerCallback):
    """Keeps the model of a training; `KeyboardInterrupt` after a step, if asked."""

    def __init__(self, stop=None):
        self.stop = stop

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.before = {name: x.detach().clone() for name, x in model.named_parameters()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after = {name: x.detach().clone() for name, x in model.named_parameters()}
        self.checkpointing = model.get_base_model().is_gradient_checkpointing


def watched(recipe, stop=None):
    watch = Watch(stop)
    original = HAMTrainer.__init__

    def init(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, watch], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HAMTrainer, "__init__", init)
        if stop is None:
            train(recipe)
        else:
            with pytest.raises(KeyboardInterrupt):
                train(recipe)
    return watch


@pytest.fixture(scope="module")
def unbroken(recipe_of):
    """The recipe of a training that nothing interrupted, and what was seen of it."""
    recipe = recipe_of("unbroken")
    return recipe, watched(recipe)


def log_of(recipe):
    return [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]


def is_threshold(name):
    return name.endswith(".threshold")


def test_every_projection_has_an_adapter_and_nothing_else_changes(unbroken, folder):
    _, watch = unbroken
    base = HAMForCausalLM.from_pretrained(folder / "base")
    projections = {name for name, x in base.named_modules() if isinstance(x, nn.Linear) and name != "lm_head"}
    assert {name.rpartition(".")[2] for name in projections} >= {"a_proj", "b_proj", "z_proj"}
    assert "model.layers.1.mixer.router.down_proj" in projections
    adapted = {
        name.removeprefix("base_model.model.").partition(".lora_B.")[0] for name in watch.after if "lora_B" in name
    }
    assert adapted == projections
    changed = {name for name, x in watch.after.items() if not torch.equal(x, watch.before[name])}
    assert changed == {name for name in watch.after if ".lora_" in name or is_threshold(name)}
    assert watch.checkpointing


def test_the_merged_model_is_the_trained_one(unbroken, folder):
    recipe, watch = unbroken
    model = AutoModelForCausalLM.from_pretrained(recipe.output + "/model")
    assert type(model) is HAMForCausalLM
    for name, threshold in model.named_parameters():
        if is_threshold(name):
            assert torch.equal(threshold, watch.after[f"base_model.model.{name}"])
    # As peft has it, from the last checkpoint, without merging.
    adapted = peft.PeftModel.from_pretrained(
        HAMForCausalLM.from_pretrained(folder / "base"), f"{recipe.output}/checkpoint-5"
    ).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = adapted(ids, threshold=0.5).logits
        torch.testing.assert_close(model(ids, threshold=0.5).logits, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(adapted.get_base_model()(ids, threshold=2.0).logits, expected, atol=1e-3)
    assert model.generate(ids, max_new_tokens=2, kv_usage=0.5).shape == (1, 42)  # calibrated


@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_an_interrupted_training_goes_on_to_the_same_weights(unbroken, recipe_of, monkeypatch, stop):
    recipe, _ = unbroken
    broken = recipe_of(f"broken{stop}")
    if stop == recipe.steps:  # trained, but the model is not written
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "write_model", lambda *_: None)
            train(broken)
    else:
        watched(broken, stop)
    assert not (Path(broken.output) / "model").exists()
    train(broken)
    assert log_of(broken) == log_of(recipe)
    a, b = (load_file(f"{x.output}/model/model.safetensors") for x in (recipe, broken))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_adapters_alone(recipe_of, folder):
    recipe = recipe_of("alone", "usage: {{target: 0.25}}\nlora: {{", "lora: {{merge: false, ")
    watch = watched(recipe)
    changed = {name for name, x in watch.after.items() if not torch.equal(x, watch.before[name])}
    assert changed == {name for name in watch.after if ".lora_" in name}
    output = Path(recipe.output) / "model"
    assert not (output / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), output)
    assert all(torch.equal(x, watch.after[name]) for name, x in loaded.named_parameters())
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == f"{folder}/base"
    assert AutoTokenizer.from_pretrained(output).eos_token_id is not None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank: 4", "rnak: 4", "`lora` has no key `rnak`: did you mean `rank`"),
        ("rank: 4", "rank: 0", "`lora`: `rank` must be at least 1, got 0"),
        ("alpha: 8", "alpha: 0", "`lora`: `alpha` must be above 0, got 0"),
        ("dropout: 0.1", "dropout: 1", "`lora`: `dropout` must be at least 0 and below 1, got 1"),
        ("rank: 4", "target_modules: []", "`lora`: `target_modules` must name at least one module"),
        ("rank: 4", "target_modules: 3", "`lora: target_modules` must be text or a list of text, got 3"),
        ("lora: {{rank: 4, alpha: 8, dropout: 0.1}}", "lora:", "`lora` must hold keys with values .*, got None"),
        ("rank: 4", "target_modules: '*'", "`lora: target_modules` does not go with this model: nothing to repeat"),
        (
            "lora: {{rank: 4",
            "distillation: {{weight: 0}}\nlora: {{merge: false",
            "`lora: merge` must be true where `distillation: open_gates` is not null",
        ),
        (
            "lora: {{rank: 4",
            "distillation: {{weight: 0}}\nlora: {{rank: 4",
            "`distillation: open_gates` must be null for this checkpoint: .* no shut gate",
        ),
        ("rank: 4", "merge: false", "`lora: merge` must be true where `usage` has a `target`"),
        ("target: 0.25", "freeze_steps: 2", "`usage` must have a `target` or a `schedule` beside `freeze_steps`"),
        ("from: {folder}/base", "new: {{hidden_size: 16}}", "`lora` must have `model: from`"),
        ("rank: 4", "target_modules: [quary]", "`lora: target_modules` does not go with this model: .*quary"),
    ],
)
def test_refusals(recipe_of, old, new, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(recipe_of("refused", old, new))


def test_a_missing_peft_is_told_of(recipe_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe = recipe_of("without")
    with pytest.raises(ImportError, match=r"`lora` needs peft, which the extra `train` brings"):
        train(recipe)
    assert not Path(recipe.output).exists()
