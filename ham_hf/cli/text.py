# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The text that a command gives to a model."""

import argparse
import os
import re
import sys
from pathlib import Path

from .arguments import CommandError, Parser, failing_as

TEXT = "argument TEXT"
# Of a text that is drawn token by token.
MOST_BYTES = 8 * 2**20


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


def read_text_or_file(given: str) -> str:
    """The text of the argument TEXT itself, of the file that it names, or of stdin for `-`."""
    # The name of a file that is not there would otherwise be inspected as a text of a few letters.
    name_like = re.fullmatch(r"\S*/\S*|\S+\.\w{1,5}", given) is not None
    if given == "-":
        content = sys.stdin.buffer.read(MOST_BYTES + 1)
    elif os.path.isfile(given):
        try:
            with open(given, "rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise CommandError(f"{TEXT}: cannot read {given!r}: {error.strerror}") from error
    elif os.path.exists(given) or name_like:
        problem = "is not a file" if os.path.exists(given) else "does not exist"
        raise CommandError(f"{TEXT}: {given!r} {problem}; takes a UTF-8 file, - for stdin, or the text itself")
    else:
        content = given.encode(errors="surrogateescape")
    return checked_text(content)


def checked_text(content: bytes) -> str:
    """The text in `content`; refuses what is empty, too long or no text."""
    if len(content) > MOST_BYTES:
        raise CommandError(f"{TEXT}: got more than {MOST_BYTES // 2**20} MiB, takes less; cut out the part to inspect")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{TEXT}: it is not UTF-8 text") from error
    if "\0" in text:
        raise CommandError(f"{TEXT}: it holds NUL characters, so it is not text")
    if not text.strip():
        raise CommandError(f"{TEXT}: got an empty text, takes some words")
    return text
