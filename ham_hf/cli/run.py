# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf run`: runs another package's command in a process whose Auto classes know HAM."""

import argparse
import sys
from importlib.metadata import entry_points
from typing import Any

from .arguments import CommandError, add_command

EXAMPLES = """\
examples:
  ham-hf run lm_eval --model hf --model_args pretrained=path/to/checkpoint,threshold=0.3 --tasks lambada_openai
  ham-hf run transformers serve path/to/checkpoint --port 8000
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "run",
        "run another package's command with HAM known to Transformers",
        "Runs the command of another installed package in a process whose Auto classes know HAM.",
        EXAMPLES,
    )
    parser.add_argument("tool", metavar="TOOL", help="name of the command, such as lm_eval or transformers")
    parser.add_argument("tool_arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf run`."""
    commands = entry_points(group="console_scripts", name=arguments.tool)
    if not commands:
        raise CommandError(
            f"argument TOOL: no installed package has a command {arguments.tool!r}, takes one such as lm_eval or "
            "transformers"
        )
    # Nothing is silenced here: the other command's output belongs to its user.
    from ..auto_classes import HAMForCausalLM

    sys.argv = [arguments.tool, *arguments.tool_arguments]
    command = next(iter(commands)).load()
    # `transformers serve` looks a model's class up in this module, by the name in config.json, and uses no Auto class.
    # The module is looked up by name, because it replaces itself while parts of it are imported.
    setattr(sys.modules["transformers"], HAMForCausalLM.__name__, HAMForCausalLM)
    sys.exit(command())
