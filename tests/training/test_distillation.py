# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A converted model opens its gates and learns from its source; nothing else of either is touched."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from ham_hf import HAMForCausalLM
from ham_hf.conversion.memories import SHUT
from ham_hf.training import distillation
from ham_hf.training.data import PackedRows
from ham_hf.training.distillation import Teacher, distillation_loss, open_gates
from ham_hf.training.recipe import DataRecipe, read_recipe
from ham_hf.training.train import train

SCRIPT = Path(__file__).parents[2] / "conversion_scripts" / "convert_transformer_to_ham.py"
VOCABULARY = 300
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, convert_llama):
    """A random Llama with a tokenizer, the HAM that was made of it, and text."""
    folder = tmp_path_factory.mktemp("healing")
    convert_llama(folder)
    return folder


@pytest.fixture
def converted(folders):
    return HAMForCausalLM.from_pretrained(folders / "converted").train()


def logits_and_labels():
    """Logits `[2, 7, 11]` of a student and a teacher, and labels, some of which do not count."""
    logits, teacher = torch.randn(2, 2, 7, 11)
    labels = torch.randint(11, (2, 7))
    labels[0, 3] = labels[1, 0] = labels[1, 6] = -100
    return logits.requires_grad_(), teacher.requires_grad_(), labels


def by_hand(logits, teacher, labels, temperature):
    """The sums of the divergence and of next tokens' losses over the positions that count, and their number."""
    divergence = next_tokens = count = 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = labels[row, t + 1]
            if label == -100:
                continue
            p = (teacher[row, t].double() / temperature).softmax(-1)
            q = (logits[row, t].double() / temperature).softmax(-1)
            divergence = divergence + (p * (p / q).log()).sum()
            next_tokens = next_tokens - logits[row, t].double().softmax(-1)[label].log()
            count += 1
    return divergence, next_tokens, count


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (0.7, 0.5)])
def test_the_loss_is_the_formula_and_its_gradient_reaches_the_student_alone(monkeypatch, chunk, weight, temperature):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    logits, teacher, labels = logits_and_labels()
    divergence, next_tokens, count = by_hand(logits, teacher, labels, temperature)
    expected = ((1 - weight) * next_tokens + weight * temperature**2 * divergence) / count
    ours = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
    loss = distillation_loss(ours, logits, teacher, labels, weight, temperature)
    # Float32 rounding of losses of 1 to 6, measured 4e-7; gradients 3e-8.
    torch.testing.assert_close(loss.double(), expected, atol=2e-6, rtol=0)
    (gradient,) = torch.autograd.grad(expected, logits)
    loss.backward()
    torch.testing.assert_close(logits.grad, gradient, atol=2e-7, rtol=0)
    assert teacher.grad is None


def test_calls_that_share_a_batch_add_up_to_it():
    logits, teacher, labels = logits_and_labels()
    whole = distillation_loss(torch.zeros(()), logits, teacher, labels)
    count = (labels[:, 1:] != -100).sum()
    parts = [
        distillation_loss(torch.zeros(()), *(x[i : i + 1] for x in (logits, teacher, labels)), 1.0, 1.0, count)
        for i in (0, 1)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_thresholds_loop_does_not_feel_the_weight(folders, converted):
    teacher_of = {weight: Teacher(str(folders / "source"), converted, weight) for weight in (0.0, 0.5, 1.0)}
    tokens = torch.randint(VOCABULARY, (2, 24))
    converted.config.target_kv_usage = 0.5
    found = []
    for teacher in teacher_of.values():
        converted.zero_grad()
        outputs = converted(input_ids=tokens, labels=tokens, use_cache=False)
        teacher.loss(outputs.loss, outputs.logits, {"input_ids": tokens, "labels": tokens}).backward()
        found.append(torch.stack([layer.mixer.threshold.grad for layer in converted.model.layers]))
    assert found[0].abs().min() > 0.01
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_teacher_is_frozen(folders, converted):
    teacher = Teacher(str(folders / "source"), converted)
    before = {name: x.clone() for name, x in teacher.model.state_dict().items()}
    open_gates(converted)
    optimizer = torch.optim.AdamW([*converted.parameters(), *teacher.model.parameters()], lr=0.1)
    tokens = torch.randint(VOCABULARY, (2, 24))
    outputs = converted(input_ids=tokens, labels=tokens, use_cache=False)
    teacher.loss(outputs.loss, outputs.logits, {"input_ids": tokens, "labels": tokens}).backward()
    optimizer.step()
    assert not teacher.model.training
    assert all(torch.equal(x, before[name]) for name, x in teacher.model.state_dict().items())


def test_a_teacher_does_not_read_across_documents(folders, converted):
    teacher = Teacher(str(folders / "source"), converted)
    tokens = torch.randint(VOCABULARY, (2, 20))
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(20 - n)]) for n in (8, 13)])
    labels = tokens.masked_fill(positions == 0, -100)
    logits = torch.randn(2, 20, VOCABULARY)
    mask = torch.ones_like(tokens)  # as tokenizers add it
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask, "labels": labels}
    packed = teacher.loss(torch.zeros(()), logits, inputs)
    apart = 0
    for row, n in enumerate((8, 13)):
        for part in (slice(0, n), slice(n, 20)):
            inputs = {"input_ids": tokens[row : row + 1, part], "labels": labels[row : row + 1, part]}
            apart = apart + teacher.loss(torch.zeros(()), logits[row : row + 1, part], inputs, 36)
    # Float32 rounding of sums of 36 losses; measured 5e-7.
    torch.testing.assert_close(packed, apart, atol=5e-6, rtol=0)
    with pytest.raises(ValueError, match="`position_ids` must be given"):
        teacher.loss(torch.zeros(()), logits, {"input_ids": tokens, "seq_idx": positions, "labels": labels})


