# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMTrainer, Transformers' Trainer for a HAM: steered thresholds, whole checkpoints, exact resumption."""

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..evaluation import calibrate
from ..evaluation.losses import repeated_size, with_repeated_end
from ..files import write_whole
from ..modeling_ham import HAMForCausalLM
from .control import UsageMeter, clipped_parameters, parameter_groups
from .data import PackedRows
from .distillation import Teacher
from .lora import save_thresholds
from .recipe import TrainRecipe

# Folder for unfinished files, which are moved out when they are whole.
PARTIAL = "partial"
DATA_STATE = "data_state.json"


class HAMTrainer(Trainer):
    """Transformers' Trainer for a HAM.

    Thresholds have groups of their own in the optimizer, keep their learning rate and are not clipped. A checkpoint
    appears under its name when it is whole. Nothing is saved once a number is not finite. An evaluation measures the
    loss and the fraction kept at several settings, and the distribution of routing scores. The model may be a
    PeftModel.

    Args:
        recipe: the recipe that the arguments below were made from.
        calibration: arguments of calls, such as `[n, context]` int64 token ids, on which `kv_usage` is calibrated.
        arguments: those of `Trainer`; `train_dataset` is a `PackedRows`, `eval_dataset` a list of its rows.

    Raises:
        ValueError: for an optimizer under which thresholds cannot descend by the gradient itself.
    """

    model: Any  # HAMForCausalLM or peft.PeftModel
    train_dataset: PackedRows

    def __init__(self, recipe: TrainRecipe, calibration: list[dict[str, torch.Tensor]], **arguments: Any):
        check_optimizer(arguments["args"], arguments["model"])
        use_cache = arguments["model"].config.use_cache
        super().__init__(**arguments)
        self.use_cache = use_cache  # Trainer has switched it off in the configuration
        self.recipe = recipe
        self.calibration = calibration
        self.first_step = 0  # first step of this part of the training
        self.teacher: Teacher | None = None
        self.teacher_losses: dict[str, float] = {}  # on the held-out rows, once measured
        settings = recipe.distillation
        if settings is not None and settings.teacher is not None and settings.weight:
            self.teacher = Teacher(settings.teacher, self.model, settings.weight, settings.temperature)
        self.resumed_from: str | None = None  # until its random state is restored
        self._saving: str | None = None
        self._losses: list[torch.Tensor] = []
        self._thresholds: list[int] = []

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's method; under FSDP2 it reduces gradients in float32, and keeps the dtype of the loss.

        accelerate would use the dtype of the weights for both: in bfloat16 a loss of 4 to 8 has steps of 0.03.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    @property
    def ham(self) -> HAMForCausalLM:
        """The HAM itself, with its adapters, if any."""
        return self.model if isinstance(self.model, HAMForCausalLM) else self.model.get_base_model()

    # ---- optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, on the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(
                model,
                options.pop("lr"),
                self.args.weight_decay,
                self.recipe.usage.threshold_learning_rate,
                self.recipe.usage.router_learning_rate,
                None if self.recipe.distillation is None else self.recipe.distillation.added_learning_rate,
            )
            others = {id(parameter) for parameter in clipped_parameters(model)}
            self._thresholds = [i for i, group in enumerate(groups) if id(group["params"][0]) not in others]
            self.optimizer = kind(groups, lr=self.args.learning_rate, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Trainer's schedule of the learning rate, except for the thresholds, whose rate stays constant."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            for index in self._thresholds:
                scheduler.lr_lambdas[index] = _constant
                scheduler.optimizer.param_groups[index]["lr"] = scheduler.base_lrs[index]
        return scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss of a batch, mixed with the divergence from the teacher, if there is one."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.teacher is not None:
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # Trainer has multiplied the loss, which was divided by the items of all ranks.
                num_items_in_batch = num_items_in_batch / (self.accelerator.num_processes // self.get_tp_size())
            with self.accelerator.autocast():
                loss = self.teacher.loss(loss, outputs.logits, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's step; remembers the loss, to check it together with the gradients."""
        if self.resumed_from is not None:
            # Trainer restores it before it opens the data, which draws a number: dropout would differ from one run's.
            self._load_rng_state(self.resumed_from)
            self.resumed_from = None
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self.accelerator.clip_grad_norm_(clipped_parameters(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's norm; raises `FloatingPointError` before an update by a loss or gradient that is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = torch.stack(self._losses).sum()
        self._losses = []
        if not bool(torch.isfinite(loss + grad_norm)):
            found = "loss" if not bool(torch.isfinite(loss)) else "gradient"
            raise FloatingPointError(self._diverged(f"the {found} of step {self.state.global_step + 1}"))
        return grad_norm

    def _diverged(self, what: str) -> str:
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the last good state is {last}" if last else "there is no checkpoint yet"
        return (
            f"{what} is not finite: nothing of it was saved, {kept}. A lower `trainer: learning_rate`, more "
            "`warmup_steps` or other data may help, in a new `output`."
        )

    # ---- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss (nats per token) and fraction kept of the held-out rows at every setting of the recipe, as one log.

        Where a model heals, the log also holds losses of passages read before (`eval_second_time`), and with a teacher
        its losses (`eval_loss/teacher`), which the student aims at. To `log_history` it adds, by layer, the number of
        scores of all heads in each fiftieth of `[0, 1]` at the learned thresholds (`eval_scores/layer_0`).
        """
        settings: dict[str, dict[str, float]] = {"": {}}
        hybrid = self.ham.config.num_hybrid_layers > 0
        if hybrid:
            calibrate(self.ham, self.calibration)
            settings |= {f"/usage_{x:g}": {"kv_usage": x} for x in self.recipe.evaluation.usages}
            settings |= {f"/threshold_{x:g}": {"threshold": x} for x in self.recipe.evaluation.thresholds}
        loader = self.get_eval_dataloader()
        metrics: dict[str, float] = {}
        scores: dict[str, list[int]] = {}
        training = self.model.training
        self.model.eval()
        try:
            for name, setting in settings.items():
                with UsageMeter(self.model) if hybrid else contextlib.nullcontext() as meter:
                    metrics[f"eval_loss{name}"] = self._loss_at(loader, setting)
                    if meter is not None:
                        figures = meter.read()
                        metrics[f"eval_kept{name}"] = figures["usage"].mean().item()
                        scores = scores or score_counts(figures, meter)
                if self._second_time:
                    metrics[f"eval_second_time{name}"] = self._loss_at(map(read_again, loader), setting)
        finally:
            self.model.train(training)
        if self.teacher is not None:
            if not self.teacher_losses:
                with self.accelerator.autocast():
                    self.teacher_losses["eval_loss/teacher"] = self._loss_at(loader, {}, self.teacher.logits)
                    if self._second_time:
                        again = self._loss_at(map(read_again, loader), {}, self.teacher.logits)
                        self.teacher_losses["eval_second_time/teacher"] = again
            metrics |= self.teacher_losses
        self.log(metrics)
        self.state.log_history[-1].update(scores)  # type: ignore[arg-type]  # Trainer says that all is numbers
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def _second_time(self) -> bool:
        """True if evaluations also read passages a second time: the plain loss of a model hardly sees its memory."""
        heals = self.recipe.distillation is not None or self.recipe.transfer is not None
        return heals and repeated_size(self.recipe.context) > 1

    @torch.no_grad()
    def _loss_at(
        self, loader: Any, setting: dict[str, float], logits_of: Callable[..., torch.Tensor] | None = None
    ) -> float:
        """Mean loss over the predicted tokens of all rows, each of which counts once with any number of ranks.

        Args:
            loader: loader of the rows.
            setting: arguments of the model's calls.
            logits_of: function from a batch's inputs to logits. Default: the model's at `setting`.
        """
        sums = []
        for inputs in loader:
            labels = F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
            inputs = self._prepare_inputs(inputs)
            if logits_of is None:
                logits = self.model(**inputs, use_cache=False, **setting).logits
            else:
                logits = logits_of(inputs)
            losses = F.cross_entropy(logits.float().transpose(1, 2), labels.to(logits.device), reduction="none").sum(1)
            counted = torch.stack([losses, (labels != -100).sum(1).to(losses)], dim=1)
            sums.append(self.accelerator.gather_for_metrics(counted).double().cpu())
        loss, tokens = torch.cat(sums).sum(0).tolist()
        return loss / tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, without an epoch: rows never end, and steps count the training."""
        self.state.epoch = None  # type: ignore[assignment]  # Trainer checks for it
        super().log(logs, start_time)

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving is None else self._saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Makes Trainer write a checkpoint into another folder, and renames it when all ranks are done.

        Raises:
            FloatingPointError: if a weight is not finite; nothing is written then.
        """
        step = self.state.global_step
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            raise FloatingPointError(self._diverged(f"a weight after step {step}"))
        output = Path(self.recipe.output)
        self._saving = str(output / PARTIAL)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = None
        whole = output / PARTIAL / f"checkpoint-{step}"
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # A pickle of the arguments, which nothing reads: recipe.json holds them.
            (whole / "training_args.bin").unlink(missing_ok=True)
            rows = self.train_dataset.start + (step - self.first_step) * rows_per_step(self.args)
            write_whole(whole / DATA_STATE, json.dumps(self.train_dataset.state_dict(rows)))
            if self.recipe.lora is not None:
                save_thresholds(self.model, whole)
            replace_folder(whole, output / whole.name)
            checkpoints = sort_checkpoints(str(output))
            limit = self.args.save_total_limit or 0  # may be negative, which means no limit to Trainer
            for old in checkpoints[:-limit] if limit > 0 else []:
                # Moved away first, so that no half-deleted checkpoint keeps its name.
                os.replace(old, output / PARTIAL / Path(old).name)
            shutil.rmtree(output / PARTIAL)
        self.accelerator.wait_for_everyone()


def check_optimizer(arguments: TrainingArguments, model: HAMForCausalLM) -> None:
    """Raises `ValueError` for an optimizer that ignores the settings of `parameter_groups` for thresholds."""
    kind, _ = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    eps = inspect.signature(kind).parameters.get("eps")
    # Adafactor has a pair of them; Lion has none, and takes steps of one length.
    reads = issubclass(kind, torch.optim.SGD) or (eps is not None and isinstance(eps.default, float))
    if model.config.num_hybrid_layers and not reads:
        raise ValueError(
            "`trainer: optim` must be SGD, or of the kind of Adam with a number `eps`, for thresholds to descend by "
            f"the gradient itself, got {str(getattr(arguments.optim, 'value', arguments.optim))!r}."
        )


def score_counts(figures: dict[str, Any], meter: UsageMeter) -> dict[str, list[int]]:
    """The histograms in a result of `meter.read`, summed over the heads of a layer, by layer."""
    counts = figures["histogram"].sum(1).tolist()
    return {f"eval_scores/layer_{mixer.layer_idx}": x for mixer, x in zip(meter.mixers, counts, strict=True)}


def rows_per_step(arguments: TrainingArguments) -> int:
    """Rows that all ranks together read for one update."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def read_again(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of rows whose end repeats their beginning, which alone counts in the loss.

    Args:
        inputs: `input_ids` and more, int64 `[B, T]`; the result has `input_ids` and `labels`, each row one document.
    """
    tokens = with_repeated_end(inputs["input_ids"])
    # The first token of the second copy cannot be predicted.
    labels = tokens.clone()
    labels[:, : 1 - repeated_size(tokens.shape[1])] = -100
    return {"input_ids": tokens, "labels": labels}


def replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`, so that `target` is always a whole folder."""
    if target.exists():
        os.replace(target, source.with_name(f"{source.name}.old"))
    os.replace(source, target)


def _constant(step: int) -> float:
    return 1.0
