# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The parser of every command, and what becomes of errors."""

import argparse
import sys

from ham_hf import __version__

from . import card, demo, generate, push, run, study, train
from .arguments import CommandError, Parser

DESCRIPTION = """\
Hybrid Associative Memories: language models whose KV cache
keeps only the tokens that their RNN predicts badly.
"""
EXAMPLES = """\
examples:
  ham-hf demo
  ham-hf generate "It was a dark night, and Captain Ahab" --threshold 0 0.5 2
  ham-hf card my-ham --results my-results
  ham-hf push my-ham OWNER/my-ham
  ham-hf train recipe.yaml
  ham-hf run transformers serve path/to/checkpoint
"""
COMMANDS = (generate, demo, train, card, push, study, run)


def build_parser() -> Parser:
    """The parser of every command; without one the help is printed."""
    parser = Parser(
        prog="ham-hf",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ham-hf {__version__}")
    parser.set_defaults(execute=lambda arguments: parser.print_help())
    commands = parser.add_subparsers(metavar="generate|demo|train|study|card|push|run", title="commands")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 (out of memory), 2 (a wrong call) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?", not a traceback
    try:
        arguments = build_parser().parse_args(argv)
        arguments.execute(arguments)
    except CommandError as error:
        print(f"ham-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # On a terminal the text stops amid a line.
        print("\n" * sys.stdout.isatty() + "ham-hf: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "ham-hf: error: out of memory; a shorter prompt, --kv-budget or --dtype bfloat16 needs less",
            file=sys.stderr,
        )
        return 1
    return 0
