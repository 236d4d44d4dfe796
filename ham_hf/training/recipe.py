# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The recipe of a training: a YAML file read into dataclasses, checked key by key before the training starts."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import TrainingArguments

from ..configuration_ham import HAMConfig
from .control import UsageSchedule
from .distillation import check_bias, check_mixture
from .recipe_yaml import RecipeLoader

Section = TypeVar("Section")

EMBEDDED_TOKENIZER = str(Path(__file__).parents[1] / "checkpoints" / "ham-tiny")
# Format of a folder's files, by suffix.
FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DOCUMENTS = ("file", "paragraph", "line")
# What layer-wise transfer trains.
TRAINED = ("added", "mixer")
# Options of Trainer that the recipe has a key of its own for.
OWN_KEYS = {
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "seed": "seed",
    "data_seed": "seed",
    "eval_strategy": "evaluation: every",
    "eval_steps": "evaluation: every",
    "do_eval": "evaluation",
}
# Options that would break a training's guarantees: exact resumption, whole checkpoints, one order of rows.
SETTLED = {
    "accelerator_config",
    "auto_find_batch_size",
    "bf16_full_eval",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "do_predict",
    "do_train",
    "enable_jit_checkpoint",
    "eval_accumulation_steps",
    "fp16",
    "fp16_full_eval",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "ignore_data_skip",
    "label_names",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "local_rank",
    "logging_nan_inf_filter",
    "metric_for_best_model",
    "prediction_loss_only",
    "push_to_hub",
    "remove_unused_columns",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "save_only_model",
    "save_strategy",
    "train_sampling_strategy",
}
TRAINER_DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.02,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
}


@dataclass(frozen=True)
class ModelRecipe:
    """The model to train: `from` a HAM checkpoint, or `new` with fields of HAMConfig.

    Attributes:
        from_: folder or name on the Hub of a HAM checkpoint.
        new: fields of HAMConfig; those that follow from the tokenizer and `context` may be left out.
        tokenizer: folder or name on the Hub. Default: the checkpoint's, or for a new model that of ham-tiny.
    """

    from_: str | None = None
    new: dict[str, Any] | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if (self.from_ is None) == (self.new is None):
            raise ValueError("`model` must have one of `from` (a HAM checkpoint) and `new` (fields of HAMConfig).")
        check_config_keys("model: new", self.new or {})

    @property
    def tokenizer_path(self) -> str:
        """Folder or name of the tokenizer."""
        return self.tokenizer or self.from_ or EMBEDDED_TOKENIZER


