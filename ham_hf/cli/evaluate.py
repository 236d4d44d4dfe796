# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf evaluate`: loss and bytes of a model on text of one's own, at several settings of its memory."""

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import CommandError, Parser, add_command, failing_as, number
from .models import add_placement_arguments, calibrated, check_budgets, load
from .text import add_text_arguments, check_text_paths, read_text_arguments

EXAMPLES = """\
examples:
  ham-hf evaluate my-ham --text books/ --output my-ham-on-books
  ham-hf evaluate my-ham --text test.jsonl --threshold 0.2 0.4 --kv-budget 256 --output my-ham-on-test
  ham-hf evaluate HuggingFaceTB/SmolLM2-135M --text books/ --output smollm2-on-books

An interrupted evaluation goes on when the same command is given again; further settings may be added to it.
"""
USAGES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.01)
# Parts of a window that budgets of a model without scores hold.
BUDGETS = (1, 2, 4, 8)


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "evaluate",
        "measure loss and memory on your own text",
        "Measures the loss on text, also of passages read before, and the bytes that the memory holds: a HAM at "
        "several thresholds, usages or budgets, any other causal language model as it is.",
        EXAMPLES,
    )
    help_text = "folder of a checkpoint, or its name on the Hub: a HAM, or any causal language model"
    parser.add_argument("model", metavar="MODEL", help=help_text)
    add_text_arguments(parser)
    add_window_arguments(parser)
    help_text = "folder for usage.json, usage.md and usage.png, and windows.jsonl with a row for each window"
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=help_text)
    add_memory_arguments(parser)
    add_placement_arguments(parser)
    parser.set_defaults(execute=execute)


def add_memory_arguments(parser: Parser) -> None:
    """Adds the settings of the memory, see `memories`."""
    help_text = "keep tokens that score at least this"
    threshold = number("a number", -1e9, 1e9)
    parser.add_argument("--threshold", metavar="TAU", nargs="+", type=threshold, default=[], help=help_text)
    help_text = "keep about this fraction of the tokens, on a calibrated checkpoint"
    usage = number("a number from 0 to 1", 0, 1)
    parser.add_argument("--kv-usage", metavar="U", nargs="+", type=usage, default=[], help=help_text)
    help_text = "hold at most this many tokens per head, of all scores"
    whole = number("a whole number from 1", 1, 2**31, int)
    parser.add_argument("--kv-budget", metavar="N", nargs="+", type=whole, default=[], help=help_text)


def add_window_arguments(parser: Parser) -> None:
    """Adds how much of the text is read, and how much at once."""
    whole = number("a whole number from 1", 1, 2**31, int)
    length = number("a whole number from 16", 16, 2**31, int)
    help_text = "tokens in a window of text (default: %(default)s)"
    parser.add_argument("--length", metavar="N", type=length, default=1024, help=help_text)
    help_text = "windows, at equal distances over the text (default: %(default)s)"
    parser.add_argument("--windows", metavar="N", type=whole, default=32, help=help_text)
    help_text = "windows in one call of the model (default: %(default)s)"
    parser.add_argument("--batch", metavar="N", type=whole, default=1, help=help_text)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf evaluate`."""
    evaluation = prepare(arguments)
    results = evaluation.results(memories(arguments, evaluation.model))
    from ..evaluation.report import parts_to_markdown, plot, to_markdown
    from ..files import write_whole

    output = arguments.output
    report = f"{to_markdown(results, arguments.length)}\n{parts_to_markdown(results)}"
    write_whole(output / "usage.json", json.dumps({"context": arguments.length, "results": results}, indent=1) + "\n")
    write_whole(output / "usage.md", report)
    written = ["usage.json", "usage.md"]
    if is_ham(evaluation.model):
        with failing_as("the picture needs matplotlib (pip install 'ham-hf[eval]')"):
            plot(results, output / "usage.png")
        written.append("usage.png")
    print(f"{report}\nWrote {', '.join(written)} in {output}")


def prepare(arguments: argparse.Namespace) -> Any:
    """The `Evaluation` of a command with a model, text, windows and a folder for the results."""
    check_text_paths(arguments)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise CommandError(f"argument --output: {arguments.output} is a file, takes a folder")
    model, tokenizer = load(arguments, "argument MODEL", any_model=True)
    from ..evaluation.evaluate import Evaluation
    from ..evaluation.texts import text_windows

    texts = read_text_arguments(arguments)
    with failing_as("argument --text"):
        windows = text_windows(tokenizer, texts, arguments.length, arguments.windows)
    with failing_as("argument --output", width=400):
        return Evaluation(model.eval(), windows, arguments.output / "windows.jsonl", arguments.batch)


def is_ham(model: Any) -> bool:
    """True for a model whose memory has settings."""
    return model.config.model_type == "ham"


def memories(arguments: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """The settings to measure, that which keeps everything first, if there is one."""
    given = bool(arguments.threshold or arguments.kv_usage or arguments.kv_budget)
    if not is_ham(model):
        if given:
            kind = model.config.model_type
            raise CommandError(f"argument --threshold, --kv-usage or --kv-budget: a model of type {kind!r} takes none")
        return [{}]
    check_budgets(model.config, arguments.kv_budget)
    asked: list[dict[str, Any]] = [{"kv_usage": x} for x in arguments.kv_usage]
    asked += [{"threshold": x} for x in arguments.threshold]
    if model.config.router == "recency":
        # Its scores are positions, which no threshold can tell apart.
        budgets = arguments.kv_budget or [arguments.length // part for part in BUDGETS]
        check_budgets(model.config, budgets)
        return [*asked, *({"kv_budget": x} for x in budgets)]
    asked += [{"threshold": 0.0, "kv_budget": x} for x in arguments.kv_budget]
    if arguments.kv_usage and not calibrated(model):
        raise CommandError("argument --kv-usage: this checkpoint is not calibrated: ham-hf calibrate MODEL")
    if not given and calibrated(model):
        asked = [*({"kv_usage": x} for x in USAGES), {}]
    elif not given:
        asked = [*({"threshold": x} for x in THRESHOLDS), {}]
    everything = {"kv_usage": 1.0} if calibrated(model) else {"threshold": 0.0}
    return [everything, *(x for x in asked if x != everything)]
