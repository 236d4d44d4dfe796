# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""A process that has imported PyTorch and what takes as long, and forks for every program that it is to run.

`run_program` in `conftest.py` starts it and writes the programs, each a line of JSON; it answers with exit codes. A
program finds nothing of Hugging Face imported, whose packages read the environment when they are imported.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import types
from typing import Any

SLOW = [
    "torch._dynamo",
    "torch._inductor.decomposition",
    "torch.distributed.fsdp",
    "scipy.optimize",
    "sklearn.metrics",
    "torchao.quantization",
]
NOT_YET = {"accelerate", "ham_hf", "ham_kernels", "huggingface_hub", "transformers"}


def run(job: dict[str, Any]) -> None:
    """Runs the program as `python -P -c` would, in this process; its output goes to the files stdout and stderr."""
    signal.alarm(job["timeout"])
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, name in enumerate([os.devnull, job["stdout"], job["stderr"]]):
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.path[:0] = filter(None, job["environment"].get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["-c", *job["arguments"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(job["program"], "<string>", "exec"), vars(main))


def next_job() -> dict[str, Any] | None:
    """The next job for a fork of this process; None after the last."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    for name in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    early = NOT_YET & sys.modules.keys()
    assert not early, f"{early} should be imported by programs"
    job = next_job()
    if job is not None:
        run(job)
