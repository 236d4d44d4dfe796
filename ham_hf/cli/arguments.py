# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Arguments and errors that the commands share."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class CommandError(Exception):
    """The one line that tells the user why a command cannot be carried out."""


class Parser(argparse.ArgumentParser):
    """A parser that explains an error in one line, without the usage.

    Attributes:
        rest: name of the argument that takes all that follows `--`; `None`: argparse's own meaning of `--`.
    """

    rest: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also takes the rest: argparse itself would end it at the first option before it."""
        if self.rest is None:
            return super().parse_known_args(args, namespace)
        cut = args.index("--") if "--" in args else len(args)
        namespace, unknown = super().parse_known_args(args[:cut], namespace)
        setattr(namespace, self.rest, args[cut + 1 :])
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Raises the error for `main` to print."""
        raise CommandError(message)


def add_command(commands: Any, name: str, help_text: str, description: str, epilog: str | None = None) -> Parser:
    """Adds a command to the parser of `build_parser`; returns the command's own parser."""
    parser: Parser = commands.add_parser(
        name,
        help=help_text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def number(expected: str, low: float, high: float, convert: type = float) -> Callable[[str], Any]:
    """An argparse type: a number from `low` to `high`; an error names what is `expected`."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
            valid = low <= value <= high  # false for NaN
        except ValueError:
            valid = False
        if not valid:
            shown = textwrap.shorten(text, 40, placeholder=" ...")
            raise argparse.ArgumentTypeError(f"got {shown!r}, takes {expected}")
        return value

    return parse


@contextmanager
def failing_as(message: str, width: int = 160) -> Iterator[None]:
    """Turns any failure into a `CommandError`: a broken checkpoint fails in as many ways as libraries read it."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), width, placeholder=" ...") or type(error).__name__
        raise CommandError(f"{message}: {reason}") from error


def check_checkpoint_folder(folder: Path, argument: str) -> None:
    """Raises `CommandError` unless `folder` holds a config.json, before anything is imported to read it."""
    if not folder.is_dir():
        raise CommandError(f"{argument}: there is no folder {folder}, takes the folder of a HAM checkpoint")
    if not (folder / "config.json").is_file():
        raise CommandError(f"{argument}: the folder {folder} holds no config.json, takes a HAM checkpoint")


def exit_status(program: str, run: Callable[[], None], memory_hint: str) -> int:
    """Runs a command and prints its errors in one line.

    Args:
        program: name of the program in messages.
        run: the command.
        memory_hint: advice for a command that runs out of memory.

    Returns:
        0, 1 (out of memory), 2 (a wrong call) or 130 (Ctrl-C).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?", not a traceback
    try:
        run()
    except CommandError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # On a terminal the output stops in the middle of a line.
        print("\n" * sys.stdout.isatty() + f"{program}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"{program}: error: out of memory; {memory_hint}", file=sys.stderr)
        return 1
    return 0
