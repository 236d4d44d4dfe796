# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf card`: writes the model card of a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_command, check_checkpoint_folder, failing_as
from .libraries import import_transformers

EXAMPLES = """\
examples:
  ham-hf card my-ham
  ham-hf card my-ham --results my-results --repo-id OWNER/my-ham
  ham-hf card my-ham --output card.md --force

The card takes its contents from these files in --results, each of which may be missing:
  usage.json, usage.png   loss and memory, from ham-hf evaluate
  summary.md, data.md, recipe.md, results.md, limits.md   prose
  card.json   any of "name", "license", "language": ["en"], "datasets": [...], "tags": [...] and
              "evaluation": {"dataset": what the loss was measured on, "type": its name on the Hub, "split": ...}
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "card",
        "write the model card of a checkpoint",
        "Writes the model card of a checkpoint from its files and its measurements.",
        EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a HAM checkpoint")
    help_text = "folder with measurements and texts about it (default: CHECKPOINT)"
    parser.add_argument("--results", metavar="DIR", type=Path, help=help_text)
    help_text = "file for the card, with its pictures beside it (default: CHECKPOINT/README.md)"
    parser.add_argument("--output", metavar="FILE", type=Path, help=help_text)
    help_text = "the name on the Hub, for the examples in the card (default: a placeholder)"
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace a card that this command did not write")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf card`."""
    check_checkpoint_folder(arguments.checkpoint, "argument CHECKPOINT")
    import_transformers()
    from huggingface_hub.constants import REPOCARD_NAME

    from ..files import copy_whole, write_whole
    from ..hub.card import MARKER, build_card, missing_from
    from ..hub.checkpoint import read_checkpoint
    from ..hub.push import check_repo_id
    from ..hub.sources import read_sources

    with failing_as("argument CHECKPOINT"):
        checkpoint = read_checkpoint(arguments.checkpoint)
    with failing_as("argument --results"):
        sources = read_sources(arguments.results or arguments.checkpoint)
    if arguments.repo_id is not None:
        with failing_as("argument --repo-id"):
            check_repo_id(arguments.repo_id)
    output = arguments.output or arguments.checkpoint / REPOCARD_NAME
    with failing_as("argument --output: cannot write the card"):
        if output.is_file() and MARKER not in output.read_text(encoding="utf-8") and not arguments.force:
            raise CommandError(
                f"argument --output: {output} was not written by this command; takes another FILE, or --force to "
                "replace it"
            )
        name = sources.metadata.get("name", arguments.checkpoint.resolve().name)
        write_whole(output, str(build_card(checkpoint, sources, name, arguments.repo_id)))
        for plot in (sources.plot, checkpoint.heads_plot):
            if plot is not None and plot.parent.resolve() != output.parent.resolve():
                copy_whole(plot, output.parent / plot.name)
                print(f"Copied {plot.name} beside it")
    print(f"Wrote {output}: {sum(checkpoint.parameters.values()):,} parameters")
    missing = missing_from(sources, arguments.repo_id)
    if missing:
        print(f"Missing from the card: {', '.join(missing)}")
