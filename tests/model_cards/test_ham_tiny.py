# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The recipe of ham-tiny resumes exactly, and its batches, schedules and first weights are what it says."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import ham_hf
from ham_hf.training.documents import SPLIT_FILES, Document, write_documents
from ham_hf.training.initialization import initialize_recall
from ham_hf.training.sampling import TokenSampler
from model_cards.ham_tiny import train as ham_tiny
from model_cards.ham_tiny.tokenizer import train_tokenizer

CHECKPOINT = Path(ham_hf.__file__).parent / "checkpoints" / "ham-tiny"
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 brings Muon")
WORDS = "the sea was calm and the captain spoke of home while his men slept below in the dark".split()


@pytest.fixture
def sources(tmp_path):
    """A made-up corpus and its tokenizer."""
    generator = torch.Generator().manual_seed(0)
    for split in SPLIT_FILES:
        picks = torch.randint(len(WORDS), (3, 3000), generator=generator).tolist()
        documents = [Document("made-up", str(i), " ".join(WORDS[j] for j in x)) for i, x in enumerate(picks)]
        write_documents(tmp_path / SPLIT_FILES[split], documents)
    texts = [" ".join(WORDS)] * 20
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def recipe(monkeypatch):
    """A few small steps that reach every branch: calibration, random usage, long context, evaluation, saving."""
    monkeypatch.setattr(ham_tiny, "CALIBRATE_EVERY", 2)
    monkeypatch.setattr(ham_tiny, "EVALUATE_EVERY", 4)
    monkeypatch.setattr(ham_tiny, "SAVE_EVERY", 3)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    original = ham_tiny.HAMConfig
    monkeypatch.setattr(ham_tiny, "HAMConfig", lambda **fields: original(**(fields | small | {"head_dim": 8})))
    return ham_tiny.Recipe(
        steps=9,
        warmup=2,
        decay_from=3,
        repeat_until=2,
        repeat_context=8,
        context=16,
        tokens_per_step=64,
        late_from=4,
        late_context=32,
        late_tokens_per_step=64,
    )


@needs_muon
def test_an_interrupted_run_resumes_to_the_same_weights(sources, recipe, monkeypatch):
    def run(output):
        return ham_tiny.train(sources, sources / "tokenizer", output, recipe)

    unbroken = run(sources / "unbroken").state_dict()
    step = ham_tiny.train_step

    def interrupted(*arguments):
        if arguments[-1] == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(ham_tiny, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(sources / "broken")
    with safe_open(sources / "broken" / "state.safetensors", framework="pt") as state:
        assert state.metadata()["step"] == "2"
    monkeypatch.setattr(ham_tiny, "train_step", step)
    resumed = run(sources / "broken").state_dict()
    for name, x in unbroken.items():
        assert torch.equal(x, resumed[name]), name
    logs = [(sources / run / "log.jsonl").read_text().splitlines() for run in ("unbroken", "broken")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == recipe.steps


@needs_muon
def test_a_finished_checkpoint_is_gone_on_from(sources, recipe, monkeypatch):
    """It starts with its weights, not with copying layers, and tells both recipes."""
    still = replace(recipe, steps=2, decay_from=1, matrix_lr=0.0, other_lr=0.0, threshold_lr=0.0)
    recipes = {"first": recipe, "continued": still, "long": replace(still, steps=3)}
    monkeypatch.setattr(ham_tiny, "RECIPES", recipes)
    arguments = ["x", "--corpus", str(sources), "--tokenizer", str(sources / "tokenizer"), "--output"]
    monkeypatch.setattr("sys.argv", [*arguments, str(sources / "first")])
    ham_tiny.main()
    first = sources / "first" / "ham-tiny"
    monkeypatch.setattr("sys.argv", [*arguments, str(sources / "second"), "--start", str(first)])
    ham_tiny.main()
    states = [AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (first, sources / "second" / "ham-tiny")]
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items() if "quantiles" not in name)
    recipes = json.loads((sources / "second" / "ham-tiny" / "recipe.json").read_text())
    assert [(x["steps"], x["seed"]) for x in recipes] == [(9, 0), (2, 1)], "the second run draws other windows"
    again = [*arguments, str(sources / "third"), "--start", str(sources / "second" / "ham-tiny"), "--recipe", "long"]
    monkeypatch.setattr("sys.argv", again)
    ham_tiny.main()
    recipes = json.loads((sources / "third" / "ham-tiny" / "recipe.json").read_text())
    assert [(x["steps"], x["seed"]) for x in recipes] == [(9, 0), (2, 1), (3, 2)]
    monkeypatch.setattr("sys.argv", [*arguments, str(sources / "first"), "--start", str(first)])
    with pytest.raises(ValueError, match="is of a run with another recipe"):
        ham_tiny.main()


@needs_muon
def test_the_weights_that_a_run_started_with_have_their_share_in_the_result(sources, recipe):
    first = ham_tiny.train(sources, sources / "tokenizer", sources / "first", recipe)
    first.save_pretrained(sources / "start")
    recipe = replace(recipe, seed=1)
    runs = {}
    for share in (0.0, 0.25):
        output = sources / f"share-{share}"
        with_share = replace(recipe, start_share=share)
        runs[share] = ham_tiny.train(sources, sources / "tokenizer", output, with_share, sources / "start")
    for start, end, mixed in zip(*(x.parameters() for x in (first, *runs.values())), strict=True):
        torch.testing.assert_close(mixed, 0.25 * start + 0.75 * end, rtol=0, atol=1e-6)
        assert start.shape != (32, 32) or not torch.equal(start, end), "the run changed it"


def test_usage_of_a_step_is_drawn_as_the_recipe_says():
    recipe = ham_tiny.Recipe()
    usages = [recipe.usage_at(step) for step in range(recipe.steps)]
    assert all(x is None for x in usages[::2]), "every second step runs at the learned thresholds"
    early, late = usages[101 : recipe.late_from : 2], usages[recipe.late_from + 1 :: 2]
    assert max(early) < 1
    assert abs(sum(early) / len(early) - 0.5) < 0.05
    assert 0.25 < sum(x == 1 for x in late) / len(late) < 0.5, "late steps practise keeping everything"


def test_an_older_pytorch_is_refused_by_name(monkeypatch, recipe):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match=r"`torch.optim.Muon` of PyTorch 2.9 or newer, found"):
        ham_tiny.build_optimizers(torch.nn.Linear(2, 2), recipe)


