# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf sweep`: the smallest memory whose loss on text of one's own stays within what is allowed."""

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_command, number
from .evaluate import add_window_arguments, is_ham, prepare
from .models import add_placement_arguments, calibrated
from .text import add_text_arguments

EXAMPLES = """\
examples:
  ham-hf sweep my-ham --text books/ --output my-ham-sweep
  ham-hf sweep my-ham --text books/ --allow 3% --output my-ham-sweep

The folder holds every point of the curve in sweep.json, sweep.md and sweep.png. An interrupted sweep goes on when the
same command is given again.
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "sweep",
        "find the smallest memory for an allowed rise of the loss",
        "Searches for the smallest kv_usage, and for the highest threshold of all heads together, at which the loss "
        "on text rises no more than allowed over that with everything kept.",
        EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a HAM checkpoint, or its name on the Hub")
    add_text_arguments(parser)
    add_window_arguments(parser)
    help_text = "folder for the curve"
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=help_text)
    help_text = "allowed rise of the loss (default: 1%%)"
    parser.add_argument("--allow", metavar="PERCENT", type=percentage, default="1%", help=help_text)
    halvings = number("a whole number from 0 to 20", 0, 20, int)
    help_text = "halvings of the last interval of the search (default: %(default)s)"
    parser.add_argument("--steps", metavar="N", type=halvings, default=4, help=help_text)
    add_placement_arguments(parser)
    parser.set_defaults(execute=execute)


def percentage(text: str) -> float:
    """A fraction from a percentage such as `1%` or `0.5%`."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a percentage such as 1%")
    return value


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf sweep`."""
    evaluation = prepare(arguments)
    model = evaluation.model
    if not is_ham(model) or model.config.router == "recency":
        kind = "a router 'recency'" if is_ham(model) else f"the type {model.config.model_type!r}"
        raise CommandError(f"argument MODEL: got {kind}, takes a HAM with scores")
    from tqdm import tqdm

    from ..evaluation.report import plot, to_markdown
    from ..evaluation.sweep import rise, search
    from ..files import write_whole

    lines, results = [], []
    with tqdm(desc="sweep", unit="window", disable=None) as progress:

        def measure(memory: dict[str, float]) -> dict[str, Any]:
            return evaluation.measure(memory, progress)

        everything = measure({"threshold": 0.0})
        for knob in ("kv_usage", "threshold") if calibrated(model) else ("threshold",):
            best, measured = search(measure, knob, everything, arguments.allow, arguments.steps)
            results += measured
            mean, error = rise(best, everything)
            lines.append(
                f"{knob}={best[knob]:g}: the loss rises by {mean:.2%} ± {error:.2%} ({arguments.allow:.2%} allowed), "
                f"with {best['usage']:.1%} of the tokens kept and {best['held']:.1%} held"
            )
    output, report = arguments.output, to_markdown(results, arguments.length)
    write_whole(output / "sweep.json", json.dumps({"context": arguments.length, "results": results}, indent=1) + "\n")
    write_whole(output / "sweep.md", report)
    plot(results, output / "sweep.png")
    print("\n".join([report, *lines, f"\nWrote sweep.json, sweep.md and sweep.png in {output}"]))
