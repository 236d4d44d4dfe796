# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Layer-wise transfer teaches each layer by itself, leaves the source's part alone, and goes on as if never broken."""

import json
import math
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

from ham_hf import HAMForCausalLM
from ham_hf.conversion.memories import SHUT, added_parameters
from ham_hf.evaluation import calibrate
from ham_hf.evaluation.losses import window_figures
from ham_hf.training import transfer as transfer_module
from ham_hf.training.control import hybrid_mixers, parameter_groups
from ham_hf.training.distillation import open_gates
from ham_hf.training.recipe import TransferRecipe, read_recipe
from ham_hf.training.setup import build_data
from ham_hf.training.train import train
from ham_hf.training.transfer import Students, layers_to_teach, relative_error

# What conversion adds to a Transformer's layer, and what it takes from it.
ADDED = {"conv.weight", "a_proj.weight", "b_proj.weight", "A_log", "dt_bias", "rnn_norm.weight", "threshold"} | {
    f"{gate}_gate_proj.{x}" for gate in ("rnn", "kv") for x in ("weight", "bias")
}
SOURCE = {f"{x}_proj.weight" for x in "qkvo"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, convert_llama):
    """A random Llama with a tokenizer, the HAM that was made of it, with a window, and text."""
    folder = tmp_path_factory.mktemp("transfer")
    convert_llama(folder, "--window", "4", "--sinks", "1")
    return folder


@pytest.fixture
def converted(folders):
    return HAMForCausalLM.from_pretrained(folders / "converted")


