# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Shows runs of one prompt on a terminal or in a pipe: each text as it comes, then the table and the kept tokens."""

import os
import re
import sys
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer

from ..configuration_ham import HAMConfig
from .kept_tokens import legend, numbered_text, pieces_of, printable, shaded_text
from .run_table import footnote, runs_table
from .runs import Run, Setting

# Only the end of a longer prompt is repeated before each continuation, and drawn token by token.
SHOWN_CHARACTERS = 300
DRAWN_TOKENS = 1500
PIPE_COLUMNS = 100


def make_console() -> Console:
    """A console on stdout; a pipe gets plain text of a fixed width."""
    plain = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_COLUMNS if plain else None, highlight=False, markup=False, emoji=False)


class ProseWriter:
    """Writes text as it comes, broken between words on a terminal and unbroken in a pipe."""

    def __init__(self, console: Console):
        self.console = console
        self.column = 0

    def write(self, text: str, style: str) -> None:
        """Appends `text` to the current line."""
        broken = ""
        for part in re.findall(r"\n|[^\S\n]+|\S+", printable(text)):
            full = self.console.is_terminal and self.column + cell_len(part) > self.console.width
            if full and self.column and part != "\n":
                broken, self.column = broken + "\n", 0
                part = part.lstrip()
            broken += part
            self.column = 0 if part == "\n" else self.column + cell_len(part)
        self.console.print(Text(broken, style=style), end="", soft_wrap=True)
        self.console.file.flush()


class ProseStreamer(TextStreamer):
    """Passes the words that `generate` produces to a writer."""

    def __init__(self, tokenizer: Any, writer: ProseWriter):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.writer = writer

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Writes the next words."""
        self.writer.write(text, "bold")


class Comparison:
    """The output of one call: a section for each run, and a conclusion.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the text that every run continues.
    """

    def __init__(self, tokenizer: Any, prompt: str):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.console = make_console()
        self.runs: list[Run] = []

    def start(self, setting: Setting) -> ProseStreamer:
        """Prints a run's heading and the end of the prompt; returns the streamer that writes the continuation."""
        self._heading(setting.title)
        end = self.prompt
        if len(end) > SHOWN_CHARACTERS:
            end = "… " + end[-SHOWN_CHARACTERS:].split(maxsplit=1)[-1]
        writer = ProseWriter(self.console)
        writer.write(end, "dim")
        return ProseStreamer(self.tokenizer, writer)

    def end(self, run: Run) -> None:
        """Closes a run's section."""
        self.runs.append(run)
        self.console.print("\n")

    def conclude(self, config: HAMConfig) -> None:
        """Prints the table of all runs, and the prompt with the tokens that one of them kept."""
        self._heading("what the cache kept")
        self.console.print(runs_table(self.runs, self.console.width))
        scored = self.runs[0].loss is not None
        self.console.print(Text(f"\n{footnote(scored)}\n", style="dim"))
        # The run that keeps closest to one half distinguishes tokens best.
        run = min(self.runs, key=lambda run: abs(run.usage - 0.5))
        self._heading(f"what was kept of the prompt at {run.setting.title}")
        self._draw_kept_tokens(run, config.num_hybrid_layers * int(config.num_key_value_heads or 0))

    def _heading(self, text: str) -> None:
        self.console.rule(Text(text, style="bold"), align="left", style="dim")

    def _draw_kept_tokens(self, run: Run, num_heads: int) -> None:
        console = self.console
        if set(run.prompt_heads) in ({0}, {num_heads}):
            console.print("nothing, by any head" if run.prompt_heads[0] == 0 else "every token, by every head")
            return
        if not self.tokenizer.is_fast:
            console.print("(not drawn: this tokenizer does not say where its tokens lie in the text)")
            return
        colour = console.color_system is not None and not console.no_color
        console.print(legend(num_heads, colour))
        console.print()
        offsets = self.tokenizer(self.prompt, return_offsets_mapping=True)["offset_mapping"][-DRAWN_TOKENS:]
        hidden = len(run.prompt_heads) - len(offsets)
        if hidden:
            console.print(f"({hidden:,} earlier tokens are not drawn)")
        pieces = pieces_of(self.prompt, offsets, run.prompt_heads[hidden:])
        console.print(shaded_text(pieces, num_heads) if colour else numbered_text(pieces, num_heads, console.width))
