# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checks the folder `kernels` against Hugging Face's kernel-builder, the package `kernels` and setuptools."""

import ast
import inspect
import json
import pathlib
import shutil
import sys
import tomllib

import pytest
import torch

pytest.importorskip("triton")

import ham_kernels

FOLDER = pathlib.Path(__file__).parents[2] / "kernels"
SOURCE = FOLDER / "torch-ext" / "ham_kernels"
# Packages that a Python kernel may import besides itself and the standard library.
IMPORTS = {"torch", "triton", "fla"}


def imported(file):
    """The top-level packages that a file imports, and the levels that its relative imports climb."""
    names, levels = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            levels.add(node.level)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names, levels


def test_the_project_is_a_kernel_of_python_files():
    settings = tomllib.loads((FOLDER / "build.toml").read_text())
    assert settings["general"]["name"].replace("-", "_") == SOURCE.name == ham_kernels.__name__
    assert "torch-noarch" in settings
    assert not (FOLDER / "__init__.py").exists(), "it would hide the package `kernels`"


def test_the_api_is_all_of_the_public_functions_and_the_card_names_them():
    public = {
        name for name, x in vars(ham_kernels).items() if inspect.isfunction(inspect.unwrap(x)) and name[0] != "_"
    }
    assert public | {"INTERFACE"} == set(ham_kernels.__all__)
    card = (FOLDER / "CARD.md").read_text()
    for name in public - {"check_platform", "platform_problem"}:
        assert f"`{name}`" in card


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_kernel_imports_itself_relatively_and_little_else(file):
    names, levels = imported(file)
    assert names - set(sys.stdlib_module_names) <= IMPORTS
    assert max(levels, default=0) <= len(file.relative_to(SOURCE).parts)


def test_setuptools_packs_every_folder():
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = setuptools.find_packages(str(SOURCE.parent), include=settings["include"])
    folders = {file.parent.relative_to(SOURCE.parent) for file in SOURCE.rglob("*.py")}
    assert set(found) == {".".join(folder.parts) for folder in folders}


def test_the_package_kernels_reads_and_loads_the_folder(tmp_path):
    # Not `kernels` itself: without the package, that name finds this repository's folder.
    pytest.importorskip("kernels._rust", reason="the package `kernels` is not installed")
    from kernels._rust import Build

    import kernels

    Build.open(FOLDER)  # raises an error if kernel-builder would refuse it
    # kernel-builder writes one folder per backend for a kernel of Python files.
    backend = "cuda" if torch.version.cuda else "cpu"
    variant = tmp_path / "build" / f"torch-{backend}"
    shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {"id": f"_ham_kernels_{backend}_test", "name": "ham-kernels", "version": 1, "python-depends": []}
    metadata |= {"license": "Apache-2.0", "backend": {"type": backend}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    loaded = kernels.get_local_kernel(tmp_path)
    assert loaded is not ham_kernels
    assert sorted(loaded.__all__) == sorted(ham_kernels.__all__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep = torch.tensor([True, False, True], device=device).view(1, 3, 1)
    (kept,), before = loaded.compact_kept(keep, torch.arange(3.0, device=device).view(1, 3, 1, 1))
    assert kept.flatten().tolist() == [0.0, 2.0]
    assert before.flatten().tolist() == [0, 1, 1]
