# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf demo`: continues a built-in story at five cache sizes."""

import argparse
from typing import Any

from .arguments import add_command
from .generate import compare
from .models import add_model_arguments, calibrated, load

USAGES = (1.0, 0.5, 0.25, 0.1, 0.0)
THRESHOLDS = (0.0, 0.4, 0.5, 0.6, 2.0)


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "demo",
        "continue a built-in story while the cache shrinks",
        "Continues a built-in story at five cache sizes, from every token kept to none.",
    )
    add_model_arguments(parser, max_new_tokens=40)
    # A model this small repeats itself if it always takes the likeliest token.
    parser.set_defaults(execute=execute, temperature=0.7)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf demo`."""
    model, tokenizer = load(arguments)
    from ..inspection.demo_prompt import DEMO_INTRODUCTION, DEMO_PROMPT
    from ..inspection.runs import Setting

    settings = [Setting("threshold", x) for x in THRESHOLDS]
    if calibrated(model):
        settings = [Setting("kv_usage", x) for x in USAGES]
    print(f"{DEMO_INTRODUCTION}\n")
    compare(arguments, model, tokenizer, DEMO_PROMPT, settings, loss=True)
