# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Runs the jobs of a study file (a model, a task and a seed each), and appends each result to its part's file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ham_hf.files import append_row
from ham_hf.training.recipe import check_config_keys, read_section
from ham_hf.training.recipe_yaml import RecipeLoader

from ..rows import current_commit
from .fitting import Training
from .gradients import GRADIENTS
from .job import Job
from .language import LanguageTask, Texts, run_language
from .recall import RecallTask
from .recall_study import run_recall
from .results import result_file, results_by_name

STUDIES = Path(__file__).parent
PARTS = ("recall", "gradients", "routers", "repairs", "language", "selection")
# Parts whose models read text.
OF_TEXT = ("language", "selection")
# Parts whose models are told in one table, and compared where they share a task.
COMPARED = ("recall", "gradients", "routers")
PLAN_KEYS = {"seeds", "arms", "tasks", "model", "training", "usages"}


def read_study(name: str) -> dict[str, Any]:
    """Reads the study in a YAML file, or in this package's file of that name.

    Raises:
        ValueError: if it is not a study.
    """
    path = STUDIES / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(x.stem for x in STUDIES.glob("*.yaml")))
        raise ValueError(f"no file {name!r}, takes a YAML file or one of {known}")
    try:
        study = RecipeLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    if not isinstance(study, dict) or not isinstance(study.get("arms"), dict):
        raise ValueError(f"{name} must hold a mapping with `arms` and some of {', '.join(PARTS)}.")
    unknown = sorted(set(study) - {*PARTS, "arms"})
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}; takes arms, {', '.join(PARTS)}.")
    for part in parts_of(study):
        _check_plan(part, study[part], study["arms"])
    _check_compared({part: study[part] for part in COMPARED if part in study})
    return study


def _check_compared(plans: dict[str, Any]) -> None:
    """Refuses parts that cannot share a table, or that share a task and differ in more than their arms and seeds."""
    first, *others = plans.items() if plans else [("", {})]
    for part, plan in others:
        for key in ("pairs", "usages"):
            if plan[key] != first[1][key]:
                raise ValueError(f"`{part}.{key}` must be as in `{first[0]}`, {first[1][key]}, got {plan[key]}.")
    trained: dict[str, Any] = {}
    for part, plan in plans.items():
        for task, settings in plan["tasks"].items():
            own = settings, plan["model"], plan["training"]
            if trained.setdefault(task, own) != own:
                raise ValueError(
                    f"`{part}.tasks.{task}` must have the settings, model and training of the part before it; "
                    "or give the task another name."
                )


def _check_plan(part: str, plan: Any, arms: dict[str, Any]) -> None:
    """Refuses a part with missing or unknown keys, or with arms that the study does not define."""
    wanted = PLAN_KEYS if part in OF_TEXT else PLAN_KEYS | {"pairs"}
    if not isinstance(plan, dict) or set(plan) != wanted:
        found = sorted(plan) if isinstance(plan, dict) else plan
        raise ValueError(f"`{part}` must have the keys {sorted(wanted)}, got {found}.")
    if not isinstance(plan["seeds"], int) or plan["seeds"] < 1:
        raise ValueError(f"`{part}.seeds` must be a whole number of at least 1, got {plan['seeds']!r}.")
    for key in sorted(wanted & {"arms", "usages", "pairs"}):
        if not isinstance(plan[key], list) or not plan[key]:
            raise ValueError(f"`{part}.{key}` must be a list that is not empty, got {plan[key]!r}.")
    for key in ("tasks", "model", "training"):
        if not isinstance(plan[key], dict):
            raise ValueError(f"`{part}.{key}` must be a mapping, got {plan[key]!r}.")
    unknown = [arm for arm in plan["arms"] if not isinstance(arms.get(arm), dict)]
    if unknown:
        raise ValueError(f"`{part}.arms` names {unknown}, which `arms` does not define as a mapping.")
    check_config_keys(f"{part}.model", plan["model"])
    for arm in plan["arms"]:
        check_config_keys(f"arms.{arm}", arms[arm].keys() - {"gradient", "training", "oracle"})
        if part in OF_TEXT and "oracle" in arms[arm]:
            raise ValueError(f"`{part}.arms` must be without oracles, which know tasks of recall alone, got {arm!r}.")
        gradient = arms[arm].get("gradient")
        if gradient is not None and gradient not in GRADIENTS:
            raise ValueError(f"`arms.{arm}.gradient` must be one of {sorted(GRADIENTS)}, got {gradient!r}.")
        read_section(Training, plan["training"] | arms[arm].get("training", {}), f"{part}.training")
    for name, task in plan["tasks"].items():
        if part in OF_TEXT:
            read_section(LanguageTask, task, f"{part}.tasks.{name}")
        else:
            read_section(RecallTask, task, f"{part}.tasks.{name}").check_pairs(plan["pairs"])


def parts_of(study: dict[str, Any]) -> list[str]:
    """The parts of a study, in the order in which they run."""
    return [part for part in PARTS if part in study]


def jobs_of(study: dict[str, Any]) -> Iterator[Job]:
    """All jobs, part by part and seed by seed, so that an interrupted study has the same seeds of all models."""
    for part in parts_of(study):
        plan = study[part]
        for seed in range(plan["seeds"]):
            for task in plan["tasks"]:
                for arm in plan["arms"]:
                    yield Job(part, task, arm, seed, _settings(plan, task, dict(study["arms"][arm])))


def _settings(plan: dict[str, Any], task: str, arm: dict[str, Any]) -> dict[str, Any]:
    training = plan["training"] | arm.pop("training", {})
    gradient = arm.pop("gradient", "scaled_values")
    model = plan["model"] | arm
    if "layer_types" in model:
        # Given once for models of any depth: one kind of layer, or several in turn.
        kinds = model["layer_types"] if isinstance(model["layer_types"], list) else [model["layer_types"]]
        model["layer_types"] = [kinds[i % len(kinds)] for i in range(model["num_hidden_layers"])]
    # Only where there is one, as the stored results of other arms are without.
    oracle = {"oracle": True} if model.pop("oracle", False) else {}
    return oracle | {
        "model": model,
        "equal_to": plan["model"],
        "task": plan["tasks"][task],
        "training": training,
        "gradient": gradient,
        "usages": plan["usages"],
        "pairs": plan.get("pairs"),
    }


def run_job(job: Job, texts: Texts | None, device: str) -> dict[str, Any]:
    """Trains the model of a job and measures it; `texts` are for the parts `OF_TEXT`."""
    if job.part not in OF_TEXT:
        return run_recall(job, device)
    assert texts is not None
    return run_language(job, texts, device)


def run_study(jobs: list[Job], output: Path, texts: Texts | None, device: str) -> None:
    """Runs every job without a result in `output`; call `check_results` first to check the existing results."""
    output.mkdir(parents=True, exist_ok=True)
    done, commit = results_by_name(jobs, output), current_commit()
    missing = [job for job in jobs if job.name not in done]
    for job in tqdm(missing, initial=len(jobs) - len(missing), total=len(jobs), unit="model", desc="study"):
        result = {"part": job.part, "task": job.task, "arm": job.arm, "seed": job.seed}
        result |= {"commit": commit, "settings": job.settings}
        append_row(result_file(job.part, output), result | run_job(job, texts, device))