def students_of(model, folder, **settings):
    """Students at a usage of a quarter, and a batch for them."""
    arguments = TrainingArguments(str(folder), use_cpu=True, adam_beta2=0.95)
    students = Students(model, TransferRecipe(**{"steps": 30} | settings), 0.2, arguments)
    return students, {"input_ids": torch.randint(300, (4, 48), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def learned(folders):
    """Students after 60 steps on one batch, the batch, and the figures of every step."""
    model = HAMForCausalLM.from_pretrained(folders / "converted")
    students, batch = students_of(model, folders)
    figures = []
    students.match_scales(batch)
    for _ in range(60):
        students.step([batch], 3e-2)
        figures.append(students.figures())
    return students, batch, figures


def test_an_rnn_begins_at_the_scale_of_its_attention(converted, tmp_path):
    students, batch = students_of(converted, tmp_path)
    students.step([batch], 0.0)
    drowned = students.figures()["transfer_error"]
    reads = []
    # With the RNN's gates shut and attention's at a half, the projection reads half of what attention read.
    hooks = [
        mixer.o_proj.register_forward_pre_hook(lambda _, x: reads.append(2 * x[0].square().mean().sqrt()))
        for mixer in students.mixers
    ]
    students.match_scales(batch)
    for hook in hooks:
        hook.remove()
    for student, mixer, read in zip(students.students, students.mixers, reads, strict=True):
        torch.testing.assert_close(student.rnn_norm.weight.detach(), read.expand(student.rnn_norm.weight.shape))
        assert (mixer.rnn_norm.weight == 1).all(), "the model changes when it is over"
        assert student.rnn_norm.weight.requires_grad
    assert len(reads) == len(students.mixers)
    students.step([batch], 0.0)
    # Measured 0.31, and 0.96 with the norm at 1.
    assert students.figures()["transfer_error"] < 0.5 < drowned


def test_without_a_norm_there_is_no_scale_to_match(folders, tmp_path):
    model = HAMForCausalLM.from_pretrained(folders / "converted", rnn_output_norm=False)
    students, batch = students_of(model, tmp_path)
    before = [x.clone() for x in students.own.parameters()]
    students.match_scales(batch)
    assert all(torch.equal(x, y) for x, y in zip(before, students.own.parameters(), strict=True))


def test_every_layer_nears_its_source(learned, converted, tmp_path):
    _, _, figures = learned
    untrained, batch = students_of(converted, tmp_path)
    untrained.match_scales(batch)
    for _ in range(30):  # thresholds alone reach their target
        untrained.step([batch], 0.0)
    untrained.figures()  # begins anew
    untrained.step([batch], 0.0)
    at_usage = untrained.figures()
    assert at_usage["kv_usage"] == pytest.approx(0.25, abs=0.02)
    for layer in range(2):
        name = f"transfer_error/layer_{layer}"
        # Measured 0.30 and 0.27 of it.
        assert figures[-1][name] < 0.5 * at_usage[name]
    both = [figures[-1][f"transfer_error/layer_{layer}"] for layer in range(2)]
    assert figures[-1]["transfer_error"] == pytest.approx(sum(both) / 2)
    assert figures[-1]["transfer_error_worst"] == max(both)


def test_usage_meets_its_target_and_the_logged_gate_moves(learned):
    _, _, figures = learned
    assert figures[0]["kv_usage"] == 1, "conversion keeps everything"
    assert figures[-1]["kv_usage"] == pytest.approx(0.25, abs=0.05)
    assert figures[0]["rnn_gate"] == pytest.approx(1 / (1 + math.e), abs=1e-4), "opened at -1"
    assert figures[0]["kv_gate"] == pytest.approx(0.5, abs=1e-4)
    assert abs(figures[-1]["rnn_gate"] - figures[0]["rnn_gate"]) > 0.05


def test_the_rnn_does_a_part_of_the_work(learned):
    students, batch, figures = learned
    biases = [mixer.rnn_gate_proj.bias.detach().clone() for mixer in students.students]
    for mixer in students.students:
        mixer.rnn_gate_proj.bias.data.fill_(SHUT)
    students._call(batch, 1.0)
    shut = students.figures()["transfer_error"]
    students.optimizer.zero_grad()
    for mixer, bias in zip(students.students, biases, strict=True):
        mixer.rnn_gate_proj.bias.data.copy_(bias)
    # Measured 1.48 times.
    assert shut > 1.3 * figures[-1]["transfer_error"]


def test_a_gradient_reaches_what_was_added_and_nothing_else(converted, tmp_path):
    students, batch = students_of(converted, tmp_path)
    students._call(batch, 1.0)
    assert all(x.grad is None for x in converted.parameters())
    for student, mixer in zip(students.students, students.mixers, strict=True):
        grads = {name: x.grad for name, x in student.named_parameters()}
        assert {name for name, grad in grads.items() if grad is not None} == ADDED
        assert all(grads[name].abs().max() > 0 for name in ADDED)
        assert {name for name, _ in student.named_parameters()} == ADDED | SOURCE
        # What is frozen takes no memory twice.
        assert all(student.get_parameter(name) is mixer.get_parameter(name) for name in SOURCE)


@pytest.mark.parametrize(("train_", "changed"), [("added", ADDED), ("mixer", ADDED | SOURCE)])
def test_only_what_is_trained_changes(converted, tmp_path, train_, changed):
    before = {name: x.clone() for name, x in converted.state_dict().items()}
    students, batch = students_of(converted, tmp_path, train=train_)
    for _ in range(2):
        students.step([batch], 1e-2)
    assert all(torch.equal(x, before[name]) for name, x in converted.state_dict().items()), "not before it is over"
    students.hand_over()
    found = {name for name, x in converted.state_dict().items() if not torch.equal(x, before[name])}
    assert found == {f"model.layers.{i}.mixer.{name}" for i in range(2) for name in changed}
    assert all(x.requires_grad for x in converted.parameters())


def test_each_layer_reads_what_the_source_gives_it(converted, folders, tmp_path):
    """The errors are those of opened layers whose inputs and targets come from the model as it was converted."""
    calls = []
    hooks = [
        mixer.register_forward_hook(lambda *x: calls.append(x[1:]), with_kwargs=True)
        for mixer in hybrid_mixers(converted)
    ]
    students, batch = students_of(converted, tmp_path, open_gates=-2.0)
    with torch.no_grad():
        converted(**batch, threshold=0.0, use_cache=False)
    for hook in hooks:
        hook.remove()
    opened = HAMForCausalLM.from_pretrained(folders / "converted")
    open_gates(opened, -2.0)
    errors = []
    for mixer, (args, kwargs, output) in zip(hybrid_mixers(opened), calls, strict=True):
        difference = mixer(*args, **kwargs)[0] - output[0]
        errors.append((difference.pow(2).sum() / output[0].pow(2).sum()).item())
    students._call(batch, 1.0)
    # Float32 rounding of sums of 6,144 squares.
    assert [x.item() for x in students._errors] == pytest.approx(errors, rel=1e-5)
    assert min(errors) > 0.01


def test_parts_of_a_batch_add_up_to_it(folders, tmp_path):
    found = []
    for parts in (1, 2):
        students, batch = students_of(HAMForCausalLM.from_pretrained(folders / "converted"), tmp_path, train="mixer")
        # A relative error weighs tokens by its part's scale, so that the halves are equal.
        rows = batch["input_ids"][:2]
        for part in torch.cat([rows, rows]).chunk(parts):
            students._call({"input_ids": part}, 1 / parts)
        found.append([x.grad for x in students.own.parameters()])
    for whole, parts in zip(*found, strict=True):
        # Float32 rounding; the largest gradients are near 1.
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_half_precision_changes_the_errors_little(folders, tmp_path):
    found = []
    for bf16 in (False, True):
        model = HAMForCausalLM.from_pretrained(folders / "converted")
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, bf16=bf16)
        students = Students(model, TransferRecipe(steps=2), 0.2, arguments)
        for _ in range(2):
            students.step([{"input_ids": torch.arange(96).view(2, 48)}], 1e-2)
        assert all(x.dtype == torch.float32 for x in students.state().values())
        found.append(students.figures()["transfer_error"])
    assert found[0] != found[1], "autocast is in force"
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_an_error_that_is_not_finite_stops_before_the_update(converted, tmp_path):
    students, batch = students_of(converted, tmp_path)
    with torch.no_grad():
        students.students[1].a_proj.weight[0, 0] = float("nan")
    before = students.state()
    with pytest.raises(FloatingPointError, match="an error or a gradient is not finite"):
        students.step([batch], 1e-2)
    assert all(torch.equal(x, before[name]) or "a_proj" in name for name, x in students.state().items())


def test_the_relative_error_of_nothing_is_finite():
    target = torch.tensor([[[3.0, 4.0]]])
    assert relative_error(target * 1.1, target).item() == pytest.approx(0.01)
    assert relative_error(target * 0, target * 0).item() == 0


def test_what_was_added_to_a_gated_deltanet_is_attention(tiny_config):
    mixer = hybrid_mixers(HAMForCausalLM(tiny_config(router="learned", kv_output_norm=True)))[0]
    names = {name.partition(".")[0] for name in added_parameters(mixer)}
    joint = {"rnn_gate_proj", "kv_gate_proj", "router", "threshold"}
    assert names == joint | {"q_norm", "k_norm", "kv_norm"}


def test_what_was_added_has_a_rate_of_its_own(converted):
    groups = parameter_groups(converted, 1e-4, 0.0, added_learning_rate=1e-2)
    rates = {id(x): group["lr"] for group in groups for x in group["params"]}
    for name, parameter in converted.named_parameters():
        added = name.partition(".mixer.")[2] in ADDED
        expected = 0.2 if name.endswith("threshold") else 1e-2 if added else 1e-4
        assert rates[id(parameter)] == expected, name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda model: open_gates(model, -2.0),
            r"with the RNN's gates shut.*got layer 0 with gates.* of \[-2.0",
        ),
        (lambda model: model.model.layers[1].mixer.threshold.data.fill_(0.5), r"got layer 1 .* of \[0.5, 0.5\]"),
        (lambda model: setattr(model.config, "threshold", 0.5), "its `threshold` must be null.*got 0.5"),
        (
            lambda model: [layer.mixer.threshold.data.fill_(1.01) for layer in model.model.layers],
            "it must have a layer of type 'hybrid' that keeps every token, got none",
        ),
    ],
)
def test_a_model_that_is_no_source_is_refused(converted, spoil, message):
    assert layers_to_teach(converted) == hybrid_mixers(converted)
    spoil(converted)
    with pytest.raises(ValueError, match=message):
        layers_to_teach(converted)


