# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf push`: uploads a checkpoint with its card and code to the Hub."""

import argparse
from pathlib import Path
from typing import Any

from .arguments import CommandError, add_command, check_checkpoint_folder, failing_as
from .libraries import import_transformers

EXAMPLES = """\
examples:
  ham-hf push my-ham OWNER/my-ham --private
  ham-hf push my-ham OWNER/my-ham --revision trial

The card is CHECKPOINT/README.md (see ham-hf card), else the repository's card, else one made from CHECKPOINT.
Needs a token that may write: hf auth login, or the environment variable HF_TOKEN.
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "push",
        "upload a checkpoint with its card and code to the Hub",
        "Uploads a checkpoint, its card, and the code that loads it without this package, in one commit.",
        EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a HAM checkpoint")
    help_text = "repository on the Hub, created if it does not exist"
    parser.add_argument("repo_id", metavar="OWNER/NAME", help=help_text)
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if needed (default: the main one)")
    help_text = "make a new repository private (default: as the owner's settings say)"
    parser.add_argument("--private", action="store_true", default=None, help=help_text)
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf push`."""
    check_checkpoint_folder(arguments.checkpoint, "argument CHECKPOINT")
    import_transformers()
    from huggingface_hub.errors import HfHubHTTPError

    from ..hub.push import push_folder

    with failing_as(f"cannot push {arguments.checkpoint} to {arguments.repo_id}", width=400):
        try:
            pushed = push_folder(
                arguments.checkpoint,
                arguments.repo_id,
                private=arguments.private,
                revision=arguments.revision,
                commit_message=arguments.message,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise CommandError(
                f"cannot push to {arguments.repo_id}: the Hub got no token that it knows, takes one that may write: "
                "hf auth login, or the environment variable HF_TOKEN"
            ) from error
    size = f"{len(pushed.files)} files ({pushed.size / 1e6:.1f} MB)"
    # Also true if nothing was new, so that no commit was made.
    print(f"{pushed.repo_id} holds the checkpoint, {size}, in one commit:")
    print(pushed.commit.commit_url)
    print(f"To load this state and no later one: revision={pushed.commit.oid!r}")
    print(f"Card: {pushed.card}")
    if pushed.code:
        print(f"Code: added {', '.join(pushed.code)}, which the folder lacked")
    if not any(name.startswith("tokenizer") for name in pushed.files):
        print("The folder holds no tokenizer")
    if pushed.left_out:
        print(f"Left out: {', '.join(pushed.left_out)}")
