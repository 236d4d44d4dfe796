# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf generate`: continues a prompt, once for each threshold."""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import CommandError, add_command, number
from .models import add_model_arguments, calibrated, check_budgets, load

if TYPE_CHECKING:
    from ..inspection.runs import Setting

EXAMPLES = """\
examples:
  ham-hf generate "It was a dark night, and Captain Ahab" --threshold 0 0.5 2
  ham-hf generate --prompt-file letter.txt --kv-usage 1 0.25 0 --loss
  cat letter.txt | ham-hf generate --prompt-file - --kv-budget 64 --temperature 0.8

A token is kept if its routing score (0 to 1) reaches the threshold: 0 keeps every token, more than 1 keeps none.
Put PROMPT before --threshold and --kv-usage, which take every number that follows them.
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "generate",
        "continue a prompt, once for each threshold",
        "Continues a prompt, once for each threshold, and compares what the cache kept.",
        EXAMPLES,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file, or from stdin if '-'"
    )
    threshold = number("numbers such as 0 0.5 2 (PROMPT goes before them)", -math.inf, math.inf)
    usage = number("fractions from 0 to 1 (PROMPT goes before them)", 0, 1)
    help_text = "keep tokens with a score of at least X (default: the checkpoint's own thresholds)"
    parser.add_argument("--threshold", metavar="X", nargs="+", type=threshold, help=help_text)
    help_text = "keep about this fraction of the tokens instead, on a calibrated checkpoint"
    parser.add_argument("--kv-usage", metavar="U", nargs="+", type=usage, help=help_text)
    budget = number("a whole number from 1", 1, 2**31, int)
    help_text = "keep at most N tokens per head; a full head drops the lowest score"
    parser.add_argument("--kv-budget", metavar="N", type=budget, help=help_text)
    help_text = "also measure the loss (nats per token) on the second half of the prompt"
    parser.add_argument("--loss", action="store_true", help=help_text)
    parser.add_argument("--score", action="store_true", help=argparse.SUPPRESS)  # the old name of --loss
    add_model_arguments(parser, max_new_tokens=60)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf generate`."""
    if arguments.score:
        print("ham-hf: warning: --score is now called --loss", file=sys.stderr)
        arguments.loss = True
    prompt = read_prompt(arguments)
    if arguments.threshold and arguments.kv_usage:
        raise CommandError("argument --kv-usage: got it beside --threshold, takes its place: give one of the two")
    model, tokenizer = load(arguments)
    check_budgets(model.config, [arguments.kv_budget])
    settings = settings_of(arguments)
    if settings[0].name == "kv_usage" and not calibrated(model):
        raise CommandError(
            f"argument --kv-usage: the checkpoint {arguments.model} has no score quantiles to choose thresholds by; "
            "takes a checkpoint of ham-hf calibrate, or give --threshold instead"
        )
    compare(arguments, model, tokenizer, prompt, settings, arguments.loss)


def compare(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, prompt: str, settings: list["Setting"], loss: bool
) -> None:
    """Runs the prompt at every setting; prints the text as it comes, then the kept tokens of all runs."""
    from ..inspection.comparison import Comparison
    from ..inspection.runs import run

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise CommandError("argument PROMPT: the model's tokenizer finds no token in it, takes other text")
    if loss and ids.shape[1] < 2:
        raise CommandError("argument --loss: got a prompt of 1 token, takes 2 or more")
    generation: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        generation["temperature"] = arguments.temperature
    comparison = Comparison(tokenizer, prompt)
    for setting in settings:
        streamer = comparison.start(setting)
        comparison.end(run(model, ids, setting, loss, arguments.seed, streamer, **generation))
    comparison.conclude(model.config)


def settings_of(arguments: argparse.Namespace) -> list["Setting"]:
    """The settings that a call of `generate` asks for, one per run."""
    from ..inspection.runs import Setting

    if arguments.threshold:
        return [Setting("threshold", x, arguments.kv_budget) for x in arguments.threshold]
    if arguments.kv_usage:
        return [Setting("kv_usage", x, arguments.kv_budget) for x in arguments.kv_usage]
    return [Setting(kv_budget=arguments.kv_budget)]


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt from the command line, a file or stdin."""
    prompt, source = arguments.prompt, arguments.prompt_file
    if prompt is None and source is None:
        raise CommandError("argument PROMPT: got none, takes the text to continue; or give --prompt-file FILE")
    if prompt is not None and source is not None:
        raise CommandError("argument --prompt-file: got it beside PROMPT, takes its place: give one of the two")
    if source is not None:
        try:
            prompt = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise CommandError(
                f"argument --prompt-file: cannot read {source!r}: {reason}; takes a UTF-8 file or -"
            ) from error
        prompt = prompt.removesuffix("\n")
    name = "PROMPT" if source is None else "--prompt-file"
    if not prompt.strip():
        raise CommandError(f"argument {name}: got an empty prompt, takes some text")
    if not prompt.isascii() and re.search("[\ud800-\udfff]", prompt):
        raise CommandError(f"argument {name}: got bytes that are not UTF-8, takes UTF-8 text")
    return prompt
