# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A training steers, evaluates, saves whole checkpoints only, stops at NaN, and goes on as if never interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import ham_hf.training.train as train_module
import ham_hf.training.trainer as trainer_module
from ham_hf.cli import main
from ham_hf.training.recipe import UsageRecipe, read_recipe
from ham_hf.training.setup import build_data
from ham_hf.training.stop_on_signal import StopOnSignal
from ham_hf.training.train import train
from ham_hf.training.trainer import HAMTrainer

RECIPE = """\
output: {folder}/{name}
model:
  new: {{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}}
data: {{files: {folder}/text.txt, document: paragraph, shuffle_rows: 8}}
steps: 7
context: 32
usage: {{schedule: [[0, 1.0], [6, 0.25]]}}
evaluation: {{every: 4, rows: 3, usages: [0.25], thresholds: [0, 2]}}
trainer:
  {{per_device_train_batch_size: 2, gradient_accumulation_steps: 2, save_steps: 3, logging_steps: 1, use_cpu: true}}
"""

NEW = RECIPE.splitlines()[2].strip()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_writer(tmp_path):
    random = np.random.default_rng(0)
    words = "the captain looked at a grey sea and said nothing more of it".split()
    documents = [" ".join(random.choice(words, size=random.integers(5, 40))) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))

    def write(name, old="", new="", text=""):
        assert old in RECIPE
        (tmp_path / f"{name}.yaml").write_text(RECIPE.replace(old, new).format(folder=tmp_path, name=name) + text)
        return read_recipe(tmp_path / f"{name}.yaml")

    return write