def test_learning_rate_warms_up_stays_and_falls():
    recipe = ham_tiny.Recipe()
    rates = [recipe.learning_rate(step) for step in range(recipe.steps)]
    assert rates[0] == 1 / recipe.warmup
    assert set(rates[recipe.warmup : recipe.decay_from + 1]) == {1.0}
    assert rates[recipe.decay_from :] == sorted(rates[recipe.decay_from :], reverse=True)
    assert rates[-1] == 0.02


def test_batches_grow_longer():
    recipe = ham_tiny.Recipe()
    assert recipe.batch_shape(0) == (8, 256)
    assert recipe.batch_shape(recipe.repeat_until) == (4, 512)
    assert recipe.batch_shape(recipe.late_from) == (4, 1024)


def test_rows_repeat_text_or_random_tokens(sources):
    tokenizer = AutoTokenizer.from_pretrained(sources / "tokenizer")
    sampler = TokenSampler(sources, "train", tokenizer)
    plain = sampler.batch(3, 16, 64)
    assert torch.equal(plain, sampler.batch(3, 16, 64)), "a pure function of the seed"

    def period(row):
        return next(p for p in range(1, 65) if torch.equal(row[p:], row[:-p]))

    text, noise = (sampler.batch(3, 16, 64, repeats) for repeats in ((1.0, 0.0), (0.0, 1.0)))
    for before, row in zip(plain, text, strict=True):
        assert period(row) <= 32
        assert torch.equal(row[:4], before[:4])
    assert all(4 <= period(row) <= 32 for row in noise)
    assert len({period(row) for row in noise}) > 4, "periods vary"
    assert len(noise.unique()) > 2 * len(text.unique())
    mixed = sampler.batch(3, 16, 64, (0.3, 0.3))
    assert any(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True)), "the others stay as they are"


def test_names_are_told_several_times_within_the_text(sources):
    tokenizer = AutoTokenizer.from_pretrained(sources / "tokenizer")
    sampler = TokenSampler(sources, "train", tokenizer)
    plain, told = sampler.batch(3, 16, 256), sampler.batch(3, 16, 256, names=1.0)
    assert plain.shape == told.shape
    ordinary = set(plain.flatten().tolist())
    for before, row in zip(plain.tolist(), told.tolist(), strict=True):
        strange = [(a, b) for a, b in itertools.pairwise(row) if {a, b} - ordinary]
        repeated = [x for x in strange if strange.count(x) > 1]
        assert repeated, "a name comes again"
        tokens = iter(row)
        assert all(x in tokens for x in before[:160]), "the text goes on behind a name"
    some = sampler.batch(3, 16, 256, names=0.3)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(plain, some, strict=True)) < 16


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_a_copying_layer_recalls_before_any_training(tokenizer):
    """The token after an earlier occurrence of the current one is made likelier, and not without the start."""
    gains = {}
    for name, initialize in (("default", lambda model: None), ("recall", initialize_recall)):
        torch.manual_seed(0)
        model = ham_tiny.HAMForCausalLM(ham_tiny.ham_tiny_config(tokenizer)).eval()
        initialize(model)
        ids = torch.randint(10, len(tokenizer), (8, 20)).repeat(1, 2)
        logits = model(ids, threshold=0.0, use_cache=False).logits[:, 20:-1]
        target = logits.gather(2, ids[:, 21:, None]).squeeze(2)
        gains[name] = ((target - logits.mean(2)) / logits.std(2)).mean().item()
    assert abs(gains["default"]) < 0.2, gains
    assert gains["recall"] > 0.4, gains


@needs_muon
def test_a_diverged_run_stops_before_it_saves(sources, recipe, monkeypatch):
    build = ham_tiny.build_optimizers

    def poisoned(model, recipe):
        torch.nn.init.constant_(model.model.norm.weight, torch.nan)
        return build(model, recipe)

    monkeypatch.setattr(ham_tiny, "build_optimizers", poisoned)
    with pytest.raises(RuntimeError, match="nan"):
        ham_tiny.train(sources, sources / "tokenizer", sources / "run", recipe)
    assert not (sources / "run" / "state.safetensors").exists()
