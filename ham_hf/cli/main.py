# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The parser of every command, and the function behind `ham-hf`."""

import argparse
import sys

from .. import __version__
from . import calibrate, card, demo, evaluate, generate, inspect, push, ruler, run, serve, sweep, train
from .arguments import CommandError, Parser, exit_status

DESCRIPTION = """\
Hybrid Associative Memories: language models whose KV cache
keeps only the tokens that their RNN predicts badly.
"""
EXAMPLES = """\
examples:
  ham-hf demo
  ham-hf generate "It was a dark night, and Captain Ahab" --threshold 0 0.5 2
  ham-hf inspect letter.txt --threshold 0.4 0.6 --output my-letter
  ham-hf calibrate my-ham --text book.txt --output my-ham-calibrated
  ham-hf evaluate my-ham --text books/ --output my-results
  ham-hf sweep my-ham --text books/ --allow 1% --output my-sweep
  ham-hf card my-ham --results my-results
  ham-hf push my-ham OWNER/my-ham
  ham-hf serve my-ham --memory 8
  ham-hf train recipe.yaml
  ham-hf run transformers serve path/to/checkpoint
"""
COMMANDS = (generate, inspect, demo, train, calibrate, evaluate, sweep, ruler, card, push, serve, run)


def build_parser() -> Parser:
    """The parser of every command; without a command it prints the help."""
    parser = Parser(
        prog="ham-hf",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ham-hf {__version__}")
    parser.set_defaults(execute=lambda arguments: parser.print_help())
    commands = parser.add_subparsers(
        metavar="generate|inspect|demo|train|calibrate|evaluate|sweep|card|push|serve|run", title="commands"
    )
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `exit_status`."""

    def run_command() -> None:
        if (sys.argv[1:] if argv is None else argv)[:1] == ["study"]:
            raise CommandError(
                "the study has moved: in a checkout of the repository run `python -m model_cards.study`"
            )
        arguments = build_parser().parse_args(argv)
        arguments.execute(arguments)

    return exit_status("ham-hf", run_command, "a shorter prompt, --kv-budget or --dtype bfloat16 needs less")