@pytest.fixture
def recipe_of(tmp_path):
    return recipe_writer(tmp_path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The recipe of a training that nothing interrupted."""
    recipe = recipe_writer(tmp_path_factory.mktemp("unbroken"))("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(recipe.output) / ".." / "cache")
        train(recipe)
    return recipe


def log_of(recipe):
    return [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]


def losses_of(recipe):
    return [x["loss"] for x in log_of(recipe) if "loss" in x]


def checkpoints_of(recipe):
    return sorted(x.name for x in Path(recipe.output).glob("*checkpoint*"))


def at_step(monkeypatch, step, event, action):
    """Has an action done to the model at a step of the next training."""

    class Act(TrainerCallback):
        pass

    def act(self, args, state, control, model=None, **kwargs):
        if state.global_step == step:
            action(model)

    setattr(Act, event, act)
    original = HAMTrainer.__init__

    def init(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, Act()], **kwargs)

    monkeypatch.setattr(HAMTrainer, "__init__", init)


def interrupt(model=None):
    raise KeyboardInterrupt


def test_a_training_gives_a_model_that_loads(recipe_of, capsys):
    recipe = recipe_of("run")
    folder = train(recipe)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the captain", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, kv_usage=0.5).shape[1] == ids.shape[1] + 3  # calibrated
    assert json.loads((folder / "recipe.json").read_text()) == recipe.to_dict()
    assert (folder / "log.jsonl").read_text() == (Path(recipe.output) / "log.jsonl").read_text()
    assert not list(Path(recipe.output).rglob("training_args.bin"))
    assert checkpoints_of(recipe) == ["checkpoint-6", "checkpoint-7"]
    assert not (Path(recipe.output) / "partial").exists()
    assert main(["card", str(folder)]) == 0
    assert "per_device_train_batch_size: 2" in (folder / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "step      1  loss 8.3" in printed
    assert "for usage 0.25" in printed


def test_the_log_tells_the_schedule_and_every_setting(unbroken):
    recipe = unbroken
    steps = [x for x in log_of(recipe) if "loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 8))
    assert all(0 <= x["kv_usage"] <= 1 and "threshold/layer_1" in x for x in steps)
    # Everything is to be kept at first, so that the thresholds fall; then they rise.
    thresholds = [x["threshold/layer_0"] for x in steps]
    assert thresholds[1] < thresholds[0]
    assert thresholds[-1] > min(thresholds)
    evaluations = [x for x in log_of(recipe) if "eval_loss" in x]
    assert [x["step"] for x in evaluations] == [4, 7]
    for x in evaluations:
        assert x["eval_kept/threshold_0"] == 1
        assert x["eval_kept/threshold_2"] == 0
        assert abs(x["eval_kept/usage_0.25"] - 0.25) < 0.1
        assert x["eval_loss/threshold_0"] != x["eval_loss/threshold_2"]


def test_the_log_tells_how_scores_are_spread_at_the_learned_thresholds(unbroken):
    recipe = unbroken
    evaluations = [x for x in log_of(recipe) if "eval_loss" in x]
    for x in evaluations:
        counts = [x[f"eval_scores/layer_{n}"] for n in range(2)]
        assert all(len(layer) == 50 and sum(layer) == 3 * recipe.context for layer in counts)
    model = AutoModelForCausalLM.from_pretrained(recipe.output + "/model")
    rows = build_data(recipe, AutoTokenizer.from_pretrained(recipe.output + "/model"), 4)[1]
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    scores = model(**batch, output_routing_scores=True).routing_scores
    for n, layer in enumerate(scores):
        found = torch.tensor(evaluations[-1][f"eval_scores/layer_{n}"])
        assert (torch.histc(layer.detach(), 50, 0, 1).long() - found).abs().sum() <= 4, "but for rounding at an edge"
    assert not any("eval_scores" in key for x in log_of(recipe) if "loss" in x for key in x)


def test_the_loss_of_an_evaluation_is_that_of_its_tokens(unbroken):
    recipe = unbroken
    model = AutoModelForCausalLM.from_pretrained(recipe.output + "/model")
    tokenizer = AutoTokenizer.from_pretrained(recipe.output + "/model")
    rows, held_out, _ = build_data(recipe, tokenizer, 4)
    assert rows.held_out == len(held_out) == 3
    batch = {name: torch.stack([row[name] for row in held_out]) for name in held_out[0]}
    with torch.no_grad():
        expected = model(**batch, threshold=2.0).loss.item()
    assert log_of(recipe)[-1]["eval_loss/threshold_2"] == pytest.approx(expected, abs=1e-5)


def test_thresholds_keep_their_rate_and_are_not_clipped(recipe_of, monkeypatch):
    seen, found = [], []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            thresholds = [p for name, p in model.named_parameters() if name.endswith("threshold")]
            others = [p for name, p in model.named_parameters() if not name.endswith("threshold")]
            rates = [group["lr"] for group in optimizer.param_groups]
            routers = {id(p) for name, p in model.named_parameters() if ".router." in name}
            found.append({group["lr"] for group in optimizer.param_groups if id(group["params"][0]) in routers})
            norm = torch.stack([p.grad.norm() for p in others if p.grad is not None]).norm().item()
            seen.append((rates, norm, max(p.grad.abs().max().item() for p in thresholds)))

    original = HAMTrainer.__init__

    def init(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, Look()], **kwargs)

    monkeypatch.setattr(HAMTrainer, "__init__", init)
    recipe = recipe_of("run", "use_cpu", "max_grad_norm: 1e-6, learning_rate: 0.01, warmup_steps: 3, use_cpu")
    usage = replace(recipe.usage, threshold_learning_rate=0.3, router_learning_rate=0.03)
    train(replace(recipe, usage=usage, model=replace(recipe.model, new=recipe.model.new | {"router": "learned"})))
    assert all(rates[-1] == 0.3 for rates, _, _ in seen)
    assert found[3] == {0.03}, "of all parameters of routers"
    assert [round(rates[0], 4) for rates, _, _ in seen[:4]] == [0, 0.0033, 0.0067, 0.01]
    assert all(norm < 1.1e-6 for _, norm, _ in seen)
    assert max(gradient for _, _, gradient in seen) > 1e-4


def test_an_interrupted_training_goes_on_to_the_same_losses(unbroken, recipe_of, monkeypatch):
    broken = recipe_of("broken")
    with monkeypatch.context() as patch:
        at_step(patch, 5, "on_step_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert checkpoints_of(broken) == ["checkpoint-3"]
    train(broken)
    assert log_of(broken) == log_of(unbroken)
    a, b = (AutoModelForCausalLM.from_pretrained(x.output + "/model").state_dict() for x in (unbroken, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_that_is_written_later_is_the_same(unbroken, recipe_of, monkeypatch):
    later = recipe_of("later")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_model", lambda *_: None)
        train(later)
    assert not (Path(later.output) / "model").exists()
    train(later)
    configurations = [json.loads((Path(x.output) / "model" / "config.json").read_text()) for x in (unbroken, later)]
    assert configurations[0] == configurations[1]
    assert configurations[0]["target_kv_usage"] == 0.25, "the schedule's last"
    assert configurations[0].get("use_cache", True), "Trainer switches it off"
    a, b = (AutoModelForCausalLM.from_pretrained(x.output + "/model").state_dict() for x in (unbroken, later))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("limit", "kept"), [(-1, [3, 6, 7]), (1, [7])])
def test_old_checkpoints_are_removed_down_to_a_limit(recipe_of, limit, kept):
    recipe = recipe_of("run", "use_cpu", f"save_total_limit: {limit}, use_cpu")
    train(recipe)
    assert checkpoints_of(recipe) == [f"checkpoint-{step}" for step in kept]


@pytest.mark.parametrize(
    "file", ["optimizer.pt", *(pytest.param(x, marks=pytest.mark.slow) for x in ("data_state.json", "recipe.md"))]
)
def test_a_save_that_is_interrupted_leaves_whole_checkpoints(unbroken, recipe_of, monkeypatch, file):
    broken = recipe_of("broken")
    save, write_whole = torch.save, trainer_module.write_whole

    def break_at(path):
        path = Path(path)
        if path.name == file and path.parent.name in ("checkpoint-6", "model"):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    def broken_save(content, path):
        break_at(path)
        save(content, path)

    def broken_write(path, text):
        break_at(path)
        write_whole(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken_save)
        for module in (train_module, trainer_module):
            patch.setattr(module, "write_whole", broken_write)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    last = "checkpoint-7" if file == "recipe.md" else "checkpoint-3"
    assert Path(get_last_checkpoint(broken.output)).name == last
    assert not (Path(broken.output) / "model").exists()
    train(broken)
    assert log_of(broken) == log_of(unbroken)
    a, b = (AutoModelForCausalLM.from_pretrained(x.output + "/model").state_dict() for x in (unbroken, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_signal_saves_the_step_and_stops(recipe_of, monkeypatch, tmp_path, capsys):
    recipe = recipe_of("run")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 4, "on_step_begin", lambda model: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["train", str(tmp_path / "run.yaml")]) == 130
    assert "The same command goes on from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints_of(recipe) == ["checkpoint-3", "checkpoint-5"]
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert len(losses_of(recipe)) == 7


def test_a_second_signal_interrupts_at_once():
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)  # within a second: a launcher passes on what the terminal sent
        stop._asked_at -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def poison_weight(model):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")


def poison_gradient(model):
    model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("step", "event", "action", "message"),
    [
        pytest.param(5, "on_step_begin", poison_weight, "the loss of step 6 is not finite", marks=pytest.mark.slow),
        (6, "on_step_end", poison_weight, "a weight after step 6 is not finite"),
    ],
)
def test_nan_stops_before_anything_is_written(recipe_of, monkeypatch, tmp_path, capsys, step, event, action, message):
    recipe = recipe_of("run")
    with monkeypatch.context() as patch:
        at_step(patch, step, event, action)
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert f"the last good state is {recipe.output}/checkpoint-3" in error
    assert checkpoints_of(recipe) == ["checkpoint-3"]
    train(recipe)
    assert len(losses_of(recipe)) == 7


def test_nan_in_gradients_alone_stops_before_the_update(recipe_of, monkeypatch):
    recipe = recipe_of("run")
    original = HAMTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 4:
            poison_gradient(model)
        return loss

    monkeypatch.setattr(HAMTrainer, "training_step", training_step)
    with pytest.raises(FloatingPointError, match="the gradient of step 5 is not finite"):
        train(recipe)
    assert checkpoints_of(recipe) == ["checkpoint-3"]


@pytest.mark.slow
def test_activation_checkpointing_and_bfloat16(recipe_of, checkpointing):
    losses = {}
    for option in ("", f"{checkpointing}: true, ", "bf16: true, "):
        recipe = recipe_of(f"run{len(losses)}", "{{per", f"{{{{{option}per")
        train(recipe)
        losses[option] = losses_of(recipe)
    plain, checkpointed, half = losses.values()
    assert checkpointed == plain
    assert half != plain
    assert half == pytest.approx(plain, abs=0.05)  # measured 4e-3


def test_training_goes_on_from_a_checkpoint(unbroken, recipe_of):
    source = f"  from: {unbroken.output}/model\n"
    recipe = recipe_of("second", RECIPE[RECIPE.index("  new") : RECIPE.index("data:")], source)
    train(recipe)
    assert losses_of(recipe)[0] < losses_of(unbroken)[0]


def test_another_recipe_does_not_go_on(unbroken):
    with pytest.raises(ValueError, match="`data: shuffle_rows` was 8 and is now 9"):
        train(replace(unbroken, data=replace(unbroken.data, shuffle_rows=9)))
    with pytest.raises(ValueError, match=r"`trainer: learning_rate` was 0.001 and is now 0.1"):
        train(replace(unbroken, trainer=unbroken.trainer | {"learning_rate": 0.1}))
    # What has no effect on the losses may change.
    train(replace(unbroken, trainer=unbroken.trainer | {"save_total_limit": 5}))


@pytest.mark.parametrize("other", ["thesis.txt", "model", "checkpoint-3"])
def test_an_output_with_other_files_is_left_alone(recipe_of, other):
    recipe = recipe_of("run")
    (Path(recipe.output) / other).mkdir(parents=True)
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        train(recipe)
    assert [x.name for x in Path(recipe.output).iterdir()] == [other]


@pytest.mark.parametrize("left", [[".recipe.json.x7.partial"], ["recipe.json", "log.jsonl", "runs", "partial"]])
def test_a_training_that_was_cut_before_its_first_checkpoint_begins_anew(recipe_of, left):
    recipe = recipe_of("run")
    Path(recipe.output).mkdir()
    for name in left:
        if name in ("recipe.json", "log.jsonl"):
            (Path(recipe.output) / name).write_text("{}\n")
        else:
            (Path(recipe.output) / name).mkdir()
    train(replace(recipe, steps=2, usage=UsageRecipe()))
    assert len(losses_of(recipe)) == 2


def test_rows_are_evaluated_once_by_several_processes():
    assert train_module.evaluation_batch(20, 2, 8) == 5
    assert train_module.evaluation_batch(16, 2, 8) == 8
    assert train_module.evaluation_batch(14, 2, 4) == 1
    with pytest.raises(ValueError, match="`evaluation: rows` must be a multiple of the 2 processes, got 3"):
        train_module.evaluation_batch(3, 2, 8)


def test_a_process_with_several_gpus_is_refused(recipe_of, monkeypatch):
    monkeypatch.setattr(train_module.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process must have one GPU, and sees 2: start one for each"):
        train(recipe_of("run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs they see each other")
def test_processes_that_do_not_see_each_other_are_refused(recipe_of, monkeypatch):
    recipe = recipe_of("run", ", use_cpu: true", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`trainer: use_cpu` must be true for several processes on a CPU"):
        train(recipe)


def test_an_output_that_is_a_file_is_refused(recipe_of, tmp_path):
    recipe = recipe_of("run")
    Path(recipe.output).write_text("mine")
    with pytest.raises(ValueError, match="`output` must be a folder, got the file"):
        train(recipe)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows: 3", "rows: 300", "`data` has too little text: it fills .* rows of 32 tokens, takes 300 for"),
        ("train_batch_size: 2", "train_batch_size: 200", "`data` has too little text: .* and 400 for each step"),
        ("hidden_size: 16", "hidden_size: 15", "`model: new` is not a valid HAM: RoPE needs an even `head_dim`"),
        ("new: {{", "new: {{vocab_size: 9, ", "an embedding for each of the 4096 tokens.*`vocab_size` 9"),
        ("schedule: [[0, 1.0], [6, 0.25]]", "target: [0.5]", "`usage: target` must have one entry per hybrid layer"),
        (
            "schedule: [[0, 1.0], [6, 0.25]]",
            "router_learning_rate: 1",
            "`usage: router_learning_rate` must be left out",
        ),
        ("use_cpu: true", "use_cpu: true, optim: adafactor", "`trainer: optim` must be SGD, or .*, got 'adafactor'"),
        ("use_cpu: true", "use_cpu: true, optim: adamx", "`trainer` has a value that Trainer does not take"),
        ("text.txt", "binary.txt", "`data` must be UTF-8 text in every file"),
        (NEW, "from: {folder}", "`model: from` must be a HAM checkpoint, got '.*' without a config.json"),
        (NEW, "from: {folder}/nowhere", "`model: from` must be a HAM checkpoint, got '.*', no folder here: "),
        (NEW, NEW + "\n  tokenizer: {folder}", "`model: tokenizer` must be a folder, .* that holds a tokenizer, got "),
        ("new: {{", "new: {{layer_types: [linear_attention, linear_attention], ", "`usage` must be left out"),
    ],
)
def test_refusals(recipe_of, tmp_path, old, new, message):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    recipe = recipe_of("run", old, new)
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert not Path(recipe.output).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on_to_the_same_losses(unbroken, recipe_of, tmp_path, number):
    broken = recipe_of("broken")
    command = [sys.executable, "-m", "ham_hf.cli", "train", str(tmp_path / "broken.yaml")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HOME": str(tmp_path / "hf")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step      5"):
                process.send_signal(number)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert subprocess.run(command, env=environment).returncode == 0
    assert log_of(broken) == log_of(unbroken)


def test_data_is_told_of_what_is_missing(recipe_of, tmp_path, capsys):
    recipe_of("run")
    shutil.move(tmp_path / "text.txt", tmp_path / "other.txt")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "`data`: `files` must be files, folders" in error


def test_a_model_without_hybrid_layers_is_trained(recipe_of):
    recipe = recipe_of("run", "new: {{", "new: {{layer_types: [linear_attention, full_attention], ")
    folder = train(replace(recipe, usage=UsageRecipe(), steps=2))
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hybrid_layers == 0
    evaluation = log_of(recipe)[-1]
    assert set(evaluation) == {"eval_loss", "step"}


def test_thresholds_that_the_configuration_holds_are_held(recipe_of):
    """Without a word on usage in the recipe; a target in it has them learn."""
    held = NEW.replace("}}", ", target_kv_usage: null}}")
    recipe = recipe_of("held", NEW, held)
    model = AutoModelForCausalLM.from_pretrained(train(replace(recipe, usage=UsageRecipe(), steps=2)))
    assert all((layer.mixer.threshold == 0.5).all() for layer in model.model.layers)
    assert model.config.target_kv_usage is None
    with pytest.raises(ValueError, match="`usage` must have a `target` or a `schedule` beside `freeze_steps`"):
        train(replace(recipe, usage=UsageRecipe(freeze_steps=1), steps=2, output=f"{recipe.output}-refused"))
    recipe = replace(recipe, usage=UsageRecipe(target=0.1), steps=2, output=f"{recipe.output}-not")
    model = AutoModelForCausalLM.from_pretrained(train(recipe))
    assert any((layer.mixer.threshold != 0.5).all() for layer in model.model.layers)
