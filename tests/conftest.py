# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures for every room: a small configuration, deterministic random numbers, and other people's processes."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter, which must be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import ham_hf
from ham_hf import HAMConfig, attention_ham, delta_rule_ham, ops_ham, prefix_attention_ham

# An assertion that fails in a helper then tells as much as one in a test.
pytest.register_assert_rewrite(
    "tests.cache.caches",
    "tests.cli.calls",
    "tests.model.bad_input.refusals",
    "tests.model.exactness.calls",
    "tests.model.transformers_contract.generation",
    "tests.ops.comparison",
    "tests.ops.inputs",
)

# An editable install may sit in `sys.meta_path` or on `sys.path`; this comes before both.
HIDE_THE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ham_hf", "ham_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spares the collector of garbage the modules and the tests, which are millions of objects.

    Otherwise it looks at them again and again while they are made, and a second long whenever Trainer calls it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def choose_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that has every operation ask `choose(op, *tensors)` for its kernel."""

    def choose_by(choose: Callable[..., Any], patch: pytest.MonkeyPatch = monkeypatch) -> None:
        for module in (ops_ham, delta_rule_ham, attention_ham, prefix_attention_ham):
            patch.setattr(module, "kernel_for", choose)

    return choose_by


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., HAMConfig]:
    """A function that makes the configuration of a model small enough to run thousands of times; overrides by name."""

    def make(**overrides) -> HAMConfig:
        settings = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": 0,
        }
        return HAMConfig(**(settings | overrides))

    return make


@pytest.fixture(scope="session")
def code_files() -> set[str]:
    """The files of `ham_hf` that travel with a checkpoint as remote code."""
    return {path.name for path in Path(ham_hf.__file__).parent.glob("*_ham.py")}


@pytest.fixture(scope="session")
def run_program(tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that runs a program in a process of its own, which is forked by `warm_process.py`.

    It runs in `folder` with the `environment`, and nobody who answers questions.
    """
    home = tmp_path_factory.mktemp("warm_process")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-P", Path(__file__).with_name("warm_process.py")],
            cwd=home,
            env=clean,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):

        def run(
            program: str, *arguments: str | Path, folder: Path, environment: dict[str, str], timeout: int = 300
        ) -> subprocess.CompletedProcess[str]:
            out, err = (Path(tempfile.mkstemp(dir=home)[1]) for _ in range(2))
            job = {"program": program, "arguments": [*map(str, arguments)], "timeout": timeout}
            job |= {"folder": str(folder), "environment": environment, "stdout": str(out), "stderr": str(err)}
            print(json.dumps(job), file=process.stdin, flush=True)
            code = process.stdout.readline()
            assert code, (home / "log").read_text()
            return subprocess.CompletedProcess(program, int(code), out.read_text(), err.read_text())

        yield run


@pytest.fixture(scope="session")
def run_python(run_program) -> Callable[..., Any]:
    """A function that runs a program in a process of its own and returns what it printed last, a line of JSON.

    It runs in `folder` with a Hugging Face home of its own, nobody who answers questions, and no `ham_hf` unless
    `package=True`. Other keywords are environment variables.
    """

    def run(folder: Path, program: str, *arguments: str | Path, package: bool = False, **environment: str) -> Any:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        own = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if package:
            own["PYTHONPATH"] = str(Path(ham_hf.__file__).parents[1])
        program = ("" if package else HIDE_THE_PACKAGE) + program
        result = run_program(program, *arguments, folder=folder, environment=inherited | own | environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run
