# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Skips this folder where vLLM is not installed, and starts engines in the test's process."""

import gc
import importlib.util
import os

import pytest
import torch

NEEDS = "needs vLLM, which has an environment of its own: make test-vllm"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
INSTALLED = importlib.util.find_spec("vllm") is not None
if INSTALLED:
    # vLLM reads some of them when it is imported.
    os.environ.update(ENVIRONMENT)


class WithoutVLLM(pytest.Module):
    """A file of tests none of which can be imported."""

    def collect(self):
        pytest.skip(NEEDS, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return None if INSTALLED else WithoutVLLM.from_parent(parent, path=module_path)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Makes an engine for a model; the one before it in the module ends."""
    from tests.serving.vllm.engine import Engine

    running: list[Engine] = []

    def start(model, **options):
        stop()
        running.append(Engine(model, tmp_path_factory.mktemp("model"), **options))
        return running[-1]

    def stop():
        while running:
            running.pop().stop()
        gc.collect()

    yield start
    stop()
    torch.set_default_dtype(torch.float32)
