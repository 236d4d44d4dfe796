# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Makes SmolLM2 a HAM, once: fetched, converted, calibrated, and kept in a folder of this checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub.constants import REPOCARD_NAME
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ham_hf import HAMForCausalLM
from ham_hf.cli.arguments import CommandError
from ham_hf.conversion.gguf import read_model
from ham_hf.evaluation import calibrate
from ham_hf.evaluation.importance import head_importance, stored_importance
from ham_hf.files import write_whole
from ham_hf.hub.card import build_card
from ham_hf.hub.checkpoint import read_checkpoint
from ham_hf.hub.sources import read_sources

from .fetch import fetch_gguf
from .texts import calibration_needles, calibration_windows

ROOT = Path(__file__).parents[2]
CONVERT = ROOT / "conversion_scripts" / "convert_transformer_to_ham.py"
CACHE = ROOT / "build" / "smollm2"
NAME = "SmolLM2-135M-Instruct"
# Before any training it loses least; see README.md in this folder.
ROUTER = "l2"


def checkpoint(cache: Path = CACHE) -> Path:
    """The folder of the calibrated HAM, made if it is not there.

    Raises:
        CommandError: if the source cannot be fetched or converted.
    """
    ham, converted = cache / "ham", cache / "converted"
    if ham.is_dir():
        return ham
    gguf = fetch_gguf(cache)
    if not converted.is_dir():
        print(f"Converting {NAME} to a HAM (a minute or two, once)", flush=True)
        convert(gguf, converted)
    print(
        "Calibrating kv_usage and the importance of heads on the help texts of Python (some minutes, once)", flush=True
    )
    save_calibrated(converted, ham)
    shutil.rmtree(converted)
    return ham


def convert(gguf: Path, output: Path) -> None:
    """Runs the script that converts, whose progress bars and errors show; it writes `output` whole or not at all."""
    command = [sys.executable, str(CONVERT), str(gguf), str(output), "--name", NAME]
    packages = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages)}
    # On stdout it tells what to do with the folder, which will have another place.
    result = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if result.returncode:
        raise CommandError(f"{CONVERT.name} could not convert {gguf}: its message is above")


def save_calibrated(converted: Path, output: Path) -> None:
    """Writes a converted HAM with score quantiles and importance of heads, whole or not at all."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(converted, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    model = HAMForCausalLM.from_pretrained(converted, dtype=torch.float32, router=ROUTER)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    calibrate(model, calibration_windows(tokenizer))
    importance = head_importance(model, calibration_needles(tokenizer), show_progress=True)
    model.config.head_importance = stored_importance(importance)
    model.save_pretrained(partial)
    write_whole(partial / "card.json", json.dumps({"license": "apache-2.0"}) + "\n")
    card = build_card(read_checkpoint(partial), read_sources(partial), NAME)
    write_whole(partial / REPOCARD_NAME, str(card))
    os.replace(partial, output)


def llama(cache: Path = CACHE) -> Path:
    """The folder of the source as a plain Llama, made if it is not there."""
    folder = cache / "llama"
    if not folder.exists():
        gguf = fetch_gguf(cache)
        settings = LlamaConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read_model(gguf.parent, gguf.name).state_dict())
        model.save_pretrained(folder.with_suffix(".partial"))
        folder.with_suffix(".partial").rename(folder)
    return folder
