# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""One HTML page of readings: the shaded text and every figure, with nothing to fetch from anywhere."""

import json
from collections.abc import Sequence
from html import escape
from string import Template

from .drawings import Drawing, inline_svg
from .kept_tokens import printable
from .page_parts import SCRIPT, STYLE, TEMPLATE
from .readings import Reading

# Of a longer text the page shows this many passages at equal distances.
SHOWN_TOKENS = 4000
PASSAGES = 10


def html_page(readings: Sequence[Reading], drawn: Sequence[Sequence[Drawing]], source: str) -> str:
    """The page.

    Args:
        readings: of the same tokens, one for each setting.
        drawn: the figures of each.
        source: what the page says about the text and the model.

    Raises:
        ValueError: if there is no reading, or they are of different tokens.
    """
    if not readings or any((x.first, x.texts, x.layers) != _what(readings[0]) for x in readings):
        raise ValueError("`readings` must be one or more readings of the same tokens by the same model.")
    first = readings[0]
    spans = passages(len(first.texts))
    settings = [f'<option value="{i}">{escape(x.setting)}</option>' for i, x in enumerate(readings)]
    sections = [
        _section(i, reading, figures) for i, (reading, figures) in enumerate(zip(readings, drawn, strict=True))
    ]
    data = {
        "first": first.first,
        "layers": first.layers,
        "heads": first.kept.shape[2],
        "settings": [_tokens_data(reading, spans) for reading in readings],
    }
    # Numbers and hexadecimal digits only, so nothing in it can end the script.
    script = SCRIPT.replace("DATA", json.dumps(data, separators=(",", ":")))
    return Template(TEMPLATE).substitute(
        style=STYLE,
        source=escape(source),
        settings="".join(settings),
        note=escape(_note(len(first.texts), spans)),
        text=_text(first, spans),
        sections="".join(sections),
        script=script,
    )


def _what(reading: Reading) -> tuple[int, tuple[str, ...], tuple[int, ...]]:
    return reading.first, reading.texts, reading.layers


def passages(length: int) -> list[range]:
    """The tokens that the page shows of `length`: all, or passages at equal distances, the first and last included."""
    if length <= SHOWN_TOKENS:
        return [range(length)]
    size = SHOWN_TOKENS // PASSAGES
    starts = [round(i * (length - size) / (PASSAGES - 1)) for i in range(PASSAGES)]
    return [range(start, start + size) for start in starts]


def _note(length: int, spans: list[range]) -> str:
    if len(spans) == 1:
        return ""
    return (
        f"The text has {length:,} tokens; {len(spans)} passages of {len(spans[0])} tokens are shown here. "
        "The figures show all of it."
    )


def _text(reading: Reading, spans: list[range]) -> str:
    """The tokens, each an element shaded by the share of heads that keep it at the first setting."""
    counts, heads = reading.kept.sum((0, 2)).tolist(), reading.kept.shape[0] * reading.kept.shape[2]
    scores = reading.scores.mean((0, 2)).tolist()
    parts, end = [], 0
    for span in spans:
        if span.start > end:
            parts.append(f'<span class="gap">… {span.start - end:,} tokens …</span>')
        for i in span:
            title = f"{reading.first + i}: {counts[i]} of {heads} heads, mean score {scores[i]:.2f}"
            shown = escape(printable(reading.texts[i])).replace("\n", "⏎\n")
            parts.append(
                f'<b class="k{shade_step(counts[i], heads)}{_held_class(reading, i)}" title="{title}">{shown}</b>'
            )
        end = span.stop
    return "".join(parts)


def shade_step(count: int, heads: int) -> int:
    """The shade of a token that `count` of `heads` heads keep: 0 for none, 1 to 8 for some, 9 for all."""
    return 9 if count == heads else min(8, -(-8 * count // heads))


def _held_class(reading: Reading, i: int) -> str:
    position = reading.first + i
    if position < max(reading.sinks):
        return " sink"
    return " window" if position > reading.seen - max(reading.windows) else ""


def _tokens_data(reading: Reading, spans: list[range]) -> dict[str, list[str] | list[int]]:
    """For each shown token, the heads that keep it as the bits of a hexadecimal number, and its mean score in percent.

    The lowest bit is the first head of the first layer.
    """
    bits = reading.kept.transpose(0, 1).flatten(1).tolist()
    scores = (100 * reading.scores.mean((0, 2))).round().int().tolist()
    shown = [i for span in spans for i in span]
    kept = ["".join("01"[x] for x in reversed(bits[i])) for i in shown]
    return {"kept": [f"{int(x, 2):x}" for x in kept], "scores": [scores[i] for i in shown]}


def _section(number: int, reading: Reading, figures: Sequence[Drawing]) -> str:
    """The figures of one setting."""
    parts = []
    for drawing in figures:
        caption = escape(drawing.caption)
        svg = inline_svg(drawing.svg, f"s{number}-{drawing.name}-", caption)
        scroller = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(drawing.name)}">{svg}</div>'
        parts.append(f"<figure>{scroller}<figcaption>{caption}</figcaption></figure>")
    return f'<section data-setting="{number}"><h2>{escape(reading.setting)}</h2>{"".join(parts)}</section>'