@dataclass(frozen=True)
class DataRecipe:
    """Source of the text: local `files`, or a data set's `name` for the library `datasets`.

    Attributes:
        files: a file, a folder or a glob, or a list of them; all of one format: text, JSON Lines or Parquet.
        name: name of a data set on the Hub, or its folder.
        config: configuration of the data set, if it has several.
        split: split of the data set.
        streaming: read the data set as it is needed; otherwise it is first written into the cache of `datasets`.
            Local files are always read as they are needed.
        column: column that holds the text, in all but text files.
        document: unit of a document in a text file: the whole `"file"`, a `"paragraph"` or a `"line"`.
        shuffle_rows: number of rows in a block, within which rows are shuffled.
    """

    files: str | list[str] | None = None
    name: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = True
    column: str = "text"
    document: str = "file"
    shuffle_rows: int = 1000

    def __post_init__(self) -> None:
        if (self.files is None) == (self.name is None):
            raise ValueError("must have one of `files` (paths) and `name` (of a data set).")
        if self.document not in DOCUMENTS:
            raise ValueError(f"`document` must be one of {DOCUMENTS}, got {self.document!r}.")
        at_least("shuffle_rows", self.shuffle_rows, 1)
        if self.files is None:
            return
        for x in dataclasses.fields(self):
            if x.name in ("config", "split", "streaming") and getattr(self, x.name) != x.default:
                raise ValueError(f"`{x.name}` must be left out beside `files`: it is for a data set's `name`.")
        kind = FORMATS[self.paths()[0].suffix]
        if self.document != "file" and kind != "text":
            raise ValueError(f"`document` must be left out: each record of {kind} files is a document.")

    def paths(self) -> list[Path]:
        """The files, sorted; raises `ValueError` if there are none, or for several formats or an unknown one."""
        found = []
        for name in [self.files] if isinstance(self.files, str) else self.files or []:
            path = Path(name).expanduser()
            if path.is_file():
                matches = [path]
            elif path.is_dir():
                matches = [x for x in path.rglob("*") if x.is_file() and x.suffix in FORMATS]
            else:
                root = path.anchor
                matches = [x for x in Path(root).glob(str(path.relative_to(root))) if x.is_file()]
            if not matches:
                raise ValueError(
                    f"`files` must be files, folders with {', '.join(FORMATS)} files, or globs: {name!r} finds none "
                    f"(from {Path.cwd()})."
                )
            found += matches
        found = sorted(set(found))
        if not found:
            raise ValueError("`files` must be files, folders or globs, got an empty list.")
        for path in found:
            if path.suffix not in FORMATS:
                raise ValueError(f"`files` must end in {', '.join(FORMATS)}, got {str(path)!r}.")
        formats = sorted({FORMATS[path.suffix] for path in found})
        if len(formats) > 1:
            raise ValueError(f"`files` must be of one format, got {formats}: choose by a glob such as 'texts/*.txt'.")
        return found


@dataclass(frozen=True)
class UsageRecipe:
    """Usage that the thresholds are driven to, see `UsageSchedule` and `parameter_groups`.

    Attributes:
        target: fraction of tokens to keep, or one per hybrid layer. Default: the configuration's `target_kv_usage`,
            which may hold them. With the `threshold_scope` "model" and an importance of the heads (`ham-hf
            calibrate`) the thresholds of a converted model start where heads share the target by importance.
        schedule: pairs of a step and a target instead, with straight lines between. Heads share its first target;
            where that is 1.0, all start alike.
        freeze_steps: number of first steps during which thresholds are held.
        threshold_learning_rate: rate of the thresholds, which no warm-up and no decay changes.
        router_learning_rate: rate of learned routers. Default: as everything else.
    """

    target: float | list[float] | None = None
    schedule: list[Any] | None = None
    freeze_steps: int = 0
    threshold_learning_rate: float = 0.2
    router_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.schedule is not None:
            raise ValueError("must have at most one of `target` and `schedule`.")
        at_least("threshold_learning_rate", self.threshold_learning_rate, 0)
        at_least("router_learning_rate", self.router_learning_rate, 0)
        if self.schedule is not None or self.target is not None:
            self.usage_schedule(0.5)
        at_least("freeze_steps", self.freeze_steps, 0)

    def usage_schedule(self, default: float | list[float]) -> UsageSchedule:
        """The schedule, of `default` if neither target nor schedule is given; errors use the recipe's keys."""
        if self.schedule is not None:
            try:
                return UsageSchedule(tuple(self.schedule), self.freeze_steps)
            except (TypeError, ValueError) as error:
                message = str(error).replace("`points`", "`schedule`").replace("`target_kv_usage`", "`schedule`")
                raise type(error)(message) from None
        try:
            return UsageSchedule(((0, default if self.target is None else self.target),), self.freeze_steps)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("`target_kv_usage`", "`target`")) from None


