# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf inspect`: draws which tokens of a text a model keeps, as pictures and one page."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import CommandError, add_command, failing_as
from .generate import settings_of
from .inspect_arguments import add_arguments, check_arguments, check_places
from .models import add_placement_arguments, calibrated, check_budgets, load
from .text import TEXT, read_text_or_file

if TYPE_CHECKING:
    from ..inspection import Drawing, Passage, Reading
    from ..inspection.runs import Setting

EXAMPLES = """\
examples:
  ham-hf inspect letter.txt --threshold 0.4 0.6 --output my-letter
  ham-hf inspect "My name is Ahab. What is my name?" --model my-ham --kv-usage 0.5 0.25 --query 8 --output ahab
  cat book.txt | ham-hf inspect - --length 50000 --span 12000 13000 --layers 0 5 --output part-of-a-book

Put TEXT before the options that take several numbers. The page opens in any browser and needs no network.
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "inspect",
        "draw which tokens of a text are kept, and why",
        "Reads a text once for each setting, and draws which tokens each layer and head keeps, their scores beside "
        "the RNN's decay, and what a token attends to: as PNG, as SVG and as one page, page.html.",
        EXAMPLES,
    )
    add_arguments(parser)
    add_placement_arguments(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf inspect`."""
    text = read_text_or_file(arguments.text)
    check_arguments(arguments)
    with failing_as("the pictures need matplotlib (pip install 'ham-hf[eval]')"):
        import matplotlib  # noqa: F401
    model, tokenizer = load(arguments)
    check_budgets(model.config, [arguments.kv_budget])
    if arguments.kv_usage and not calibrated(model):
        raise CommandError("argument --kv-usage: this checkpoint is not calibrated: ham-hf calibrate MODEL")
    from rich.console import Console

    from ..inspection import Passage, drawings

    with failing_as(TEXT):
        passage = Passage.of(tokenizer, text, arguments.length)
    check_places(arguments, model.config, passage.ids.shape[1])
    with Console(stderr=True).status("Reading and drawing"):
        # Settings that are written alike would write the same files.
        settings = {setting.title: setting for setting in settings_of(arguments)}
        readings = [read_at(arguments, model, passage, setting) for setting in settings.values()]
        drawn = [drawings(reading, arguments.layers, arguments.heads) for reading in readings]
        with failing_as("argument --output"):
            pictures = write(arguments, passage, readings, drawn)
    print(table(readings, pictures))
    for note in notes(arguments, passage, readings[0]):
        print(note)


def read_at(arguments: argparse.Namespace, model: Any, passage: "Passage", setting: "Setting") -> "Reading":
    """The part of the text that is asked for, read at one setting."""
    from ..inspection import read

    try:
        return read(model, passage, query=arguments.query, **setting.arguments()).part(*arguments.span)
    except ValueError as error:
        raise CommandError(f"at {setting.title}: {error}") from error


def write(
    arguments: argparse.Namespace, passage: "Passage", readings: list["Reading"], drawn: list[list["Drawing"]]
) -> list[list[str]]:
    """Writes the pictures and the page; returns the names of each setting's files."""
    from ..files import write_whole
    from ..inspection import html_page

    arguments.output.mkdir(parents=True, exist_ok=True)
    names = []
    for reading, figures in zip(readings, drawn, strict=True):
        # Nothing but letters, digits, points and hyphens, whatever the setting is called.
        prefix = re.sub(r"[^\w.]+", "-", reading.setting) + "-" if len(readings) > 1 else ""
        names.append([name for x in figures for name in x.write(arguments.output, prefix + x.name)])
    source = f"{Path(arguments.model).name}, {passage.ids.shape[1]:,} tokens read"
    write_whole(arguments.output / "page.html", html_page(readings, drawn, source))
    return names


def table(readings: list["Reading"], pictures: list[list[str]]) -> str:
    """A row for each setting, in Markdown."""
    from ..evaluation.markdown import table as markdown_table

    rows = [
        [
            x.setting,
            f"{x.kept.float().mean():.1%}",
            f"{x.held.float().mean():.1%}",
            f"{len(names)}, such as {names[0]}",
        ]
        for x, names in zip(readings, pictures, strict=True)
    ]
    return markdown_table(["setting", "kept", "held, with window", "pictures"], rows)


def notes(arguments: argparse.Namespace, passage: "Passage", reading: "Reading") -> list[str]:
    """What the table does not say: what was cut, what was left out, and where the page is."""
    found, length = [], passage.ids.shape[1]
    if passage.total > length:
        found.append(f"The text has {passage.total:,} tokens; the first {length:,} were read (--length reads more).")
    if reading.left_out:
        layers = ", ".join(f"{i} ({kind})" for i, kind in reading.left_out)
        found.append(f"Not drawn, because they do not route: layers {layers}.")
    if arguments.kv_budget is not None:
        found.append("No attention is drawn with --kv-budget.")
    return [*found, f"Wrote page.html and the pictures in {arguments.output}"]
