# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Draws a text with each token shaded by the number of heads that kept it, or numbered without colour."""

from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

# Backgrounds from "no head" to "every head"; light ones carry dark text, so they read on any terminal.
SHADES = ("", "#fff7bc", "#fee89a", "#fed976", "#feb24c", "#fd8d3c", "#f4602f", "#dd2c20", "#b60026", "#800026")
LEVELS = len(SHADES) - 1
FIRST_DARK = 7
NO_HEAD = "·"

# Control characters, which would move the cursor or ring a bell, become pictures such as ␛.
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡", 0x9: " "}
_CONTROL |= dict.fromkeys(range(0x80, 0xA0), "�")


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several that share a character, and the number of heads that kept it."""

    text: str
    heads: int


def printable(text: str) -> str:
    """`text` without control characters; line breaks stay."""
    return text.replace("\r\n", "\n").translate(_CONTROL)


def pieces_of(text: str, offsets: list[tuple[int, int]], heads: list[int]) -> list[Piece]:
    """Cuts `text` at its tokens.

    Args:
        text: the prompt.
        offsets: first and one-past-last character of each token; tokens that hold parts of one character overlap.
        heads: for each token, the number of heads that kept it.

    Returns:
        Pieces that join to `text` from the first offset on. Overlapping tokens form one piece, with their largest
        count.
    """
    spans: list[tuple[int, int]] = []
    for (start, end), count in zip(offsets, heads, strict=True):
        if end == start:  # a special token, which is not part of the text
            continue
        if spans and start < spans[-1][0]:
            spans[-1] = (max(end, spans[-1][0]), max(count, spans[-1][1]))
        else:
            spans.append((end, count))
    pieces, done = [], offsets[0][0] if offsets else 0
    for end, count in spans:
        pieces.append(Piece(text[done:end], count))
        done = end
    return pieces + ([Piece(text[done:], 0)] if done < len(text) else [])


def level(heads: int, num_heads: int) -> int:
    """Step 0 (no head) to `LEVELS` (every head); one head alone is at least step 1."""
    return -(-heads * LEVELS // num_heads)


def shade(step: int) -> str:
    """The style of a level."""
    if step == 0:
        return "dim"
    return f"{'#ffffff' if step >= FIRST_DARK else '#1a1a1a'} on {SHADES[step]}"


def shaded_text(pieces: list[Piece], num_heads: int) -> Text:
    """The pieces in colour."""
    text = Text()
    for piece in pieces:
        text.append(printable(piece.text).replace("\n", "⏎\n"), style=shade(level(piece.heads, num_heads)))
    return text


def numbered_text(pieces: list[Piece], num_heads: int, width: int) -> Text:
    """The pieces in lines of `width` columns, and below each line the tokens' levels, each under its first letter."""
    letters, marks = "", ""
    for piece in pieces:
        shown = printable(piece.text)
        step = level(piece.heads, num_heads)
        first = len(shown) - len(shown.lstrip()) if shown.strip() else 0
        letters += shown
        marks += " " * first + (str(step) if step else NO_HEAD) + " " * (len(shown) - first - 1)
    lines = []
    for start, end in wrapped(letters, width - 1):
        line, numbers = letters[start:end], marks[start:end]
        below = "".join(m.ljust(max(1, cell_len(c))) for c, m in zip(line, numbers, strict=True))
        lines += [line.replace("\n", "⏎"), below.rstrip()]
    return Text("\n".join(lines), no_wrap=True)


def wrapped(text: str, width: int) -> list[tuple[int, int]]:
    """Cuts `text` into `(start, end)` lines of at most `width` columns, after line breaks and at spaces."""
    lines, start, space, columns = [], 0, 0, 0
    for i, character in enumerate(text):
        columns += cell_len(character)
        if columns > width and character != "\n" and i > start:
            cut = space if space > start else i
            lines.append((start, cut))
            start, columns = cut, cell_len(text[cut : i + 1])
        if character == "\n":
            lines.append((start, i + 1))
            start, columns = i + 1, 0
        elif character.isspace():
            space = i + 1
    return lines + ([(start, len(text))] if start < len(text) else [])


def legend(num_heads: int, colour: bool) -> Text:
    """One line that explains the shades, or the numbers."""
    text = Text(f"of {num_heads} heads, those that keep a token: ")
    if not colour:
        return text.append(f"{NO_HEAD} none, 1 fewest ... {LEVELS} all")
    text.append("none ", style=shade(0))
    for step in range(1, LEVELS + 1):
        text.append("   ", style=shade(step))
    return text.append(" all")