@dataclass(frozen=True)
class DistillationRecipe:
    """Distillation of a converted model's source into it, see `distillation_loss` and `open_gates`.

    Attributes:
        teacher: folder or name on the Hub of the source; may be left out if `weight` is 0.
        weight: share of the divergence from the teacher in the loss; the next-token loss has the rest.
        temperature: divisor of the logits of both.
        open_gates: bias from which training opens the gates that conversion left shut; null leaves them. With a
            section `transfer`, that opens them.
        added_learning_rate: rate of what conversion added to the source: the new memory, the gates, the router.
            Default: as everything else.
    """

    teacher: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    open_gates: float | None = -2.0
    added_learning_rate: float | None = None

    def __post_init__(self) -> None:
        at_least("added_learning_rate", self.added_learning_rate, 0)
        check_mixture(self.weight, self.temperature)
        if self.open_gates is not None:
            check_bias(self.open_gates, "open_gates")
        if self.teacher is None and self.weight > 0:
            raise ValueError("must have a `teacher`, or a `weight` of 0.")


@dataclass(frozen=True)
class TransferRecipe:
    """Layer-wise transfer before the training itself, see `ham_hf.training.transfer`.

    Attributes:
        steps: updates, of as many rows as those of the training.
        usage: fraction of tokens that the layers keep.
        learning_rate: rate at first, which falls to 0 along a half cosine; thresholds have that of `usage`.
        open_gates: bias from which the gates that conversion left shut are opened.
        train: `"added"` trains what conversion added to each layer's mixer, `"mixer"` all of the mixer.
    """

    steps: int
    usage: float = 0.25
    learning_rate: float = 1e-3
    open_gates: float = -1.0
    train: str = "added"

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        if not 0 <= self.usage <= 1:
            raise ValueError(f"`usage` must be a fraction from 0 to 1, got {self.usage}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}.")
        check_bias(self.open_gates, "open_gates")
        if self.train not in TRAINED:
            raise ValueError(f"`train` must be one of {TRAINED}, got {self.train!r}.")