def test_a_layer_that_keeps_its_window_alone_is_left_alone(converted, tmp_path):
    converted.model.layers[0].mixer.threshold.data.fill_(1.01)
    before = {name: x.clone() for name, x in converted.state_dict().items()}
    students, batch = students_of(converted, tmp_path)
    students.step([batch], 1e-2)
    assert "transfer_error/layer_0" not in students.figures()
    students.hand_over()
    changed = {name for name, x in converted.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"model.layers.1.mixer.{name}" for name in ADDED}


def recipe_in(folder, folders, name, steps=2, transfer=(), **more):
    """Writes and reads a recipe of 4 steps of transfer, whose output is `folder / name`."""
    content = {
        "output": str(folder / name),
        "model": {"from": str(folders / "converted")},
        "data": {"files": str(folders / "text.jsonl"), "shuffle_rows": 4},
        "steps": steps,
        "context": 32,
        "transfer": None if transfer is None else {"steps": 4, "learning_rate": 1e-2} | dict(transfer),
        "distillation": {"teacher": str(folders / "source"), "added_learning_rate": 1e-2},
        "evaluation": {"rows": 2, "every": 100, "usages": [0.25]},
        "trainer": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_steps": 3,
            "use_cpu": True,
        },
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | more))
    return read_recipe(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def unbroken(folders):
    """The folder of a model that was trained by transfer and then as a whole."""
    return train(recipe_in(folders, folders, "unbroken"))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    """True if two folders hold the same model, bit for bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def at_step(patch, step, action):
    """Has an action done within a step of the next transfer."""
    original, steps = Students.step, []

    def act(self, *arguments):
        original(self, *arguments)
        steps.append(1)
        if len(steps) == step:
            action()

    patch.setattr(Students, "step", act)


def test_an_interrupted_transfer_goes_on_to_the_same_weights(unbroken, folders, tmp_path, monkeypatch, capsys):
    recipe = recipe_in(tmp_path, folders, "broken")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(recipe) is None
    assert [x["transfer_step"] for x in log_of(tmp_path / "broken")] == [1, 2]
    assert same_weights(train(recipe), unbroken)
    assert log_of(tmp_path / "broken") == log_of(unbroken)
    assert "going on after step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_save_that_is_interrupted_leaves_the_one_before(unbroken, folders, tmp_path, monkeypatch):
    recipe, saved = recipe_in(tmp_path, folders, "broken"), []
    original = transfer_module.save_file

    def fail(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        original(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(transfer_module, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert sorted(x.name for x in (tmp_path / "broken").iterdir()) == [
        "log.jsonl",
        "recipe.json",
        "transfer.safetensors",
    ]
    assert same_weights(train(recipe), unbroken)
    assert log_of(tmp_path / "broken") == log_of(unbroken)


def test_another_transfer_does_not_go_on_in_the_same_folder(folders, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train(recipe_in(tmp_path, folders, "run")) is None
    with pytest.raises(ValueError, match=r"`transfer: usage` was 0\.25 and is now 0\.5"):
        train(recipe_in(tmp_path, folders, "run", transfer={"usage": 0.5}))


def test_the_log_and_the_recipe_tell_of_the_transfer(unbroken, folders):
    log = log_of(unbroken)
    stage = [x for x in log if "transfer_error" in x]
    assert log[:4] == stage
    assert [x["transfer_step"] for x in stage] == [1, 2, 3, 4]
    expected = {"transfer_error", "transfer_error_worst", "transfer_error/layer_1", "kv_usage", "rnn_gate", "kv_gate"}
    assert all(expected <= x.keys() for x in stage)
    assert [x["learning_rate"] for x in stage] == pytest.approx(
        [1e-2 * f for f in (1, 0.853553, 0.5, 0.146447)], rel=1e-5
    )
    # Measured 0.25, and 0.63 with RNNs that do not begin at the scale of their attention.
    assert stage[0]["transfer_error"] < 0.4
    healed = [x for x in log if "loss" in x]
    assert [x["step"] for x in healed] == [1, 2]
    assert all(0 < x["rnn_gate"] < 0.5 and 0 < x["kv_gate"] < 1 for x in healed)
    assert (
        (unbroken / "recipe.md")
        .read_text()
        .startswith("4 steps of 64 tokens of layer-wise transfer, and 2 steps of 64 tokens with `ham-hf train`")
    )
    config = json.loads((unbroken / "config.json").read_text())
    assert config["target_kv_usage"] == 0.25, "by default the next stage keeps what the transfer has kept"


def test_an_evaluation_reads_passages_a_second_time(unbroken, folders):
    model, tokenizer = HAMForCausalLM.from_pretrained(unbroken), AutoTokenizer.from_pretrained(unbroken)
    _, held_out, calibration = build_data(recipe_in(folders, folders, "again"), tokenizer, 2)
    last = [x for x in log_of(unbroken) if "eval_loss" in x][-1]
    calibrate(model, calibration)
    for key, usage in (("", None), ("/usage_0.25", 0.25)):
        with torch.no_grad():
            windows = [row["input_ids"][None] for row in held_out]
            losses = [window_figures(model, x, kv_usage=usage)[0].second_time for x in windows]
        assert last[f"eval_second_time{key}"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert last["eval_second_time/teacher"] != last["eval_second_time"]


def test_a_transfer_can_be_all(folders, tmp_path):
    recipe = recipe_in(tmp_path, folders, "alone", steps=0, transfer={"usage": 0.5})
    folder = train(recipe)
    log = log_of(folder)
    assert [x.get("transfer_step") for x in log] == [1, 2, 3, 4, None]
    assert "eval_second_time/usage_0.25" in log[-1]
    assert train(recipe) == folder
    assert log_of(folder) == log
    trained, before = (load_file(x / "model.safetensors") for x in (folder, folders / "converted"))
    changed = {name.partition(".mixer.")[2] for name, x in trained.items() if not torch.equal(x, before[name])}
    assert changed == ADDED | {"score_quantiles"}
    assert json.loads((folder / "config.json").read_text())["target_kv_usage"] == 0.5
    assert (folder / "recipe.md").read_text().startswith("4 steps of 64 tokens of layer-wise transfer with")


@pytest.mark.parametrize(
    ("section", "more", "message"),
    [
        ({"steps": 0}, {}, "`transfer`: `steps` must be at least 1, got 0"),
        ({"steps": 1.5}, {}, "`transfer: steps` must be a whole number, got 1.5"),
        ({"usage": 1.5}, {}, "`transfer`: `usage` must be a fraction from 0 to 1, got 1.5"),
        ({"usage": math.nan}, {}, "`transfer`: `usage` must be a fraction from 0 to 1, got nan"),
        ({"learning_rate": 0}, {}, "`transfer`: `learning_rate` must be above 0, got 0"),
        ({"open_gates": -20.0}, {}, "`transfer`: `open_gates` must be above -20.0"),
        ({"train": "all"}, {}, r"`transfer`: `train` must be one of \('added', 'mixer'\), got 'all'"),
        ({"use": 0.5}, {}, "`transfer` has no key `use`"),
        ({}, {"model": {"new": {}}}, "`transfer` must have `model: from`, a converted checkpoint, got `model: new`"),
        ({}, {"lora": {}}, "`lora` must be left out beside `transfer`"),
        (None, {"steps": 0}, "`steps` must be at least 1, got 0"),
        (
            {},
            {"distillation": {"weight": 0.0, "open_gates": -3.0}},
            "`distillation: open_gates` must be left out beside `transfer`.*got -3.0",
        ),
        (
            {},
            {"distillation": {"weight": 0.0, "added_learning_rate": -1.0}},
            "`distillation`: `added_learning_rate` must be at least 0, got -1.0",
        ),
    ],
)
def test_a_bad_section_is_refused(folders, tmp_path, section, more, message):
    with pytest.raises((TypeError, ValueError), match=message):
        recipe_in(tmp_path, folders, "bad", transfer=section, **more)


def test_a_checkpoint_with_open_gates_is_refused_before_anything_is_written(folders, tmp_path, converted):
    open_gates(converted, -2.0)
    converted.save_pretrained(tmp_path / "opened")
    recipe = recipe_in(
        tmp_path, folders, "run", model={"from": str(tmp_path / "opened"), "tokenizer": str(folders / "source")}
    )
    with pytest.raises(ValueError, match="`transfer` must be left out for this checkpoint: it must be as the"):
        train(recipe)
    assert not (tmp_path / "run").exists()
