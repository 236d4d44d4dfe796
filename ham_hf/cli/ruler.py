# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf ruler`: how well a model retrieves from long prompts, at several settings of its memory."""

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_command, failing_as, number
from .evaluate import add_memory_arguments, is_ham, memories
from .models import add_placement_arguments, load
from .text import add_text_arguments, check_text_paths, read_text_arguments

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
)  # fmt: skip
EXAMPLES = """\
examples:
  ham-hf ruler my-ham --tasks niah_single_1 niah_multikey_1 --output my-ham-ruler
  ham-hf ruler my-ham --length 4096 --samples 200 --kv-usage 0.5 0.25 --text books/ --output my-ham-ruler-4k
  ham-hf ruler HuggingFaceTB/SmolLM2-135M --output smollm2-ruler

An interrupted call goes on when the same command is given again; settings, tasks and samples may be added to it.
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "ruler",
        "measure retrieval from long prompts",
        "Measures how many answers a model finds in prompts made after RULER (arXiv 2404.06654): a HAM at several "
        "thresholds, usages or budgets, any other causal language model as it is.",
        EXAMPLES,
    )
    help_text = "folder of a checkpoint, or its name on the Hub: a HAM, or any causal language model"
    parser.add_argument("model", metavar="MODEL", help=help_text)
    help_text = "folder for ruler.json, ruler.md and ruler.png, and samples.jsonl with a row for each sample"
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help=help_text)
    help_text = "tasks (default: all): %(choices)s"
    parser.add_argument("--tasks", metavar="TASK", nargs="+", choices=TASKS, default=list(TASKS), help=help_text)
    whole = number("a whole number from 1", 1, 2**31, int)
    help_text = "tokens of prompt and answer (default: %(default)s)"
    parser.add_argument("--length", metavar="N", type=whole, default=1024, help=help_text)
    help_text = "samples of each task (default: %(default)s)"
    parser.add_argument("--samples", metavar="N", type=whole, default=50, help=help_text)
    seed = number("a whole number from 0 to 2^64 - 1", 0, 2**64 - 1, int)
    parser.add_argument("--seed", metavar="S", type=seed, default=0, help="seed of the samples (default: %(default)s)")
    add_text_arguments(parser, default="Python's help texts, to hide needles in")
    help_text = "samples in one call of generate (default: %(default)s)"
    parser.add_argument("--batch", metavar="N", type=whole, default=1, help=help_text)
    add_memory_arguments(parser)
    add_placement_arguments(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf ruler`."""
    output = arguments.output
    if output.exists() and not output.is_dir():
        raise CommandError(f"argument --output: {output} is a file, takes a folder")
    check_text_paths(arguments)
    model, tokenizer = load(arguments, "argument MODEL", any_model=True)
    from ..evaluation.retrieval import Retrieval, plot, to_markdown
    from ..files import write_whole

    settings = memories(arguments, model)
    haystack = "\n\n".join(read_text_arguments(arguments)) if arguments.text else None
    tasks, length, count = list(dict.fromkeys(arguments.tasks)), arguments.length, arguments.samples
    with failing_as("argument --length or --output", width=400):
        retrieval = Retrieval(
            model.eval(), tokenizer, tasks, length, count, output / "samples.jsonl",
            arguments.seed, haystack, arguments.batch,
        )  # fmt: skip
    results = retrieval.results(settings)
    report = to_markdown(results, length, count)
    content = {"length": length, "samples": count, "seed": arguments.seed, "results": results}
    write_whole(output / "ruler.json", json.dumps(content, indent=1) + "\n")
    write_whole(output / "ruler.md", report)
    if is_ham(model):
        plot(results, output / "ruler.png")
    print(f"{report}\nWrote ruler.json{', ruler.md and ruler.png' if is_ham(model) else ' and ruler.md'} in {output}")