def test_only_shut_gates_are_opened(converted):
    before = {name: x.clone() for name, x in converted.state_dict().items()}
    name = "model.layers.1.mixer.rnn_gate_proj.bias"
    with torch.no_grad():
        converted.get_parameter(name)[2] = -3.0
    assert open_gates(converted, -4.0) == 7, "two layers of four heads, of which one head is open"
    assert converted.get_parameter(name).tolist() == [-4, -4, -3, -4]
    changed = {name for name, x in converted.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"model.layers.{i}.mixer.rnn_gate_proj.bias" for i in (0, 1)}
    with pytest.raises(ValueError, match="`model` has no shut gate"):
        open_gates(converted, -4.0)


@pytest.mark.parametrize("bias", [SHUT, -30.0, 0.1, NAN, -INF])
def test_a_bias_that_opens_nothing_is_refused(converted, bias):
    before = converted.model.layers[0].mixer.rnn_gate_proj.bias.clone()
    with pytest.raises(ValueError, match=r"`bias` must be above -20.0, where a gate is shut, and at most 0, got"):
        open_gates(converted, bias)
    assert torch.equal(converted.model.layers[0].mixer.rnn_gate_proj.bias, before)
    with pytest.raises(TypeError, match="`bias` must be a number, got True"):
        open_gates(converted, True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": 1.5}, ValueError, "`weight` must be between 0 and 1, got 1.5"),
        ({"weight": NAN}, ValueError, "`weight` must be between 0 and 1, got nan"),
        ({"weight": "1"}, TypeError, "`weight` and `temperature` must be numbers, got '1' and 1.0"),
        ({"temperature": 0}, ValueError, "`temperature` must be a finite number above 0, got 0"),
        ({"temperature": INF}, ValueError, "`temperature` must be a finite number above 0, got inf"),
        ({"teacher_logits": torch.zeros(2, 7, 12)}, ValueError, r"must have the shape \[2, 7, 11\] of `logits`"),
        ({"labels": torch.zeros(2, 6).long()}, ValueError, r"`labels` must have the shape \[2, 7\], got \[2, 6\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    logits, teacher, labels = logits_and_labels()
    with pytest.raises(error, match=message):
        distillation_loss(
            **{"loss": torch.zeros(()), "logits": logits, "teacher_logits": teacher, "labels": labels} | arguments
        )


def test_a_teacher_with_another_vocabulary_is_refused(folders, tiny_config):
    with pytest.raises(ValueError, match="`teacher` must have the student's vocabulary of 97 tokens, got 300"):
        Teacher(str(folders / "source"), HAMForCausalLM(tiny_config()))


def test_a_shut_gate_has_no_gradient_and_an_opened_one_has(converted):
    tokens = torch.randint(VOCABULARY, (2, 24))

    def gradients():
        converted.zero_grad()
        converted(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        mixer = converted.model.layers[0].mixer
        return [x.grad.abs().max().item() for x in (mixer.rnn_gate_proj.bias, mixer.conv.weight)]

    # sigmoid(-20) = 2e-9 and sigmoid(-4) = 0.018 scale them.
    shut = gradients()
    assert max(shut) < 1e-8
    open_gates(converted, -4.0)
    assert all(opened > 1e6 * closed for opened, closed in zip(gradients(), shut, strict=True))


def test_healing_nears_the_source(folders, converted):
    teacher = Teacher(str(folders / "source"), converted)
    tokens = torch.randint(VOCABULARY, (4, 32))
    inputs = {"input_ids": tokens, "labels": tokens}
    open_gates(converted)
    optimizer = torch.optim.AdamW(converted.parameters(), lr=3e-3)
    found = []
    for _ in range(20):
        outputs = converted(**inputs, use_cache=False, threshold=0.5)
        loss = teacher.loss(outputs.loss, outputs.logits, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[0] > 0.1, "what is dropped is missed"
    assert found[-1] < 0.5 * found[0]


@pytest.fixture
def recipe(folders, tmp_path):
    """A function that writes a recipe of one step whose weights stay, but for the thresholds', and reads it."""

    def write(name="run", steps=1, learning_rate=0.0, **section):
        content = {
            "output": str(tmp_path / name),
            "model": {"from": str(folders / "converted")},
            "data": {"files": str(folders / "text.jsonl"), "shuffle_rows": 1},
            "steps": steps,
            "context": 32,
            "usage": {"target": 0.5},
            "distillation": section,
            "evaluation": {"rows": 2, "every": 100, "usages": []},
            "trainer": {
                "learning_rate": learning_rate,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "logging_steps": 1,
                "use_cpu": True,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return read_recipe(path)

    return write


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def first_loss(folder):
    return next(x["loss"] for x in log_of(folder) if "loss" in x)


def loss_of(model, rows):
    """Mean of next tokens over rows."""
    losses = [model(**{name: x[None] for name, x in row.items()}, use_cache=False).loss for row in rows]
    counts = torch.tensor([float((row["labels"][1:] != -100).sum()) for row in rows])
    return ((torch.stack(losses) * counts).sum() / counts.sum()).item()


def test_a_recipe_heals(folders, recipe):
    source = load_file(folders / "source" / "model.safetensors")
    teacher = str(folders / "source")
    distilled = train(recipe("distilled", teacher=teacher, weight=0.5, temperature=2.0, open_gates=-3.0))
    model = HAMForCausalLM.from_pretrained(distilled)
    assert all(layer.mixer.rnn_gate_proj.bias.eq(-3).all() for layer in model.model.layers)

    data = DataRecipe(files=str(folders / "text.jsonl"), shuffle_rows=1)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = PackedRows(data, tokenizer, 32, seed=0, held_out=2)
    batch = [row for row, _ in zip(rows, range(2), strict=False)]
    llama = LlamaForCausalLM.from_pretrained(teacher)
    start = HAMForCausalLM.from_pretrained(folders / "converted")
    open_gates(start, -3.0)
    sums = torch.zeros(3, dtype=torch.float64)
    for row in batch:
        ids, positions, labels = (row[x][None] for x in ("input_ids", "position_ids", "labels"))
        logits = [m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (start, llama)]
        sums += torch.tensor([float(x) for x in by_hand(*logits, labels, 2.0)], dtype=torch.float64)
    divergence, next_tokens, count = sums.tolist()
    expected = (0.5 * next_tokens + 0.5 * 4 * divergence) / count
    assert divergence / count > 1e-4
    before = log_of(distilled)[0]
    with torch.no_grad():
        held_out = rows.first_rows(2)
        assert before["step"] == 0
        assert before["eval_loss/teacher"] == pytest.approx(loss_of(llama, held_out), abs=1e-4)
        assert before["eval_loss"] == pytest.approx(loss_of(start.eval(), held_out), abs=1e-4)
    assert log_of(distilled)[-1]["eval_loss/teacher"] == before["eval_loss/teacher"]
    # What is logged is rounded to four digits.
    assert math.isclose(first_loss(distilled), expected, rel_tol=1e-4)

    plain = train(recipe("plain", weight=0.0, open_gates=-3.0))
    thresholds = [
        torch.stack([x for name, x in load_file(folder / "model.safetensors").items() if name.endswith("threshold")])
        for folder in (distilled, plain)
    ]
    assert thresholds[0].min() > 0
    assert torch.equal(*thresholds), "the loop that steers them is as strong with a teacher as without"
    after = load_file(folders / "source" / "model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in source.items())


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({}, ValueError, "`distillation`: must have a `teacher`, or a `weight` of 0"),
        ({"teacher": "x", "weight": 2.0}, ValueError, "`distillation`: `weight` must be between 0 and 1, got 2.0"),
        ({"teacher": "x", "temperature": 0.0}, ValueError, "`distillation`: `temperature` must be a finite number"),
        ({"teacher": "x", "open_gates": -20.0}, ValueError, "`distillation`: `open_gates` must be above -20.0"),
        ({"teacher": 3}, TypeError, "`distillation: teacher` must be text, got 3"),
        ({"teachr": "x"}, ValueError, "`distillation` has no key `teachr`: did you mean `teacher`?"),
    ],
)
def test_a_bad_section_is_refused(recipe, section, error, message):
    with pytest.raises(error, match=message):
        recipe(**section)


def test_the_recipe_of_the_readme_is_one(tmp_path, monkeypatch):
    blocks = SCRIPT.with_name("README.md").read_text().split("```yaml\n")[1:]
    (text,) = [block.split("```")[0] for block in blocks if "distillation:" in block]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    (tmp_path / "healing.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("healing.yaml")
    assert (recipe.transfer.steps, recipe.distillation.added_learning_rate) == (200, 1e-3)
