# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Builds the parts of a training from its recipe: tokenizer, model, data and the schedule of usage."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_ham import HAMConfig, check_target_kv_usage
from ..modeling_ham import HAMForCausalLM
from ..routing_ham import usage_shares, usage_threshold
from .control import UsageSchedule, hybrid_mixers
from .data import PackedRows
from .distillation import open_gates
from .lora import add_adapters
from .recipe import TrainRecipe, UsageRecipe
from .transfer import layers_to_teach

# Rows of training text that score quantiles are measured on.
CALIBRATION_ROWS = 16


def load_tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe; raises `ValueError` if there is none, or if the checkpoint is not a HAM."""
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
    """Raises `ValueError` unless `path` is a HAM checkpoint."""
    try:
        kind = HAMConfig.get_config_dict(path)[0].get("model_type")
    except (OSError, ValueError) as error:
        missing = "" if Path(path).is_dir() else ", no folder here"
        raise ValueError(f"`model: from` must be a HAM checkpoint, got {path!r}{missing}: {error}") from error
    if kind != HAMConfig.model_type:
        found = "without a config.json that names a model" if kind is None else f"of type {kind!r}"
        raise ValueError(f"`model: from` must be a HAM checkpoint, got {path!r} {found}.")


def build_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model of a recipe in float32, wrapped by peft if it has adapters.

    Raises:
        ImportError: if peft is needed and not installed.
        ValueError: if the recipe describes no valid model, or one that does not fit the tokenizer.
    """
    source = recipe.model.from_
    model = (
        new_model(recipe, tokenizer) if source is None else HAMForCausalLM.from_pretrained(source, dtype=torch.float32)
    )
    if recipe.transfer is not None:
        try:
            layers_to_teach(model)
        except ValueError as error:
            raise ValueError(f"`transfer` must be left out for this checkpoint: {error}") from error
        model.config.target_kv_usage = recipe.transfer.usage  # a default for the stage after it
    elif recipe.distillation is not None and recipe.distillation.open_gates is not None:
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
    start_from_division(model, schedule_for(recipe, config))
    return model if recipe.lora is None else add_adapters(model, recipe.lora, recipe.thresholds_learn)


@torch.no_grad()
def start_from_division(model: HAMForCausalLM, schedule: UsageSchedule | None) -> None:
    """Has the heads of a checkpoint that keeps everything share the first target by their importance.

    With the scope `"model"` all thresholds move alike, so training leaves the division of usage over heads as it finds
    it, and would find none. Nothing changes without an importance and score quantiles, with another scope, and where
    thresholds were trained before.

    Args:
        model: the model; its learned thresholds change.
        schedule: the usage that they are driven to; `None` if they are held.
    """
    config = model.config
    if schedule is None or config.threshold_scope != "model" or config.head_importance is None:
        return
    mixers = hybrid_mixers(model)
    quantiles = torch.stack([mixer.score_quantiles for mixer in mixers])
    trained = any(bool((mixer.threshold > 0).any()) for mixer in mixers)
    if trained or config.usage_division == "even" or not bool((quantiles.amax(-1) > 0).all()):
        return
    target = schedule.points[0][1]
    assert not isinstance(target, list)  # with this scope
    for mixer, thresholds in zip(mixers, usage_threshold(quantiles, usage_shares(config, target)), strict=True):
        mixer.threshold.copy_(thresholds)


def new_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> HAMForCausalLM:
    """A model with new weights; fields that the recipe leaves out follow from the tokenizer and the context."""
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
        raise ValueError(f"`model: new` is not a valid HAM: {error.__cause__ or error}") from error


def build_data(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, batch: int
) -> tuple[PackedRows, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Rows to train on, rows to evaluate on, and batches of one row to calibrate on.

    Raises:
        ValueError: if there is too little data for the evaluation and one step of `batch` rows.
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
    """The usage that thresholds are driven to; `None` if there are none, or they are held.

    Raises:
        TypeError, ValueError: for a target that the model's thresholds cannot follow.
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
