# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Sources of a model card beside the checkpoint: JSON files, checked field by field, and sections of prose."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

# File in which a conversion records itself.
RECORD = "conversion.json"
# Prose that no measurement supplies, one Markdown file each.
SECTIONS = ("summary", "data", "recipe", "results", "limits")
# Kinds of a JSON file's fields: a type, a list of one kind, or an object with fields of its own.
NUMBER = int | float
# The licence in the Hub's metadata: a licence that the Hub does not know, "other", also has a name and a link.
LICENCE_FIELDS = ("license", "license_name", "license_link")
METADATA_FIELDS = {
    "name": str,
    "language": [str],
    **dict.fromkeys(LICENCE_FIELDS, str),
    "datasets": [str],
    "tags": [str],
    "evaluation": {"dataset": str, "type": str, "split": str},
}
RESULT_FIELDS = {
    "kv_usage": NUMBER | None,
    "usage": NUMBER,
    "loss": NUMBER,
    "losses": [NUMBER],
    "recall_loss": NUMBER,
    "kv_bytes": int,
    "full_kv_bytes": int,
    "state_bytes": int,
}
USAGE_FIELDS = {"context": int, "results": [RESULT_FIELDS]}
# Files written before there was `ham-hf evaluate` lack these.
NEWER_RESULT_FIELDS = {
    "threshold": NUMBER | None,
    "kv_budget": int | None,
    "held": NUMBER,
    "first_loss": NUMBER | None,
    "repeated_loss": NUMBER | None,
    "losses_by_part": [NUMBER],
}
ALL_USAGE_FIELDS = {"context": int, "results": [RESULT_FIELDS | NEWER_RESULT_FIELDS]}
CONVERSION_FIELDS = {
    "source": {"name": str, "commit": str | None, "model_type": str, "architecture": str},
    "script": str,
    "command": str,
    "date": str,
    "verification": dict | None,
    "notes": [str],
}
VERIFICATION_FIELDS = {
    "tokens": int,
    "dtype": str,
    "max_abs_logit_error": NUMBER,
    "mean_abs_logit_error": NUMBER,
    "top1_agreement": NUMBER,
    "tolerance": NUMBER,
    "source_code": str,
}


# Deepest nesting of a metadata file. Python follows a thousand calls, several for each level.
DEEPEST = 100


class Sources(NamedTuple):
    """Texts and measurements about a checkpoint beside its own files.

    Attributes:
        metadata: the fields of card.json, any of which may be missing.
        sections: the Markdown of every section in `SECTIONS`, empty if there is no file.
        usage: usage.json, as `ham-hf evaluate` writes it, or `None`.
        plot: the path of usage.png, or `None`.
    """

    metadata: dict[str, Any]
    sections: dict[str, str]
    usage: dict[str, Any] | None
    plot: Path | None


def check_depth(where: str, content: Any) -> None:
    """Raises `ValueError`, naming `where`, for dictionaries and lists nested more than `DEEPEST` deep."""
    level = [content]
    for _ in range(DEEPEST):
        level = [y for x in level if isinstance(x, dict | list) for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ValueError(f"{where} is nested more than {DEEPEST} deep.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `ValueError` if it holds something else, or is nested too deep."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested more than {DEEPEST} deep.") from None
    check_depth(str(path), content)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def check_content(where: str, value: Any, kind: Any, all_fields: bool = True, no_others: bool = True) -> None:
    """Raises `ValueError`, naming `where`, unless `value` is of a kind as the constants above describe it.

    By default objects must have `all_fields` and `no_others`.
    """
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {value!r}.")
        unknown, missing = sorted(set(value) - set(kind)), sorted(set(kind) - set(value))
        if (unknown and no_others) or (missing and all_fields):
            raise ValueError(f"{where} takes the fields {sorted(kind)}, got {sorted(value)}.")
        for name in kind.keys() & value.keys():
            check_content(f"{where}: `{name}`", value[name], kind[name], all_fields, no_others)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}.")
        for i, content in enumerate(value):
            check_content(f"{where}[{i}]", content, kind[0], all_fields, no_others)
    elif (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ValueError(f"{where} must be of type {getattr(kind, '__name__', kind)}, got {value!r}.")


def read_sources(folder: Path) -> Sources:
    """Reads card.json, the sections, usage.json and the path of usage.png in `folder`, each of which may be missing.

    Raises:
        ValueError: if `folder` is not a folder, or a file in it is invalid.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, got {str(folder)!r}.")
    metadata = {}
    if (folder / "card.json").is_file():
        metadata = read_json(folder / "card.json")
        check_content(str(folder / "card.json"), metadata, METADATA_FIELDS, all_fields=False)
    sections = {}
    for name in SECTIONS:
        path = folder / f"{name}.md"
        sections[name] = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    usage = read_usage(folder / "usage.json") if (folder / "usage.json").is_file() else None
    plot = folder / "usage.png"
    return Sources(metadata, sections, usage, plot if plot.is_file() else None)


def read_usage(path: Path) -> dict[str, Any]:
    """Reads a file of `ham-hf evaluate`; raises `ValueError` if it is something else."""
    usage = read_json(path)
    check_content(str(path), usage, USAGE_FIELDS, no_others=False)
    check_content(str(path), usage, ALL_USAGE_FIELDS, all_fields=False)
    if not any(x["kv_usage"] == 1 for x in usage["results"]):
        raise ValueError(f"{path} must hold a result with `kv_usage` 1.0, which the others are compared with.")
    windows = {len(x["losses"]) for x in usage["results"]}
    if len(windows) > 1 or 0 in windows:
        raise ValueError(f"{path} must hold as many `losses`, 1 or more, in every result, got {sorted(windows)}.")
    return usage


def read_conversion(folder: Path) -> dict[str, Any] | None:
    """The record of a conversion in conversion.json, or `None`; raises `ValueError` if it is something else."""
    path = folder / RECORD
    if not path.is_file():
        return None
    conversion = read_json(path)
    check_content(str(path), conversion, CONVERSION_FIELDS, no_others=False)
    if conversion["verification"] is not None:
        check_content(f"{path}: `verification`", conversion["verification"], VERIFICATION_FIELDS, no_others=False)
    return conversion
