# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Asks SmolLM2 as a HAM the same questions at several cache sizes (`make demo-smollm2`).

Usage: ``python -m model_cards.smollm2.demo [PROMPT]``

The first call downloads the model and converts it; see `fetch.py` and `checkpoint.py`.
"""

import argparse
import math
import sys
from typing import Any

from ham_hf.cli.arguments import CommandError, Parser, exit_status, number
from ham_hf.cli.libraries import import_transformers

USAGES = [1.0, 0.5, 0.25, 0.0]
LETTER = """\
Dear Mara,

The key of locker 48271 at the harbour station is under the blue flower pot beside my door. Take it before Friday, \
for on Friday the painters come, and they will carry all the pots into the yard. In the locker you will find my \
grey coat, the two maps of the coast, and the tin with the letters that our grandmother wrote from Lisbon.

I have had a quiet winter. The roof leaked twice in January, and the second time the water came down into the \
kitchen, so that I had to cook on the little stove in the hall for a week. The neighbours were very kind: they lent \
me a pump and a ladder, and their son climbed up in the rain and nailed a sheet of tin over the hole. Since then it \
has been dry. In February I finished the large painting of the lighthouse, and a hotel in the town has bought it \
for its dining room. They paid well, and they want another one, of the market, before the summer.

My knee is better, and I walk to the end of the pier and back every morning with the dog. He is old now and deaf, \
and he sleeps in the sun most of the day, but when the fishing boats come in he still runs down to meet them. \
Write to me when you have arrived, and tell me whether the train over the mountains is as slow as people say.

With love,
Tomas"""
# Pairs of a text, which is shown once, and a question about it.
QUESTIONS = [
    ("", "What is the capital of France, and what is it known for?"),
    (LETTER, "Summarise this letter in two sentences."),
    (LETTER, "What is the number of the locker?"),
]
INTRODUCTION = """\
SmolLM2-135M-Instruct as a HAM, converted and not trained any further: its RNN does not yet remember what the cache
drops. Every head holds the last 64 tokens and the first 4; kv-usage is the fraction that heads are asked to keep of
all. Heads that answers need keep more than others: a detail told long ago is lost once these heads drop it."""


def build_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog="smollm2", description="Ask SmolLM2 as a HAM the same question at several cache sizes.")
    help_text = "what to ask (default: three questions, two of them about a letter)"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=help_text)
    usage = number("fractions from 0 to 1 (PROMPT goes before them)", 0, 1)
    help_text = "keep about this fraction of the tokens (default: 1 0.5 0.25 0)"
    parser.add_argument("--kv-usage", metavar="U", nargs="+", type=usage, default=USAGES, help=help_text)
    threshold = number("numbers such as 0 0.5 2 (PROMPT goes before them)", -math.inf, math.inf)
    help_text = "keep tokens with a score of at least X instead"
    parser.add_argument("--threshold", metavar="X", nargs="+", type=threshold, help=help_text)
    whole = number("a whole number from 1", 1, 2**31, int)
    help_text = "length of an answer (default: %(default)s)"
    parser.add_argument("--max-new-tokens", metavar="N", type=whole, default=40, help=help_text)
    return parser


def execute(arguments: argparse.Namespace) -> None:
    """Makes the model if it is not there, and answers."""
    import_transformers()
    from transformers import AutoTokenizer

    from ham_hf.cli.models import load_model
    from ham_hf.inspection.runs import Setting

    from .checkpoint import checkpoint

    if arguments.prompt is not None and not arguments.prompt.strip():
        raise CommandError("argument PROMPT: got an empty prompt, takes some text")
    path = str(checkpoint())
    model, tokenizer = load_model(path, "float32", "SmolLM2"), AutoTokenizer.from_pretrained(path)
    settings = [Setting("kv_usage", x) for x in arguments.kv_usage]
    if arguments.threshold:
        settings = [Setting("threshold", x) for x in arguments.threshold]
    print(f"\n{INTRODUCTION}")
    shown = ""
    for text, question in QUESTIONS if arguments.prompt is None else [("", arguments.prompt)]:
        if text != shown:
            print(f"\n{text}")
            shown = text
        print(f"\n> {question}\n")
        answer(model, tokenizer, f"{text}\n\n{question}".strip(), settings, arguments.max_new_tokens)


def answer(model: Any, tokenizer: Any, message: str, settings: list[Any], max_new_tokens: int) -> None:
    """Prints the answers to a message, one for each setting as it comes, and the table of what was held."""
    from rich.text import Text

    from ham_hf.inspection.comparison import ProseStreamer, ProseWriter, make_console
    from ham_hf.inspection.run_table import footnote, runs_table
    from ham_hf.inspection.runs import run

    console = make_console()
    messages = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    runs = []
    for setting in settings:
        console.print(Text(f"{setting.title}: ", style="cyan"), end="")
        streamer = ProseStreamer(tokenizer, ProseWriter(console))
        runs.append(run(model, ids, setting, False, 0, streamer, max_new_tokens=max_new_tokens, do_sample=False))
        console.print("\n")
    console.print(runs_table(runs, console.width))
    console.print(Text(f"\n{footnote(scored=False)}", style="dim"))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `exit_status`."""
    return exit_status("smollm2", lambda: execute(build_parser().parse_args(argv)), "a shorter prompt needs less")


if __name__ == "__main__":
    sys.exit(main())
