# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures for the tests of all conversion scripts: scripts as modules, random weights, comparison of checkpoints."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from ham_hf.conversion.command import main

SCRIPTS = Path(__file__).parents[2] / "conversion_scripts"


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """A function that imports a script by its name without the suffix."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def module(script) -> ModuleType:
    """The script of Llama, Mistral and Qwen; the tests of another name theirs."""
    return script("convert_transformer_to_ham")


@pytest.fixture
def convert(module) -> Callable[..., int]:
    """A function that runs the script and returns its exit status."""
    return lambda *arguments: main(module.CONVERSION, module.__doc__, [str(x) for x in arguments])


@pytest.fixture
def randomised() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """A function that gives every parameter of a model random values, so that no two of them could be swapped."""

    def randomise(model: torch.nn.Module) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if "norm" in name:
                    parameter.add_(0.2 * noise)
                elif parameter.ndim > 1:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                else:
                    parameter.copy_(0.3 * noise)
        return model.eval()

    return randomise


@pytest.fixture
def tensors_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """A function that reads every tensor of a folder of safetensors."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}

    return read
