# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fixtures for the tests of training: programs that run in two processes, and a converted Llama to heal."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import ham_hf
from ham_hf.conversion.command import main
from model_cards.ham_tiny.tokenizer import train_tokenizer

CONVERT = Path(__file__).parents[2] / "conversion_scripts" / "convert_transformer_to_ham.py"
WORDS = "the sea was calm and the captain spoke of home while his men slept below in the dark".split()


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


@pytest.fixture(scope="session")
def convert_llama() -> Callable[..., None]:
    """A function that fills a folder with a random Llama with its tokenizer (`source`), its HAM, and text."""

    def convert(folder: Path, *options: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "source")
        train_tokenizer([" ".join(WORDS)] * 20, 300).save_pretrained(folder / "source")
        spec = importlib.util.spec_from_file_location("convert", CONVERT)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        paths = [str(folder / x) for x in ("source", "converted")]
        assert main(script.CONVERSION, script.__doc__, [*paths, *options]) == 0
        picks = torch.randint(len(WORDS), (40, 60)).tolist()
        (folder / "text.jsonl").write_text(
            "".join(json.dumps({"text": " ".join(WORDS[j] for j in x)}) + "\n" for x in picks)
        )

    return convert
