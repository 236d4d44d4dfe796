# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf train`: trains a model by a recipe, or resumes its training."""

import argparse
import os
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_command, failing_as
from .libraries import import_transformers

EXAMPLES = """\
examples:
  ham-hf train recipe.yaml
  accelerate launch --num_processes 2 -m ham_hf.cli train recipe.yaml   (two GPUs)
  torchrun --nproc-per-node 2 -m ham_hf.cli train recipe.yaml           (two processes on a CPU, with use_cpu: true)

Run it again to resume an interrupted training. A recipe to start from: ham_hf/training/examples/small.yaml
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "train",
        "train a model by a recipe, or resume its training",
        "Trains a HAM by the recipe in a YAML file, in one process or, under accelerate, in several.",
        EXAMPLES,
    )
    help_text = "YAML file; its keys are those of ham_hf.training.recipe"
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help=help_text)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf train`."""
    if not arguments.recipe.is_file():
        raise CommandError(f"argument RECIPE: there is no file {arguments.recipe}, takes a YAML file")
    import_transformers()
    import datasets

    from ..training.recipe import read_recipe
    from ..training.train import train

    datasets.disable_progress_bars()
    with failing_as(f"argument RECIPE: {arguments.recipe}", width=400):
        recipe = read_recipe(arguments.recipe)
        trained = train(recipe)
    if os.environ.get("RANK", "0") != "0":
        return
    if trained is None:
        print(f"Stopped and saved in {recipe.output}. The same command goes on from there.")
        raise KeyboardInterrupt
    print(f"The trained model is in {trained}")
