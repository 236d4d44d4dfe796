# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures for the tests of training: programs that run in two processes."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainingArguments

import ham_hf


@pytest.fixture(scope="session")
def checkpointing() -> str:
    """Trainer's option to compute activations again, which was renamed after the oldest release that is supported."""
    names = "activation_checkpointing", "gradient_checkpointing"
    return next(name for name in names if hasattr(TrainingArguments, name))


@pytest.fixture(scope="session")
def launch() -> Callable[..., str]:
    """A function that runs a program, or `-m` and a module, in one process or in two, and returns what it printed.

    Two are started as `torchrun` does it, on a port that is free; keywords are environment variables.
    """

    def run(*command: str | Path, processes: int = 2, **environment: str) -> str:
        package = str(Path(ham_hf.__file__).parents[1])
        own = {
            # Behind what is there: another release of Transformers.
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), package])),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        for attempt in ("first", "second"):
            result = subprocess.run(
                [sys.executable, *(launcher if processes > 1 else []), *command],
                env=os.environ | own | environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=500,
            )
            # A process may die in PyTorch's own collectives over gloo, see `whole` in two_processes.py, by SIGSEGV or
            # SIGABRT. What our code gets wrong raises, or comes again.
            crashed = re.search(r"\(exitcode: -(6|11)\)", result.stderr)
            if attempt == "second" or not crashed:
                break
            warnings.warn(f"A process crashed, so {command} is launched again:\n{result.stderr}", stacklevel=2)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
