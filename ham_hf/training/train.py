# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Trains the model of a recipe, from the last checkpoint if there is one, and writes it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from ..evaluation import calibrate
from ..files import write_whole
from ..files_ham import UNFINISHED
from ..modeling_ham import HAMForCausalLM
from .control import ThresholdCallback, UsageSchedule
from .gates import GateCallback
from .lora import load_checkpoint
from .progress import LOG, LogFile, Progress
from .recipe import TRAINER_DEFAULTS, TrainRecipe
from .setup import build_data, build_model, load_tokenizer, schedule_for
from .stop_on_signal import StopOnSignal
from .trainer import DATA_STATE, PARTIAL, HAMTrainer, rows_per_step
from .transfer import STATE, transfer

FINAL = "model"
# Options that may change between two parts of a training without changing its losses.
FREE_TRAINER_KEYS = {"disable_tqdm", "report_to", "run_name", "save_total_limit", "save_steps"}


def train(recipe: TrainRecipe) -> Path | None:
    """Trains the model of a recipe, from the last checkpoint in its `output` if there is one.

    Returns:
        The folder of the trained model, with tokenizer, score quantiles, recipe.json, recipe.md and log.jsonl; `None`
        if a signal stopped the training before its end, in which case its state is saved.

    Raises:
        FloatingPointError: if a loss, a gradient or a weight is not finite.
        TypeError, ValueError, OSError: for a recipe that cannot be carried out, before anything is trained.
    """
    output = Path(recipe.output)
    arguments = training_arguments(recipe)
    last = get_last_checkpoint(output) if output.is_dir() else None
    check_output(recipe, output, begun=last is not None or any((output / x).exists() for x in (STATE, FINAL)))
    if (output / FINAL).is_dir():
        return output / FINAL
    if (recipe.distillation is not None or recipe.transfer is not None) and last is None:
        arguments.eval_on_start = True  # measures a converted model, and its teacher, before it is trained as a whole
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
    if recipe.lora is not None and trainer.is_fsdp_enabled:
        raise ValueError("`lora` must be left out under FSDP: it is for one process and for DDP.")
    if arguments.should_save:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "recipe.json", json.dumps(recipe.to_dict(), indent=2) + "\n")
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    logs = [] if recipe.transfer is None else transfer(recipe, trainer.ham, rows, arguments, stop)
    if logs is None:
        return None
    install_callbacks(trainer, schedule, logs)
    if last is not None:
        rows.load_state_dict(json.loads((Path(last) / DATA_STATE).read_text()))
        trainer.first_step = int(last.rpartition("-")[2])
        trainer.resumed_from = last
        if recipe.lora is not None:
            load_checkpoint(trainer.model, Path(last))
    if trainer.first_step == recipe.steps:
        # Only the model is still to be written; Trainer would take one more step.
        if last is None:
            trainer.evaluate()
        elif recipe.lora is None:
            trainer.model.load_state_dict(HAMForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict())
    else:
        with stop:
            trainer.train(resume_from_checkpoint=last)
        if trainer.state.global_step < recipe.steps:
            return None
    if schedule is not None:
        # The callback sets it too, but not if only the model was to be written, and to None for frozen thresholds.
        trainer.ham.config.target_kv_usage = schedule.points[-1][1]
    write_model(trainer, output)
    return output / FINAL


def training_arguments(recipe: TrainRecipe) -> TrainingArguments:
    """Trainer's arguments: those of the recipe, our defaults, and those that every training needs.

    Raises:
        ValueError: if Trainer does not take them.
    """
    settled = {
        "output_dir": recipe.output,
        "max_steps": max(1, recipe.steps),  # Trainer is not called for a transfer alone
        "seed": recipe.seed,
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluation.every,
        "save_strategy": "steps",
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # `PackedRows` resumes by itself, without reading rows again
        "logging_nan_inf_filter": False,
    }
    try:
        arguments = TrainingArguments(**(TRAINER_DEFAULTS | recipe.trainer | settled))  # type: ignore[arg-type]
        found = arguments.world_size
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"`trainer` has a value that Trainer does not take: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if found != started:
        # Each process would train by itself, and write into the same folder.
        raise ValueError(
            f"`trainer: use_cpu` must be true for several processes on a CPU, got {arguments.use_cpu}: of {started} "
            f"processes that were started each sees {found}."
        )
    if found > 1 and recipe.transfer is not None:
        raise ValueError(
            f"`transfer` must be left out with several processes, got {found}: carry it out in one, with `steps: 0`, "
            "and train its model in several."
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
    """The largest batch of at most `most` rows that divides each process's share.

    Short batches of some ranks would be filled up with rows of other ranks, which the meter would count again.
    """
    share, left = divmod(rows, processes)
    if left:
        raise ValueError(f"`evaluation: rows` must be a multiple of the {processes} processes, got {rows}.")
    return max(n for n in range(1, most + 1) if share % n == 0)


def check_output(recipe: TrainRecipe, output: Path, begun: bool) -> None:
    """Raises `ValueError` for a folder with other contents, and for one in which another training has `begun`."""
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
    """True for files that a training leaves if it is killed before its first checkpoint."""
    return name == PARTIAL or (name.startswith(".recipe.json.") and name.endswith(UNFINISHED))


def _flat(section: dict[str, Any], where: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{where}: {key}" if where else key
        result |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return result


def install_callbacks(trainer: HAMTrainer, schedule: UsageSchedule | None, logs: list[dict[str, Any]]) -> None:
    """Steers the thresholds, and replaces Trainer's callbacks for showing and writing figures by ours.

    `logs` are those of a transfer, with which the log begins.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if schedule is not None:
        # At the front, so that callbacks that report to other tools see its figures.
        trainer.callback_handler.callbacks.insert(0, ThresholdCallback(schedule))
    recipe = trainer.recipe
    if recipe.distillation is not None and trainer.ham.config.num_hybrid_layers:
        trainer.callback_handler.callbacks.insert(0, GateCallback())
    trainer.add_callback(LogFile(Path(recipe.output) / LOG, logs))
    tokens, bar = rows_per_step(trainer.args) * recipe.context, not recipe.trainer.get("disable_tqdm")
    trainer.add_callback(Progress(tokens, bar, loss_name(recipe)))


def loss_name(recipe: TrainRecipe) -> str:
    """The name of the figure that training logs as `loss`: with a teacher it is not the next-token loss."""
    weight = 0.0 if recipe.distillation is None else recipe.distillation.weight
    return {0.0: "loss", 1.0: "divergence"}.get(weight, "loss mixed with divergence")


def work_of(trainer: HAMTrainer) -> str:
    """The steps of every stage, in words."""
    recipe, tokens = trainer.recipe, rows_per_step(trainer.args) * trainer.recipe.context
    whole = f"{recipe.steps:,} steps of {tokens:,} tokens"
    if recipe.transfer is None:
        return whole
    first = f"{recipe.transfer.steps:,} steps of {tokens:,} tokens of layer-wise transfer"
    return f"{first}, and {whole}" if recipe.steps else first


def write_model(trainer: HAMTrainer, output: Path) -> None:
    """Writes the calibrated model or its adapters, with its recipe and log, whole or not at all."""
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
    shutil.copyfile(output / LOG, partial / LOG)
    told = yaml.safe_dump({**trainer.recipe.to_dict(), "output": None}, sort_keys=False)
    write_whole(
        partial / "recipe.md",
        f"{work_of(trainer)} with `ham-hf train` and this recipe:\n\n```yaml\n{told}```\n",
    )
    os.replace(partial, output / FINAL)
    shutil.rmtree(output / PARTIAL)
