# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf calibrate`: measures what `kv_usage` needs, and writes it into a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_command, check_checkpoint_folder, failing_as, number
from .models import add_placement_arguments, load
from .text import add_text_arguments, check_text_paths, read_text_arguments

EXAMPLES = """\
examples:
  ham-hf calibrate my-ham --text book.txt notes.txt --output my-ham-calibrated
  ham-hf calibrate my-ham --text book.txt --prompts questions.jsonl --in-place

Text decides the thresholds that kv_usage chooses: take some of the kind that the model is used on. Its last fifth is
not calibrated on, and shows what is kept. Prompts with answers tell which heads read from afar; by default they ask
for a number told once, far back in the text. In questions.jsonl each line is an object such as
{"prompt": "... Question: Who wrote it? Answer:", "answer": " Ahab"}.
"""
HELD_WINDOWS = 2
# Of models without training, by loss and by needles: see model_cards/smollm2.
ROUTERS = ("cosine", "l2", "residual", "random")


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "calibrate",
        "measure what kv_usage needs, and write it into a checkpoint",
        "Measures the spread of the scores and the importance of the heads, by which kv_usage chooses what is kept.",
        EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a HAM checkpoint with its tokenizer")
    add_text_arguments(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="DIR", type=Path, help="folder to write; must not exist")
    target.add_argument("--in-place", action="store_true", help="write into MODEL")
    source = parser.add_mutually_exclusive_group()
    help_text = "JSON Lines of prompts and answers that tell the importance of heads (default: needles in the text)"
    source.add_argument("--prompts", metavar="FILE", type=Path, help=help_text)
    source.add_argument("--no-importance", action="store_true", help="leave the importance of heads as it is")
    help_text = "route by another score from now on: %(choices)s (default: the checkpoint's)"
    parser.add_argument("--router", metavar="ROUTER", choices=ROUTERS, help=help_text)
    whole = number("a whole number from 1", 1, 2**31, int)
    help_text = "tokens in a window of text, and in a needle's prompt (default: %(default)s)"
    parser.add_argument("--length", metavar="N", type=whole, default=1024, help=help_text)
    help_text = "windows of text to calibrate on (default: %(default)s)"
    parser.add_argument("--windows", metavar="N", type=whole, default=8, help=help_text)
    help_text = "prompts with a needle (default: %(default)s)"
    parser.add_argument("--needles", metavar="N", type=whole, default=4, help=help_text)
    seed = number("a whole number from 0 to 2^64 - 1", 0, 2**64 - 1, int)
    help_text = "seed of the needles (default: %(default)s)"
    parser.add_argument("--seed", metavar="S", type=seed, default=0, help=help_text)
    add_placement_arguments(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf calibrate`."""
    folder = Path(arguments.model)
    check_checkpoint_folder(folder, "argument MODEL")
    if arguments.output is not None and arguments.output.exists():
        raise CommandError(f"argument --output: {arguments.output} exists, takes a new folder, or give --in-place")
    check_text_paths(arguments)
    choice = {} if arguments.router is None else {"router": arguments.router}
    model, tokenizer = load(arguments, "argument MODEL", **choice)
    model.eval()
    from huggingface_hub.constants import REPOCARD_NAME
    from transformers import PreTrainedConfig

    from ..evaluation.calibration import calibrate, spread_windows
    from ..evaluation.heads import usage_table
    from ..evaluation.texts import token_stream
    from ..hub.calibrated import save_calibrated

    stored = PreTrainedConfig.get_config_dict(folder)[0].get("router", "cosine")
    if arguments.router is not None and stored.startswith("learned"):
        raise CommandError(f"argument --router: {folder} has learned to route by {stored!r}, takes no other router")
    tokens = token_stream(tokenizer, read_text_arguments(arguments))
    held_out = max(arguments.length, len(tokens) // 5)
    if len(tokens) < arguments.length + held_out:
        raise CommandError(
            f"argument --text: got {len(tokens)} tokens, takes at least {arguments.length + held_out} with --length "
            f"{arguments.length}: half of them to show what is kept"
        )
    used, held = tokens[:-held_out], tokens[-held_out:]
    importance = importance_of(arguments, model, tokenizer, used)
    calibrate(model, spread_windows(used, arguments.length, arguments.windows))
    if importance is not None:
        model.config.head_importance = importance
    output = folder if arguments.in_place else arguments.output
    with failing_as(f"cannot write {output}", width=400):
        changed = save_calibrated(folder, output, model)
    print(usage_table(model, spread_windows(held, arguments.length, HELD_WINDOWS)))
    print(f"\nWrote {output}; new in it: {', '.join(changed)}")
    if (output / REPOCARD_NAME).is_file() and REPOCARD_NAME not in changed:
        print(f"The card is still the old one: ham-hf card {output}")


def importance_of(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, tokens: list[int]
) -> list[list[float]] | None:
    """The importance of the heads, a list for each hybrid layer; `None` if it is not to be measured."""
    if arguments.no_importance:
        return None
    from ..evaluation.importance import head_importance, needle_examples, read_examples, stored_importance

    if arguments.prompts is not None:
        with failing_as("argument --prompts", width=400):
            examples = read_examples(arguments.prompts, tokenizer)
    else:
        with failing_as("argument --length"):
            examples = needle_examples(tokenizer, tokens, arguments.needles, arguments.length, arguments.seed)
    return stored_importance(head_importance(model, examples, True))
