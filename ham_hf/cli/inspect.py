# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf inspect`: draws which tokens of a text a model keeps, as pictures and one page."""

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import CommandError, add_command, failing_as, number
from .generate import settings_of
from .models import EMBEDDED_CHECKPOINT, add_placement_arguments, calibrated, check_budgets, load
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
LENGTH = 10_000


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
    parser.add_argument("text", metavar="TEXT", help="the text, a UTF-8 file with it, or - for stdin")
    help_text = "folder for page.html and the pictures"
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=help_text)
    help_text = "folder of a HAM checkpoint, or its name on the Hub (default: the one in this package)"
    parser.add_argument("--model", metavar="PATH_OR_ID", default=str(EMBEDDED_CHECKPOINT), help=help_text)
    threshold = number("numbers such as 0.4 0.6 (TEXT goes before them)", -math.inf, math.inf)
    help_text = "keep tokens with a score of at least X (default: the checkpoint's own thresholds)"
    parser.add_argument("--threshold", metavar="X", nargs="+", type=threshold, help=help_text)
    usage = number("fractions from 0 to 1 (TEXT goes before them)", 0, 1)
    help_text = "keep about this fraction of the tokens instead, on a calibrated checkpoint"
    parser.add_argument("--kv-usage", metavar="U", nargs="+", type=usage, help=help_text)
    positive = number("a whole number from 1", 1, 2**31, int)
    help_text = "hold at most N tokens per head, and draw no attention"
    parser.add_argument("--kv-budget", metavar="N", type=positive, help=help_text)
    place = number("a whole number from 0", 0, 2**31, int)
    help_text = "layers whose scores, decay and attention are drawn (default: the first, a middle and the last one)"
    parser.add_argument("--layers", metavar="N", nargs="+", type=place, help=help_text)
    help_text = "key/value heads whose scores and decay are drawn (default: up to four)"
    parser.add_argument("--heads", metavar="N", nargs="+", type=place, help=help_text)
    help_text = "position of the token whose attention is drawn, from 0 (default: the last token that is drawn)"
    parser.add_argument("--query", metavar="N", type=place, help=help_text)
    help_text = "read at most the first N tokens (default: %(default)s)"
    parser.add_argument("--length", metavar="N", type=positive, default=LENGTH, help=help_text)
    help_text = "draw only the tokens from FIRST to END - 1, larger"
    parser.add_argument("--span", metavar=("FIRST", "END"), nargs=2, type=place, help=help_text)
    add_placement_arguments(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf inspect`."""
    text = read_text_or_file(arguments.text)
    check_arguments(arguments)
    with failing_as("the pictures need matplotlib (pip install 'ham-hf[eval]')"):
        import matplotlib  # noqa: F401
    model, tokenizer = load(arguments)
    check_budgets(model, [arguments.kv_budget])
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


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses arguments that contradict each other, before anything is imported."""
    if arguments.threshold and arguments.kv_usage:
        raise CommandError("argument --kv-usage: got it beside --threshold, takes its place: give one of the two")
    if arguments.query is not None and arguments.kv_budget is not None:
        raise CommandError("argument --query: got it beside --kv-budget, which leaves no attention to draw")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise CommandError(f"argument --output: {arguments.output} is a file, takes a folder")


def check_places(arguments: argparse.Namespace, config: Any, length: int) -> None:
    """Refuses layers, heads and positions that are not there, and fills in `span` and `query`."""
    hybrid = [i for i, layer_type in enumerate(config.layer_types) if layer_type == "hybrid"]
    for layer in arguments.layers or []:
        if layer not in hybrid:
            kind = f" of type {config.layer_types[layer]!r}" if layer < len(config.layer_types) else ""
            known = ", ".join(map(str, hybrid))
            raise CommandError(f"argument --layers: got {layer}{kind}, takes numbers of hybrid layers: {known}")
    for head in arguments.heads or []:
        if head >= config.num_key_value_heads:
            last = config.num_key_value_heads - 1
            raise CommandError(f"argument --heads: got {head}, takes numbers of key/value heads from 0 to {last}")
    first, end = arguments.span = arguments.span or (0, length)
    if not first < end <= length:
        raise CommandError(f"argument --span: got {first} {end}, takes FIRST < END within the {length:,} tokens read")
    if arguments.query is None and arguments.kv_budget is None:
        arguments.query = end - 1
    if arguments.query is not None and not first <= arguments.query < length:
        raise CommandError(f"argument --query: got {arguments.query}, takes a position from {first} to {length - 1}")


def read_at(arguments: argparse.Namespace, model: Any, passage: "Passage", setting: "Setting") -> "Reading":
    """The part of the text that is asked for, read at one setting."""
    from ..inspection import read

    name = "argument --threshold, --kv-usage or --kv-budget"
    with failing_as(name, width=400):
        return read(model, passage, query=arguments.query, **setting.arguments()).part(*arguments.span)


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
