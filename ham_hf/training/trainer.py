# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Trains a HAM with Transformers' Trainer: thresholds steered, checkpoints whole, resumed as if never cut."""

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from .. import HAMConfig, HAMForCausalLM
from ..configuration_ham import check_target_kv_usage
from ..evaluation import calibrate
from ..files import write_whole
from ..files_ham import UNFINISHED
from .control import ThresholdCallback, UsageMeter, UsageSchedule, clipped_parameters, parameter_groups
from .data import PackedRows
from .distillation import Teacher, open_gates
from .lora import add_adapters, load_checkpoint, save_thresholds
from .progress import LogFile, Progress
from .recipe import TRAINER_DEFAULTS, TrainRecipe, UsageRecipe

# What is being written, and renamed when it is whole.
PARTIAL = "partial"
FINAL = "model"
DATA_STATE = "data_state.json"
# Rows of training text that score quantiles are measured on.
CALIBRATION_ROWS = 16
# What may change between two parts of a training without changing its losses.
FREE_TRAINER_KEYS = {"disable_tqdm", "report_to", "run_name", "save_total_limit", "save_steps"}


class HAMTrainer(Trainer):
    """Transformers' Trainer for a HAM.

    Thresholds have groups of their own in the optimiser, keep their learning rate and are not clipped. A checkpoint
    appears under its name when it is whole. Nothing is saved once a number is not finite. An evaluation measures the
    loss and the fraction kept at several settings, and how routing scores are spread. The model may be a PeftModel.

    Args:
        recipe: what the arguments below were made of.
        calibration: `[n, context]` int64 token ids and so on, arguments of a call, that `kv_usage` is calibrated on.
        arguments: those of `Trainer`; `train_dataset` is a `PackedRows`, `eval_dataset` a list of its rows.

    Raises:
        ValueError: for an optimiser that cannot have thresholds descend by the gradient itself.
    """

    model: Any  # HAMForCausalLM or peft.PeftModel
    train_dataset: PackedRows

    def __init__(self, recipe: TrainRecipe, calibration: list[dict[str, torch.Tensor]], **arguments: Any):
        check_optimizer(arguments["args"], arguments["model"])
        use_cache = arguments["model"].config.use_cache
        super().__init__(**arguments)
        self.use_cache = use_cache  # which Trainer has switched off in the configuration
        self.recipe = recipe
        self.calibration = calibration
        self.first_step = 0  # of this part of the training
        self.teacher: Teacher | None = None
        self.teacher_loss: float | None = None  # on the held-out rows, once it was measured
        settings = recipe.distillation
        if settings is not None and settings.teacher is not None and settings.weight:
            self.teacher = Teacher(settings.teacher, self.model, settings.weight, settings.temperature)
        self.resumed_from: str | None = None  # until its random state is put back
        self._saving: str | None = None
        self._losses: list[torch.Tensor] = []
        self._thresholds: list[int] = []

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; under FSDP2 gradients are reduced in float32, and the loss is as exact as it was computed.

        accelerate would have both in the type of the weights: a loss of 4 to 8 then has steps of 0.03 in bfloat16.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    @property
    def ham(self) -> HAMForCausalLM:
        """The HAM itself, which has the adapters in it, if there are any."""
        return self.model if isinstance(self.model, HAMForCausalLM) else self.model.get_base_model()

    # ---- optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name, on the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(
                model,
                options.pop("lr"),
                self.args.weight_decay,
                self.recipe.usage.threshold_learning_rate,
                self.recipe.usage.router_learning_rate,
            )
            others = {id(parameter) for parameter in clipped_parameters(model)}
            self._thresholds = [i for i, group in enumerate(groups) if id(group["params"][0]) not in others]
            self.optimizer = kind(groups, lr=self.args.learning_rate, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Trainer's schedule of the learning rate, but for the thresholds, whose loop needs the same at every step."""
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
        """Trainer's, of a batch; mixed with the divergence from the teacher, if there is one."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.teacher is not None:
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # Trainer has multiplied a loss that was divided by the items of all ranks.
                num_items_in_batch = num_items_in_batch / (self.accelerator.num_processes // self.get_tp_size())
            with self.accelerator.autocast():
                loss = self.teacher.loss(loss, outputs.logits, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's; the loss is remembered, to be judged together with the gradients."""
        if self.resumed_from is not None:
            # Trainer did it before it opened the data, which drew a number: dropout would not be that of one run.
            self._load_rng_state(self.resumed_from)
            self.resumed_from = None
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self.accelerator.clip_grad_norm_(clipped_parameters(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's; called before every update, which gradients that are not finite do not come to."""
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
        """Loss (nats a token) and fraction kept of the held-out rows at every setting of the recipe, as one log.

        With a teacher comes the loss of that one (`eval_loss/teacher`), which the student is to come back to. To
        `log_history` it adds, by layer, how many scores of all heads lie in each fiftieth of `[0, 1]` at the learned
        thresholds (`eval_scores/layer_0`).
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
        finally:
            self.model.train(training)
        if self.teacher is not None:
            if self.teacher_loss is None:
                with self.accelerator.autocast():
                    self.teacher_loss = self._loss_at(loader, {}, self.teacher.logits)
            metrics["eval_loss/teacher"] = self.teacher_loss
        self.log(metrics)
        self.state.log_history[-1].update(scores)  # type: ignore[arg-type]  # Trainer says that all is numbers
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _loss_at(
        self, loader: Any, setting: dict[str, float], logits_of: Callable[..., torch.Tensor] | None = None
    ) -> float:
        """Mean over the predicted tokens of all rows, each of which counts once however many ranks there are.

        Args:
            loader: of the rows.
            setting: arguments of the model's calls.
            logits_of: the logits of a batch's inputs. Default: the model's at `setting`.
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
        """Trainer's, without an epoch: rows have no end, and steps count the training."""
        self.state.epoch = None  # type: ignore[assignment]  # Trainer asks whether it is there
        super().log(logs, start_time)

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving is None else self._saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Has Trainer write a checkpoint into another folder, and renames it when all ranks are done.

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
            # A pickle of the arguments, which nothing reads: recipe.json tells them.
            (whole / "training_args.bin").unlink(missing_ok=True)
            rows = self.train_dataset.start + (step - self.first_step) * rows_per_step(self.args)
            write_whole(whole / DATA_STATE, json.dumps(self.train_dataset.state_dict(rows)))
            if self.recipe.lora is not None:
                save_thresholds(self.model, whole)
            replace_folder(whole, output / whole.name)
            checkpoints = sort_checkpoints(str(output))
            limit = self.args.save_total_limit or 0  # which may be negative: no limit, to Trainer
            for old in checkpoints[:-limit] if limit > 0 else []:
                # Out of the way first, so that no half of it is left under its name.
                os.replace(old, output / PARTIAL / Path(old).name)
            shutil.rmtree(output / PARTIAL)
        self.accelerator.wait_for_everyone()


class StopOnSignal(TrainerCallback):
    """Inside of `with`, Ctrl-C and SIGTERM let the step end, and have it saved, before the training stops.

    Another signal after the first second interrupts at once, which costs the steps since the last checkpoint. Before
    that it is the same request, which reaches a process from the terminal and once more from what launched it.

    Attributes:
        asked: whether to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        """Takes the signals over, which only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {x: signal.signal(x, self._ask) for x in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
        elif now - self._asked_at > 1:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops all ranks after the same step, whichever was told to."""
        if args.world_size > 1:
            self.asked = any(gather_object([self.asked]))
        if self.asked:
            control.should_save = control.should_training_stop = True


def train(recipe: TrainRecipe) -> Path | None:
    """Trains what a recipe describes, from the last checkpoint in its `output` if there is one.

    Returns:
        The folder of the trained model, with tokenizer, score quantiles, recipe.json, recipe.md and log.jsonl; `None`
        if a signal stopped the training before its end, which is saved.

    Raises:
        FloatingPointError: if a loss, a gradient or a weight is not finite.
        TypeError, ValueError, OSError: for what the recipe names and cannot be used, before anything is trained.
    """
    output = Path(recipe.output)
    arguments = training_arguments(recipe)
    last = get_last_checkpoint(output) if output.is_dir() else None
    check_output(recipe, output, begun=last is not None or (output / FINAL).exists())
    if (output / FINAL).is_dir():
        return output / FINAL
    if recipe.distillation is not None and last is None:
        arguments.eval_on_start = True  # a converted model is measured before it heals, and its teacher
    set_seed(recipe.seed)
    with arguments.main_process_first():
        tokenizer = load_tokenizer(recipe)
        model = build_model(recipe, tokenizer)
        rows, held_out, calibration = build_data(recipe, tokenizer, rows_per_step(arguments))
    schedule = schedule_for(recipe, model.config)
    stop = StopOnSignal()
    trainer = HAMTrainer(
        recipe,
        calibration,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[stop],
    )
    report_through_us(trainer, schedule)
    if recipe.lora is not None and trainer.is_fsdp_enabled:
        raise ValueError("`lora` must be left out under FSDP: it is for one process and for DDP.")
    if arguments.should_save:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "recipe.json", json.dumps(recipe.to_dict(), indent=2) + "\n")
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    if last is not None:
        rows.load_state_dict(json.loads((Path(last) / DATA_STATE).read_text()))
        trainer.first_step = int(last.rpartition("-")[2])
        trainer.resumed_from = last
        if recipe.lora is not None:
            load_checkpoint(trainer.model, Path(last))
    if trainer.first_step == recipe.steps:
        # Only the model was not written yet; to Trainer this would be a reason for one more step.
        if recipe.lora is None:
            trainer.model.load_state_dict(HAMForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict())
    else:
        with stop:
            trainer.train(resume_from_checkpoint=last)
        if trainer.state.global_step < recipe.steps:
            return None
    if schedule is not None:
        # A callback has set it, but not where only the model was to be written, and to None while thresholds froze.
        trainer.ham.config.target_kv_usage = schedule.points[-1][1]
    write_model(trainer, output)
    return output / FINAL


def training_arguments(recipe: TrainRecipe) -> TrainingArguments:
    """Trainer's arguments: those of the recipe, our defaults, and what a training cannot do without.

    Raises:
        ValueError: if Trainer does not take them.
    """
    settled = {
        "output_dir": recipe.output,
        "max_steps": recipe.steps,
        "seed": recipe.seed,
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluation.every,
        "save_strategy": "steps",
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # `PackedRows` goes on by itself, without reading again what was read
        "logging_nan_inf_filter": False,
    }
    try:
        arguments = TrainingArguments(**(TRAINER_DEFAULTS | recipe.trainer | settled))  # type: ignore[arg-type]
        found = arguments.world_size
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"`trainer` has a value that Trainer does not take: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if found != started:
        # Each would train by itself, and write into the folder of the others.
        raise ValueError(
            f"`trainer: use_cpu` must be true for several processes on a CPU, got {arguments.use_cpu}: of {started} "
            f"processes that were started each sees {found}."
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process must have one GPU, and sees {arguments.n_gpu}: start one for each with `accelerate launch`, "
            "or leave one visible with CUDA_VISIBLE_DEVICES."
        )
    if found > 1:
        most = arguments.per_device_eval_batch_size
        arguments.per_device_eval_batch_size = evaluation_batch(recipe.evaluation.rows, found, most)
    return arguments


def evaluation_batch(rows: int, processes: int, most: int) -> int:
    """The largest batch of at most so many rows that divides each process' share.

    Short batches of some ranks would be filled up with rows that others have, which the meter would count again.
    """
    share, left = divmod(rows, processes)
    if left:
        raise ValueError(f"`evaluation: rows` must be a multiple of the {processes} processes, got {rows}.")
    return max(n for n in range(1, most + 1) if share % n == 0)


def check_optimizer(arguments: TrainingArguments, model: HAMForCausalLM) -> None:
    """Refuses, with `ValueError`, an optimiser that does not read what `parameter_groups` says of thresholds."""
    kind, _ = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    eps = inspect.signature(kind).parameters.get("eps")
    # Adafactor has a pair of them; Lion none, and steps of one length.
    reads = issubclass(kind, torch.optim.SGD) or (eps is not None and isinstance(eps.default, float))
    if model.config.num_hybrid_layers and not reads:
        raise ValueError(
            "`trainer: optim` must be SGD, or of the kind of Adam with a number `eps`, for thresholds to descend by "
            f"the gradient itself, got {str(getattr(arguments.optim, 'value', arguments.optim))!r}."
        )


def score_counts(figures: dict[str, Any], meter: UsageMeter) -> dict[str, list[int]]:
    """The histograms of what `meter.read` gave, of all heads of a layer together, by layer."""
    counts = figures["histogram"].sum(1).tolist()
    return {f"eval_scores/layer_{mixer.layer_idx}": x for mixer, x in zip(meter.mixers, counts, strict=True)}


def rows_per_step(arguments: TrainingArguments) -> int:
    """Rows that all ranks together read for one update."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def check_output(recipe: TrainRecipe, output: Path, begun: bool) -> None:
    """Refuses, with `ValueError`, a folder with other things in it, and one another training that has `begun`."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, got the file {output}.")
    ours = (output / "recipe.json").is_file()
    others = [] if not output.is_dir() else [x.name for x in output.iterdir() if not _is_unfinished(x.name)]
    if output.is_dir() and not ours and (begun or others):
        raise ValueError(f"`output` must be a new or empty folder, or that of an earlier training, got {output}.")
    if not begun:
        return
    before = _flat(json.loads((output / "recipe.json").read_text()))
    now = _flat(json.loads(json.dumps(recipe.to_dict())))
    free = {f"trainer: {key}" for key in FREE_TRAINER_KEYS} | {"output"}
    for key in sorted(before.keys() | now.keys()):
        if key not in free and before.get(key) != now.get(key):
            raise ValueError(
                f"`output` {output} holds a training with another recipe: `{key}` was {before.get(key)!r} and is now "
                f"{now.get(key)!r}. Put it back to resume, or take another `output`."
            )


def _is_unfinished(name: str) -> bool:
    """True for what a training leaves that was killed before its first checkpoint."""
    return name == PARTIAL or (name.startswith(".recipe.json.") and name.endswith(UNFINISHED))


def _flat(section: dict[str, Any], where: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{where}: {key}" if where else key
        result |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return result


def build_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model of a recipe in float32, wrapped by peft where it has adapters.

    Raises:
        ImportError: if peft is wanted and not installed.
        ValueError: if it cannot be, or does not go with the tokenizer.
    """
    source = recipe.model.from_
    model = (
        new_model(recipe, tokenizer) if source is None else HAMForCausalLM.from_pretrained(source, dtype=torch.float32)
    )
    if recipe.distillation is not None and recipe.distillation.open_gates is not None:
        try:
            open_gates(model, recipe.distillation.open_gates)
        except ValueError as error:
            raise ValueError(f"`distillation: open_gates` must be null for this checkpoint: {error}") from error
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`model` must have an embedding for each of the {len(tokenizer)} tokens of the tokenizer "
            f"{recipe.model.tokenizer_path}, got `vocab_size` {config.vocab_size}."
        )
    return model if recipe.lora is None else add_adapters(model, recipe.lora, recipe.thresholds_learn)


def load_tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe; `ValueError` if there is none, or the checkpoint that should have it is no HAM."""
    if recipe.model.from_ is not None:
        check_checkpoint(recipe.model.from_)
    path = recipe.model.tokenizer_path
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model: tokenizer` must be a folder, or a name on the Hub, that holds a tokenizer, got {path!r}"
            f"{'' if recipe.model.tokenizer else ', by `model: from`'}: {error}"
        ) from error


def check_checkpoint(path: str) -> None:
    """Refuses, with `ValueError`, what is no checkpoint of a HAM."""
    try:
        kind = HAMConfig.get_config_dict(path)[0].get("model_type")
    except (OSError, ValueError) as error:
        missing = "" if Path(path).is_dir() else ", no folder here"
        raise ValueError(f"`model: from` must be a HAM checkpoint, got {path!r}{missing}: {error}") from error
    if kind != HAMConfig.model_type:
        found = "without a config.json that names a model" if kind is None else f"of type {kind!r}"
        raise ValueError(f"`model: from` must be a HAM checkpoint, got {path!r} {found}.")


def new_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> HAMForCausalLM:
    """A model with new weights; what the recipe leaves out follows from the tokenizer and the context."""
    follows = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max(recipe.context, 2048),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        return HAMForCausalLM(HAMConfig(**(follows | (recipe.model.new or {}))))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"`model: new` is no HAM: {error.__cause__ or error}") from error


def build_data(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, batch: int
) -> tuple[PackedRows, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Rows to train on, rows to evaluate on, and batches of one row to calibrate on.

    Raises:
        ValueError: if the data is too little for the evaluation and one step of `batch` rows.
    """
    evaluation = recipe.evaluation
    held_out = evaluation.rows if evaluation.data is None else 0
    rows = PackedRows(recipe.data, tokenizer, recipe.context, recipe.seed, held_out)
    first = rows.first_rows(held_out + max(batch, CALIBRATION_ROWS))
    if len(first) < held_out + batch:
        raise ValueError(
            f"`data` has too little text: it fills {len(first)} rows of {recipe.context} tokens, takes {held_out} "
            f"for `evaluation: rows` and {batch} for each step. Take more text, or a shorter `context`, a smaller "
            "`per_device_train_batch_size` or fewer `evaluation: rows`."
        )
    evaluated = first[:held_out]
    if evaluation.data is not None:
        evaluated = PackedRows(evaluation.data, tokenizer, recipe.context, recipe.seed).first_rows(evaluation.rows)
        if len(evaluated) < evaluation.rows:
            raise ValueError(
                f"`evaluation: data` has too little text: it fills {len(evaluated)} rows of {recipe.context} tokens, "
                f"takes {evaluation.rows} (`evaluation: rows`)."
            )
    calibration = first[held_out : held_out + CALIBRATION_ROWS]
    wanted = ("input_ids", "position_ids")
    return rows, evaluated, [{name: row[name][None] for name in wanted} for row in calibration]


def schedule_for(recipe: TrainRecipe, config: HAMConfig) -> UsageSchedule | None:
    """The usage that thresholds are driven to; `None` where there are none, or they are held.

    Raises:
        TypeError, ValueError: for what the model's thresholds cannot follow.
    """
    if not config.num_hybrid_layers:
        if recipe.usage != UsageRecipe():
            raise ValueError("`usage` must be left out: the model has no layer of type 'hybrid', so nothing is kept.")
        return None
    if recipe.usage.router_learning_rate is not None and not config.router.startswith("learned"):
        raise ValueError(
            "`usage: router_learning_rate` must be left out, as the model's router learns nothing: it is "
            f"{config.router!r}."
        )
    if not recipe.thresholds_learn:
        return None
    default = config.target_kv_usage
    if default is None and recipe.usage.target is None and recipe.usage.schedule is None:
        held = UsageRecipe(router_learning_rate=recipe.usage.router_learning_rate)
        if recipe.usage != held:
            raise ValueError(
                "`usage` must have a `target` or a `schedule` beside `freeze_steps` and `threshold_learning_rate`, "
                "got neither: the model's `target_kv_usage` is null, so its thresholds are held."
            )
        return None
    schedule = recipe.usage.usage_schedule(0.5 if default is None else default)
    for _, target in schedule.points:
        try:
            check_target_kv_usage(target, config.threshold_scope, config.num_hybrid_layers)
        except ValueError as error:
            key = "target" if recipe.usage.schedule is None else "schedule"
            raise ValueError(str(error).replace("`target_kv_usage`", f"`usage: {key}`")) from None
    return schedule


def report_through_us(trainer: HAMTrainer, schedule: UsageSchedule | None) -> None:
    """Steers the thresholds, and has figures shown and written by our callbacks in place of Trainer's."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if schedule is not None:
        # First of all, so that those who report to other tools see its figures.
        trainer.callback_handler.callbacks.insert(0, ThresholdCallback(schedule))
    recipe = trainer.recipe
    trainer.add_callback(LogFile(Path(recipe.output) / "log.jsonl"))
    tokens, bar = rows_per_step(trainer.args) * recipe.context, not recipe.trainer.get("disable_tqdm")
    trainer.add_callback(Progress(tokens, bar, loss_name(recipe)))


def loss_name(recipe: TrainRecipe) -> str:
    """The name of the figure that training logs as `loss`: with a teacher it is not the loss on next tokens."""
    weight = 0.0 if recipe.distillation is None else recipe.distillation.weight
    return {0.0: "loss", 1.0: "divergence"}.get(weight, "loss mixed with divergence")


def write_model(trainer: HAMTrainer, output: Path) -> None:
    """Writes the calibrated model or its adapters, with all that tells how it was made, whole or not at all."""
    if trainer.recipe.lora is not None and trainer.recipe.lora.merge:
        trainer.model = trainer.model.merge_and_unload()
    if trainer.ham.config.num_hybrid_layers:
        calibrate(trainer.ham, trainer.calibration)
    trainer.ham.config.use_cache = trainer.use_cache
    partial = output / PARTIAL / FINAL
    trainer.save_model(str(partial))
    if not trainer.args.should_save:
        return
    (partial / "training_args.bin").unlink(missing_ok=True)
    shutil.copyfile(output / "recipe.json", partial / "recipe.json")
    shutil.copyfile(output / "log.jsonl", partial / "log.jsonl")
    steps, tokens = trainer.recipe.steps, rows_per_step(trainer.args) * trainer.recipe.context
    told = yaml.safe_dump({**trainer.recipe.to_dict(), "output": None}, sort_keys=False)
    write_whole(
        partial / "recipe.md",
        f"{steps:,} steps of {tokens:,} tokens with `ham-hf train` and this recipe:\n\n```yaml\n{told}```\n",
    )
    os.replace(partial, output / FINAL)
    shutil.rmtree(output / PARTIAL)


def replace_folder(source: Path, target: Path) -> None:
    """Gives `source` the name `target`, under which nothing is to be found but a whole folder."""
    if target.exists():
        os.replace(target, source.with_name(f"{source.name}.old"))
    os.replace(source, target)


def _constant(step: int) -> float:
    return 1.0
