# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ham-hf inspect`, and the layers, heads and positions that they may name."""

import argparse
import math
from pathlib import Path
from typing import Any

from .arguments import CommandError, Parser, number
from .models import EMBEDDED_CHECKPOINT

LENGTH = 10_000


def add_arguments(parser: Parser) -> None:
    """Adds the text, the model, the settings and what is drawn."""
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
