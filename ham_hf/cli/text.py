# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The text that a command measures a model on."""

import argparse
from pathlib import Path

from .arguments import CommandError, Parser, failing_as


def add_text_arguments(parser: Parser, default: str | None = None) -> None:
    """Adds the files, which must be given unless there is a `default`, and the name of the text in them."""
    help_text = "UTF-8 text, JSON Lines, Parquet, or folders of them" + (f" (default: {default})" if default else "")
    required = default is None
    parser.add_argument("--text", metavar="PATH", nargs="+", type=Path, default=[], required=required, help=help_text)
    help_text = "field of JSON Lines, or column of Parquet, with the text (default: %(default)s)"
    parser.add_argument("--field", metavar="NAME", default="text", help=help_text)


def check_text_paths(arguments: argparse.Namespace) -> None:
    """Refuses paths that do not exist, before anything is loaded."""
    missing = [path for path in arguments.text if not path.exists()]
    if missing:
        raise CommandError(f"argument --text: there is no {missing[0]}, takes files and folders")


def read_text_arguments(arguments: argparse.Namespace) -> list[str]:
    """The documents."""
    from ..evaluation.texts import read_texts

    with failing_as("argument --text", width=400):
        return read_texts(arguments.text, arguments.field)
