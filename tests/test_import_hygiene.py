# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Holds files that travel with a checkpoint to few imports, and the package to no experiment and no result."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages
from transformers.dynamic_module_utils import get_relative_import_files

import ham_hf

PACKAGE = Path(ham_hf.__file__).parent
ROOT = Path(__file__).parents[1]
FLAT = {path.stem: path for path in PACKAGE.glob("*_ham.py")}
# What whoever loads a checkpoint has installed.
REQUIRED = {"torch", "transformers", "huggingface_hub", "safetensors"}


def optional_imports(tree):
    """The import statements inside a top-level `try: ... except ImportError`."""
    attempts = [
        statement
        for statement in tree.body
        if isinstance(statement, ast.Try)
        and all(isinstance(x.type, ast.Name) and x.type.id == "ImportError" for x in statement.handlers)
    ]
    return {node for attempt in attempts for statement in attempt.body for node in ast.walk(statement)}


def problems(text, siblings):
    """Faults of a file with this text and these siblings, once it is saved and loaded beside a checkpoint."""
    tree = ast.parse(text)
    optional = optional_imports(tree)
    relative_lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative_lines.add(node.lineno)
            if node.level > 1:
                yield f"line {node.lineno}: climbs above the folder"
            elif node.module is None:
                yield f"line {node.lineno}: `from . import` names no file"
            elif "." in node.module:
                yield f"line {node.lineno}: reaches into a package"
            elif node.module not in siblings:
                yield f"line {node.lineno}: no such sibling"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            foreign = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - REQUIRED
            if foreign and node not in optional:
                yield f"line {node.lineno}: needs {foreign}"
    read_by_transformers = {
        number for number, line in enumerate(text.splitlines(), 1) if re.match(r"\s*from\s+\.\S+\s+import", line)
    }
    for number in relative_lines - read_by_transformers:
        yield f"line {number}: an import that Transformers does not see"
    for number in read_by_transformers - relative_lines:
        yield f"line {number}: text that Transformers takes for an import"


@pytest.mark.parametrize("name", sorted(FLAT))
def test_a_file_survives_being_copied(name):
    assert not list(problems(FLAT[name].read_text(encoding="utf-8"), set(FLAT)))


@pytest.mark.parametrize("start", ["configuration_ham", "modeling_ham"])
def test_transformers_finds_every_file_that_is_needed_and_no_other(start, code_files):
    found = {Path(file).name for file in get_relative_import_files(FLAT[start])}
    assert found | {f"{start}.py"} == code_files


@pytest.mark.parametrize(
    ("violation", "problem"),
    [
        ("from . import cache_ham", "names no file"),
        ("from .. import cache_ham", "climbs"),
        ("from ..cache_ham import HAMCache", "climbs"),
        ("from .training.documents import read", "reaches into a package"),
        ("from .files import write_whole", "no such sibling"),
        ("if sys: from .cache_ham import HAMCache", "does not see"),
        ("import sys; from .cache_ham import HAMCache", "does not see"),
        ('def f():\n    """Instead of a local copy,\n    from .cache_ham import HAMCache."""', "takes for an import"),
        ("import ham_hf", "needs {'ham_hf'}"),
        ("import torch, numpy.linalg", "needs {'numpy'}"),
        ("from einops import rearrange", "needs {'einops'}"),
        ("def f():\n    import fla", "needs {'fla'}"),
        ("try:\n    import fla\nexcept Exception:\n    fla = None", "needs {'fla'}"),
        ("try:\n    import fla\nexcept:\n    fla = None", "needs {'fla'}"),
        ("try:\n    pass\nexcept ImportError:\n    import fla", "needs {'fla'}"),
        ("if sys:\n    try:\n        import fla\n    except ImportError:\n        fla = None", "needs {'fla'}"),
    ],
)
def test_a_violation_is_found(violation, problem):
    found = list(problems(f'"""A file."""\n\n{violation}\n', {"cache_ham"}))
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    "text",
    [
        "import os.path\nfrom collections.abc import Callable",
        "import torch.nn.functional as F\nfrom transformers.cache_utils import Cache",
        "from .cache_ham import HAMCache",
        "def f():\n    from .cache_ham import HAMCache",
        "if sys:\n    from .cache_ham import HAMCache",
        "from .cache_ham import (\n    HAMCache,\n)",
        "try:\n    import fla\n    from fla.ops import f\nexcept ImportError:\n    fla = None",
        "# from .cache_ham import HAMCache, as a comment",
    ],
)
def test_what_is_allowed_passes(text):
    assert not list(problems(text, {"cache_ham"}))


def imported_packages(tree):
    """The first parts of the names that a file imports from outside its own package, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_the_packages_import_no_experiment():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels/torch-ext").rglob("*.py")]
    assert len(files) > 50
    for path in files:
        assert "model_cards" not in imported_packages(ast.parse(path.read_text(encoding="utf-8"))), path
    found = set(imported_packages(ast.parse("def f():\n    from model_cards.study import report")))
    assert found == {"model_cards"}, "an import in a function counts"


def test_the_wheel_holds_no_experiment_and_no_result():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    find = settings["packages"]["find"]
    packages = {x for folder in find["where"] for x in find_packages(str(ROOT / folder), include=find["include"])}
    assert {x.partition(".")[0] for x in packages} == {"ham_hf", "ham_kernels"}
    data = {path for pattern in settings["package-data"]["ham_hf"] for path in PACKAGE.glob(pattern) if path.is_file()}
    assert data
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files -= set(PACKAGE.rglob("README.md"))  # pages of the repository
    code = {path for path in files if path.suffix == ".py"}
    assert files == code | data, "a file that is neither code nor data of the wheel"
    assert not [path for path in data if path.suffix in (".jsonl", ".png", ".csv")]
