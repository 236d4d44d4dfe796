# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The command line that every script of `conversion_scripts` has."""

import argparse
import re
import sys

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..configuration_ham import ERROR_ROUTERS, LARGEST_WINDOW
from .declaration import Conversion
from .run import FEWEST_VERIFIED, Run

# Of a converted model that keeps a quarter of its tokens, before any training, they mend nearly all of the loss.
WINDOW, SINKS = 64, 4
# It chooses a quarter of SmolLM2's tokens better than `cosine` and chance do, before any training.
ROUTER = "l2"


def shard_size(text: str) -> str:
    """An argparse type: a size such as 5GB."""
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a size such as 5GB or 500MB")
    return text


def plain_name(text: str) -> str:
    """An argparse type: a name that a card can quote."""
    if not text.strip() or not text.isprintable() or "`" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a name such as OWNER/NAME")
    return text


def number_of_tokens(text: str) -> int:
    """An argparse type: a number of tokens, 0 or more."""
    if not text.isdecimal() or int(text) > LARGEST_WINDOW:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a whole number from 0 to {LARGEST_WINDOW}")
    return int(text)


def verified_tokens(text: str) -> int:
    """An argparse type: enough tokens for convolution and positions to matter."""
    if not text.isdecimal() or int(text) < FEWEST_VERIFIED:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, takes a whole number of {FEWEST_VERIFIED} or more; --no-verify compares nothing"
        )
    return int(text)


def build_parser(conversion: Conversion, description: str) -> argparse.ArgumentParser:
    """The command line that all scripts share."""
    parser = argparse.ArgumentParser(
        prog=conversion.script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    or_gguf = ", or a GGUF file" if conversion.reads_gguf else ""
    parser.add_argument("source", help=f"folder of the checkpoint{or_gguf}, or its name on the Hub")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--back", action="store_true", help="turn such a HAM into its source again")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.set_defaults(gguf_file=None)
    if conversion.reads_gguf:
        parser.add_argument("--gguf-file", metavar="FILE", help="GGUF file to read in the folder or repository")
    parser.set_defaults(window=None, sinks=None, router=None)
    if conversion.takes_window:
        help_text = "last tokens that attention sees whether they are kept or not; 0: none (default %(default)s)"
        parser.add_argument("--window", metavar="N", type=number_of_tokens, default=WINDOW, help=help_text)
        help_text = "first tokens that are always kept; 0: none (default %(default)s)"
        parser.add_argument("--sinks", metavar="N", type=number_of_tokens, default=SINKS, help=help_text)
        help_text = "how tokens are scored: %(choices)s (default %(default)s)"
        routers = (*ERROR_ROUTERS, "random")
        parser.add_argument("--router", metavar="ROUTER", choices=routers, default=ROUTER, help=help_text)
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    help_text = "the source's name in the card, such as OWNER/NAME (default: from SOURCE)"
    parser.add_argument("--name", type=plain_name, help=help_text)
    help_text = "largest file (default %(default)s)"
    parser.add_argument("--max-shard-size", metavar="SIZE", type=shard_size, default="5GB", help=help_text)
    help_text = f"tokens in each of two rows that are compared, {FEWEST_VERIFIED} or more (default %(default)s)"
    parser.add_argument("--verify-tokens", metavar="N", type=verified_tokens, default=128, help=help_text)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the logits of the two models")
    return parser


def main(conversion: Conversion, description: str, argv: list[str] | None = None) -> int:
    """Runs a script; returns its exit status: 0, 2 (the request cannot be carried out) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(conversion, description).parse_args(argv)
    try:
        run = Run(conversion, arguments, argv)
        run.from_ham() if arguments.back else run.to_ham()
    except (ValueError, OSError, ImportError, SafetensorError, StrictDataclassError) as error:
        print(f"{conversion.script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{conversion.script}: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0