@dataclass(frozen=True)
class LoraRecipe:
    """Adapters of low rank that are trained in place of the weights, see peft's `LoraConfig`.

    Attributes:
        rank: rank of an adapter's two matrices.
        alpha: an adapter's output is multiplied by `alpha / rank`.
        dropout: part of an adapter's inputs that training leaves out.
        target_modules: modules with an adapter: `"all-linear"` is every projection but the head, including those of
            the RNN and of a learned router; or ends of names in a list, or a regular expression for whole names.
        merge: write the model with the adapters added to its weights; otherwise the adapters alone, as peft does.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    merge: bool = True

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"`alpha` must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout}.")
        if not self.target_modules:
            raise ValueError("`target_modules` must name at least one module, or be 'all-linear', got none.")


@dataclass(frozen=True)
class EvaluationRecipe:
    """Evaluations of loss and kept fraction during training.

    Attributes:
        every: steps between evaluations; the last step has one, too.
        rows: number of rows of `context` tokens.
        data: other text, of the same keys as `data`. Default: the first `rows` rows of `data`, which are then not
            trained on.
        usages: fractions to keep; thresholds are chosen by score quantiles measured on some of the training rows.
        thresholds: thresholds to set for all layers.
    """

    every: int = 500
    rows: int = 16
    data: DataRecipe | None = None
    usages: list[float] = field(default_factory=lambda: [1.0, 0.25])
    thresholds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("every", self.every, 1)
        at_least("rows", self.rows, 1)
        for usage in self.usages:
            if not 0 <= usage <= 1:
                raise ValueError(f"`usages` must be fractions from 0 to 1, got {usage}.")
        for threshold in self.thresholds:
            if math.isnan(threshold):
                raise ValueError("`thresholds` must be numbers, got NaN.")


@dataclass(frozen=True)
class TrainRecipe:
    """Everything that determines a training, except the number of processes.

    Attributes:
        output: folder of the run: checkpoints, log.jsonl, and at the end `model`.
        model: the model to train.
        data: the text to train on.
        steps: updates of the whole model; may be 0 beside `transfer`.
        context: tokens in a row; documents are packed into rows.
        seed: seed of the new weights and of the order of rows.
        usage: target usage. Beside adapters, thresholds learn if a target or a schedule is given.
        transfer: layer-wise transfer of a converted model's source, before everything else.
        distillation: distillation of a converted model's source.
        lora: adapters that are trained in place of all weights. Default: all weights are trained.
        evaluation: measurements during training.
        trainer: fields of Transformers' `TrainingArguments`.
    """

    output: str
    model: ModelRecipe
    data: DataRecipe
    steps: int
    context: int = 1024
    seed: int = 0
    usage: UsageRecipe = field(default_factory=UsageRecipe)
    transfer: TransferRecipe | None = None
    distillation: DistillationRecipe | None = None
    lora: LoraRecipe | None = None
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1 if self.transfer is None else 0)
        at_least("context", self.context, 2)
        at_least("seed", self.seed, 0)
        if self.usage.freeze_steps > self.steps:
            raise ValueError(
                f"`usage: freeze_steps` must be at most `steps` ({self.steps}), got {self.usage.freeze_steps}."
            )
        for step, _ in self.usage.schedule or []:
            if step > self.steps:
                raise ValueError(f"`usage: schedule` must end within `steps` ({self.steps}), got a point at {step}.")
        if self.transfer is not None:
            self._check_transfer()
        if self.lora is not None:
            self._check_lora(self.lora)
        self._check_trainer()

    @property
    def thresholds_learn(self) -> bool:
        """True if thresholds are trained: always with all weights, beside adapters only with a target or schedule."""
        return self.lora is None or self.usage.target is not None or self.usage.schedule is not None

    def _check_transfer(self) -> None:
        if self.model.from_ is None:
            raise ValueError("`transfer` must have `model: from`, a converted checkpoint, got `model: new`.")
        if self.lora is not None:
            raise ValueError(
                "`lora` must be left out beside `transfer`, which trains weights: take the model of a recipe with "
                "`transfer` and `steps: 0` as `model: from`."
            )
        if self.distillation is not None and self.distillation.open_gates not in (None, DistillationRecipe.open_gates):
            raise ValueError(
                "`distillation: open_gates` must be left out beside `transfer`, which has an `open_gates` of its own, "
                f"got {self.distillation.open_gates}."
            )

    def _check_lora(self, lora: LoraRecipe) -> None:
        if self.model.from_ is None:
            raise ValueError("`lora` must have `model: from`, a checkpoint to adapt, got `model: new`.")
        opened = self.distillation is not None and self.distillation.open_gates is not None
        if opened and not lora.merge:
            raise ValueError(
                "`lora: merge` must be true where `distillation: open_gates` is not null, got false: what peft saves "
                "of an adapter cannot hold the opened gates."
            )
        if self.thresholds_learn and not lora.merge:
            raise ValueError(
                "`lora: merge` must be true where `usage` has a `target` or a `schedule`, got false: thresholds learn "
                "then, and what peft saves of an adapter cannot hold them."
            )
        if not self.thresholds_learn and replace(self.usage, router_learning_rate=None) != UsageRecipe():
            raise ValueError(
                "`usage` must have a `target` or a `schedule` beside `freeze_steps` and `threshold_learning_rate`, "
                "got neither: with `lora` thresholds are held then."
            )

    def _check_trainer(self) -> None:
        hints = typing.get_type_hints(TrainingArguments)
        known = [x.name for x in dataclasses.fields(TrainingArguments) if x.init]
        for key, value in self.trainer.items():
            if key in OWN_KEYS:
                raise ValueError(f"`trainer: {key}` must be left out: it is set by `{OWN_KEYS[key]}`.")
            if key in SETTLED:
                raise ValueError(f"`trainer: {key}` must be left out: this training settles it.")
            if key not in known:
                open_keys = set(known) - OWN_KEYS.keys() - SETTLED
                raise ValueError(unknown_key("trainer", key, open_keys))
            if not _matches(value, hints[key]):
                raise TypeError(f"`trainer: {key}` must be {_describe(hints[key])}, got {value!r}.")
        for key in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
        ):
            if self.trainer.get(key, 1) <= 0:
                raise ValueError(f"`trainer: {key}` must be above 0, got {self.trainer[key]}.")
        schedule = self.trainer.get("lr_scheduler_type")
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`trainer: lr_scheduler_type` must be a schedule that depends on the step alone, got {schedule!r}, "
                "which would lower the thresholds' rate, too."
            )
        for key in ("learning_rate", "weight_decay", "max_grad_norm"):
            at_least(f"trainer: {key}", self.trainer.get(key), 0)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values under the YAML's keys; defaults are written out, absent sections are not."""
        plain = dataclasses.asdict(self)
        plain["model"]["from"] = plain["model"].pop("from_")
        for section in ("transfer", "lora"):
            if plain[section] is None:
                del plain[section]
        return plain | {"trainer": TRAINER_DEFAULTS | self.trainer}


