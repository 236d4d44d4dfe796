# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Layer-wise transfer: each layer of a converted model learns, by itself, the output of its source's attention.

The first stage of healing. The converted model reads text as its source does. Meanwhile the student of each layer,
which has open gates and keeps the fraction asked for, is given the layer's input and learns its output. So every
student has exact inputs, no backward pass leaves a layer, and one layer's graph is in memory at a time.
"""

import copy
import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

from ..conversion.memories import SHUT, added_parameters
from ..files_ham import whole_file
from ..mixer_ham import HAMMixer, HAMRMSNorm
from ..modeling_ham import HAMForCausalLM
from ..threshold_control_ham import control_loop
from .control import clipped_parameters, hybrid_mixers, parameter_groups
from .data import PackedRows
from .distillation import open_gates_of
from .gates import GateMeter
from .progress import LOG, TransferProgress
from .recipe import TrainRecipe, TransferRecipe
from .stop_on_signal import StopOnSignal

STATE = "transfer.safetensors"


def layers_to_teach(model: HAMForCausalLM) -> list[HAMMixer]:
    """The mixers of a converted model's hybrid layers that will drop what their source attends to.

    A layer that keeps nothing beyond its source's own window, and a Gated DeltaNet's, lack nothing that another memory
    could give.

    Raises:
        ValueError: if there is none, or the model no longer computes what its source does.
    """
    if model.config.threshold is not None:
        raise ValueError(f"its `threshold` must be null, so that thresholds learn, got {model.config.threshold}.")
    found = []
    for mixer in hybrid_mixers(model):
        thresholds = mixer.threshold.detach()
        keeps_all, keeps_window = bool((thresholds <= 0).all()), bool((thresholds > 1).all())
        if not (keeps_all or keeps_window) or not bool((mixer.rnn_gate_proj.bias <= SHUT).all()):
            raise ValueError(
                "it must be as the conversion of a Transformer wrote it, with the RNN's gates shut and thresholds of "
                f"0 (or above 1, to keep a window), got layer {mixer.layer_idx} with gates' biases of "
                f"{mixer.rnn_gate_proj.bias.tolist()} and thresholds of {thresholds.tolist()}."
            )
        if keeps_all:
            found.append(mixer)
    if not found:
        raise ValueError("it must have a layer of type 'hybrid' that keeps every token, got none.")
    return found


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of `[B, T, D]` outputs over the mean square of the target, so that layers weigh alike.

    A scalar, in float32.
    """
    target = target.float()
    scale = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (output.float() - target).square().mean() / scale