def read_recipe(path: str | Path) -> TrainRecipe:
    """Reads a recipe from YAML.

    Raises:
        OSError: if the file cannot be read.
        TypeError, ValueError: if it is not YAML, and for keys and values that a recipe does not take.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = RecipeLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return read_section(TrainRecipe, content, "")


def unknown_key(section: str, key: Any, known: Iterable[str]) -> str:
    """Message that a section has no such key, with the nearest key or all keys."""
    near = difflib.get_close_matches(str(key), known := sorted(known), n=1)
    takes = f"did you mean `{near[0]}`?" if near else f"takes {', '.join(known)}."
    return f"{f'`{section}`' if section else 'The recipe'} has no key `{key}`: {takes}"


def check_config_keys(section: str, keys: Iterable[Any]) -> None:
    """Raises `ValueError` for keys that are not fields of HAMConfig, which itself takes any keyword."""
    known = [x.name for x in dataclasses.fields(HAMConfig) if not x.name.startswith("_")]
    for key in keys:
        if key not in known:
            raise ValueError(unknown_key(section, key, known))


def read_section(kind: type[Section], content: Any, where: str) -> Section:
    """Builds a dataclass from YAML values; `TypeError` and `ValueError` name the key that is wrong."""
    name = f"`{where}`" if where else "The recipe"
    hints = typing.get_type_hints(kind)
    fields = {x.name.rstrip("_"): x for x in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(content, dict):
        raise TypeError(f"{name} must hold keys with values ({', '.join(fields)}), got {content!r}.")
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise ValueError(unknown_key(where, key, fields))
        path = f"{where}: {key}" if where else key
        hint = hints[fields[key].name]
        section = next((x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)), None)
        if section is not None and (value is not None or section is LoraRecipe):  # `lora:` alone would train all
            value = read_section(section, value, path)  # type: ignore[arg-type]
        elif not _matches(value, hint):
            raise TypeError(f"`{path}` must be {_describe(hint)}, got {value!r}.")
        values[fields[key].name] = value
    for key, x in fields.items():
        required = x.default is dataclasses.MISSING and x.default_factory is dataclasses.MISSING
        if required and x.name not in values:
            raise ValueError(f"{name} must have the key `{key}`, {_describe(hints[x.name])}.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{where}`: {error}" if where and f"`{where}" not in str(error) else str(error)) from None


def _matches(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_matches(value, x) for x in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (list, tuple):
        return isinstance(value, list) and all(_matches(x, typing.get_args(hint)[0]) for x in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    """Describes a type in YAML's words."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(x) for x in typing.get_args(hint) if x is not types.NoneType)
    if typing.get_origin(hint) in (list, tuple):
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "a section of keys with values"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "pairs"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def at_least(name: str, value: float | None, least: int) -> None:
    """Raises `ValueError` for a number that is smaller, or infinite."""
    if value is not None and not least <= value < math.inf:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