class Students:
    """The layers' students: copies of a model's mixers, of which what is trained is their own.

    Thresholds are steered by the control loop of every other training. It meets the target on the scores of students
    as they are in this step, for the configuration's `threshold_scope`, and leaves thresholds where the next stage's
    loop takes them up; quantiles would need a memory of scores that go out of date while the RNN learns.

    Args:
        model: a converted model, see `layers_to_teach`; frozen and in evaluation mode until `hand_over`.
        settings: usage, rate, opening, and what is trained.
        threshold_learning_rate: rate of the thresholds.
        arguments: of those `bf16`, the optimizer's betas, and `max_grad_norm`, which clips each layer by itself.
    """

    def __init__(
        self,
        model: HAMForCausalLM,
        settings: TransferRecipe,
        threshold_learning_rate: float,
        arguments: TrainingArguments,
    ):
        self.model = model.eval().requires_grad_(False)
        self.max_norm = arguments.max_grad_norm or math.inf
        self.bf16 = arguments.bf16
        model.config.target_kv_usage = settings.usage
        self.mixers = layers_to_teach(model)
        self.students = [student_of(mixer, settings.train).train() for mixer in self.mixers]
        self.own = nn.ModuleList(self.students)
        open_gates_of(self.students, settings.open_gates)
        groups = parameter_groups(self.own, settings.learning_rate, 0.0, threshold_learning_rate)
        betas = arguments.adam_beta1, arguments.adam_beta2
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=arguments.adam_epsilon)
        self.gates = GateMeter(self.students)
        self._errors: list[torch.Tensor] = []
        self._controls: list[torch.Tensor] = []
        self._forget()

    def _forget(self) -> None:
        # Sums since the last log: of errors `[L]` and usages `[L]`, and the number of calls.
        self._sums: torch.Tensor | None = None
        self._calls = 0

    @torch.no_grad()
    def match_scales(self, batch: dict[str, torch.Tensor]) -> None:
        """Gives each student's RNN the scale of what its attention reads from a batch.

        The RNN's norm makes its read as large as 1, and attention's may be far smaller: opened at 1, an RNN that has
        learned nothing drowns it, and the way to less error is to shut the gate again.

        Args:
            batch: a part of a step's batch.
        """
        if not self.model.config.rnn_output_norm:
            return

        def match(student: HAMMixer, _: nn.Module, __: Any, read: torch.Tensor) -> None:
            norm = student.rnn_norm
            assert isinstance(norm, HAMRMSNorm)
            norm.weight.fill_(read.float().square().mean().sqrt())

        pairs = zip(self.mixers, self.students, strict=True)
        hooks = [mixer.kv_norm.register_forward_hook(partial(match, student)) for mixer, student in pairs]
        try:
            self._read(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, batch: dict[str, torch.Tensor]) -> None:
        """Has the model read a batch, in the precision of the training."""
        device = self.model.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            self.model.model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False)

    def step(self, batches: list[dict[str, torch.Tensor]], learning_rate: float) -> None:
        """Updates all students once.

        Args:
            batches: parts of the step's batch: `input_ids` and `position_ids`, int64 `[B, T]` without padding.
            learning_rate: rate of all but the thresholds.

        Raises:
            FloatingPointError: for an error or a gradient that is not finite, before the update.
        """
        for group in self.optimizer.param_groups[:-1]:  # the last one is the thresholds'
            group["lr"] = learning_rate
        total = torch.zeros(())
        for batch in batches:
            total = total + self._call(batch, 1 / len(batches)).cpu()
        for student in self.students:
            total = total + nn.utils.clip_grad_norm_(clipped_parameters(student), self.max_norm).cpu()
        if not bool(total.isfinite()):
            raise FloatingPointError("an error or a gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _call(self, batch: dict[str, torch.Tensor], share: float) -> torch.Tensor:
        """Has the model read a part of a batch while the students learn, and returns the sum of their errors."""
        self._errors, self._controls = [], []
        hooks = [
            mixer.register_forward_hook(partial(self._learn, student, share), with_kwargs=True)
            for mixer, student in zip(self.mixers, self.students, strict=True)
        ]
        device = self.model.device
        try:
            with self.gates:
                self._read(batch)
        finally:
            for hook in hooks:
                hook.remove()
        rows, tokens = batch["input_ids"].shape[0], batch["input_ids"].numel()
        weights = torch.full((rows,), 1 / tokens, device=device)
        levers, gradients = control_loop(self._controls, weights, self.model.config)
        (share * (levers * gradients).sum()).backward()
        errors = torch.stack([x.to(device) for x in self._errors])
        usage = torch.stack([x.detach()[2:].sum(0).mean().to(device) / tokens for x in self._controls])
        new = torch.stack([errors, usage])
        self._sums = new if self._sums is None else self._sums + new
        self._calls += 1
        return errors.sum()

    def _learn(
        self,
        student: HAMMixer,
        share: float,
        mixer: HAMMixer,
        args: tuple[torch.Tensor],
        kwargs: dict[str, Any],
        output: tuple[Any, ...],
    ) -> None:
        """Hook of a mixer: its student learns from this call before the next layer is called."""
        with torch.enable_grad():
            mixed, _, _, control = student(*args, **kwargs)
            error = relative_error(mixed, output[0])
            loss = share * error
        with torch.autocast(error.device.type, enabled=False):
            loss.backward()
        self._errors.append(error.detach())
        self._controls.append(control)

    def figures(self) -> dict[str, float]:
        """Means since the last call: errors, fraction kept, and how far the gates are open."""
        assert self._sums is not None
        errors, usage = (self._sums / self._calls).tolist()
        self._forget()
        by_layer = {f"transfer_error/layer_{x.layer_idx}": e for x, e in zip(self.mixers, errors, strict=True)}
        mean = {"transfer_error": sum(errors) / len(errors), "transfer_error_worst": max(errors)}
        return mean | by_layer | {"kv_usage": sum(usage) / len(usage)} | self.gates.read()

    @torch.no_grad()
    def hand_over(self) -> None:
        """Gives the model what the students have learned, and lets it learn again."""
        for mixer, student in zip(self.mixers, self.students, strict=True):
            mixer.load_state_dict(student.state_dict())
        self.model.requires_grad_(True)

    def state(self) -> dict[str, torch.Tensor]:
        """What is trained, and the optimizer's state, by name."""
        own = {f"students.{name}": x for name, x in self.own.named_parameters() if x.requires_grad}
        moments = self.optimizer.state_dict()["state"]
        own |= {f"optimizer.{n}.{key}": x for n, entry in moments.items() for key, x in entry.items()}
        return {name: x.detach().cpu().contiguous() for name, x in own.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up the result of `state`."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "students":
                self.own.get_parameter(rest).copy_(tensor)
            else:
                index, _, key = rest.partition(".")
                moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def student_of(mixer: HAMMixer, train: str) -> HAMMixer:
    """A copy of a mixer, of which only what is trained takes memory: it shares the frozen parameters.

    Args:
        mixer: a mixer whose parameters are frozen.
        train: `"added"` or `"mixer"`, see `TransferRecipe`.
    """
    trained = added_parameters(mixer) if train == "added" else dict(mixer.named_parameters())
    shared = [mixer.config, *(x for name, x in mixer.named_parameters() if name not in trained)]
    student = copy.deepcopy(mixer, {id(x): x for x in shared})
    for name in trained:
        student.get_parameter(name).requires_grad_(True)
    return student


def transfer(
    recipe: TrainRecipe, model: HAMForCausalLM, rows: PackedRows, arguments: TrainingArguments, stop: StopOnSignal
) -> list[dict[str, Any]] | None:
    """Carries out a recipe's section `transfer`, from where an earlier call stopped, and changes the model's mixers.

    The state is one file in the recipe's `output`, which is whole or absent.

    Args:
        recipe: the recipe.
        model: the converted model.
        rows: the rows of text; whoever reads them next goes on behind those of the transfer.
        arguments: Trainer's arguments, of which the sizes of batches, the intervals and the precision count here.
        stop: asked after each step whether to save and stop.

    Returns:
        The logs, one per logged step; `None` if a signal stopped the transfer.

    Raises:
        FloatingPointError: if an error or a gradient is not finite.
    """
    settings = recipe.transfer
    assert settings is not None
    students = Students(model, settings, recipe.usage.threshold_learning_rate, arguments)
    path = Path(recipe.output) / STATE
    done, logs = load(path, students, rows) if path.exists() else (0, [])
    first_row = rows.start
    parts, size = arguments.gradient_accumulation_steps, arguments.train_batch_size
    save_every, log_every = (interval(x, settings.steps) for x in (arguments.save_steps, arguments.logging_steps))
    tokens, bar = parts * size * recipe.context, not arguments.disable_tqdm
    progress = TransferProgress(Path(recipe.output) / LOG, settings.steps, done, tokens, logs, bar)
    trained = sum(x.numel() for x in students.own.parameters() if x.requires_grad)
    begun = f", going on after step {done:,}" if done else ""
    if done < settings.steps:
        print(f"Transferring {trained:,} parameters: {settings.steps:,} steps of {tokens:,} tokens{begun}", flush=True)
    stream = iter(rows)
    with stop, progress:
        for step in range(done + 1, settings.steps + 1):
            rate = settings.learning_rate * (1 + math.cos(math.pi * (step - 1) / settings.steps)) / 2
            batches = [next_batch(stream, size) for _ in range(parts)]
            if step == 1:
                students.match_scales(batches[0])
            try:
                students.step(batches, rate)
            except FloatingPointError as error:
                kept = f"{path} has an earlier state" if path.exists() else "nothing was saved yet"
                raise FloatingPointError(
                    f"Step {step} of the transfer: {error}; {kept}. A lower `transfer: learning_rate` may help, in a "
                    "new `output`."
                ) from error
            progress.advance()
            if step % log_every == 0 or step == settings.steps:
                progress.log({"transfer_step": step, **students.figures(), "learning_rate": rate})
            if step % save_every == 0 or step == settings.steps or stop.asked:
                position = rows.state_dict(first_row + (step - done) * parts * size)
                save(path, students, {"step": step, "rows": position, "logs": logs})
            if stop.asked:
                return None
    if done < settings.steps:
        rows.load_state_dict(position)
    students.hand_over()
    return logs


def interval(steps: float, of: int) -> int:
    """Trainer's way to give an interval: a number of steps or, below 1, a part of all of them."""
    return math.ceil(steps * of) if steps < 1 else int(steps)


def next_batch(rows: Iterator[dict[str, torch.Tensor]], size: int) -> dict[str, torch.Tensor]:
    """The next `size` rows as `input_ids` and `position_ids`, `[size, context]`."""
    taken = list(islice(rows, size))
    return {name: torch.stack([row[name] for row in taken]) for name in ("input_ids", "position_ids")}


def save(path: Path, students: Students, progress: dict[str, Any]) -> None:
    """Writes the state of a transfer and, as metadata, how far it has come."""
    with whole_file(path) as unfinished:
        save_file(students.state(), unfinished, {"progress": json.dumps(progress)})


def load(path: Path, students: Students, rows: PackedRows) -> tuple[int, list[dict[str, Any]]]:
    """Takes up the state that `save` wrote, and returns the number of steps done and their logs."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        students.load_state({name: file.get_tensor(name) for name in names})
        progress = json.loads(file.metadata()["progress"])
    rows.load_state_dict(progress["rows"])
    return progress["step"], progress["logs"]
