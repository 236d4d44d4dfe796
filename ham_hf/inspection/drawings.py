# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Every figure of a reading with its name and caption, and figures as files."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from ..files_ham import whole_file
from .figures import (
    SCORE_MEANINGS,
    attention_figure,
    decay_figure,
    kept_figure,
    rows_of,
    score_figure,
    usage_figure,
)
from .readings import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure, its name in a file's name, and the sentences under it."""

    name: str
    figure: "Figure"
    caption: str

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG file, the same each time."""
        import matplotlib

        file = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    def write(self, folder: Path, stem: str) -> list[str]:
        """Writes the figure as PNG and SVG, each whole or not at all; returns the files' names."""
        # Drawing moves a figure's parts a little; the vector file comes first, so that it is the same each time.
        write_whole(folder / f"{stem}.svg", self.svg)
        with whole_file(folder / f"{stem}.png") as unfinished:
            self.figure.savefig(unfinished, format="png")
        return [f"{stem}.png", f"{stem}.svg"]


def drawings(
    reading: Reading, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> list[Drawing]:
    """Every figure of a reading: kept tokens, usage, scores, decay and, with a query, the attention of each layer.

    Args:
        reading: of any length.
        layers, heads: as in `score_figure`, which raises their errors.
    """
    meaning = SCORE_MEANINGS[reading.router]
    drawn = [
        Drawing(
            "kept",
            kept_figure(reading),
            "Each row is a layer, each column a token. Dark tokens are kept by many of the layer's key/value heads. "
            "Look for tokens that every layer keeps, and for layers that keep little.",
        ),
        Drawing(
            "usage",
            usage_figure(reading),
            "Percent of the tokens that each key/value head keeps. Memory goes to the dark heads; "
            "a light head relies on the RNN.",
        ),
        Drawing(
            "scores",
            score_figure(reading, layers, heads),
            f"Score of each token by the router {reading.router!r}: {meaning}. A head keeps what reaches its dashed "
            "line. Look for peaks at names, numbers and breaks in the text.",
        ),
        Drawing(
            "decay",
            decay_figure(reading, layers, heads),
            "The RNN's decay exp(g) under the routing scores. At 1 (dark) the RNN carries its whole state on, at 0 "
            "(light) it forgets everything. Look for high scores after light tokens.",
        ),
    ]
    if reading.query is not None and reading.query >= reading.first:
        for row in rows_of(reading, layers):
            number = reading.layers[row]
            caption = (
                f"Where the token at position {reading.query} reads in layer {number}. Grey tokens are not in memory, "
                "so it cannot read them. The bars are the tokens that it reads most."
            )
            drawn.append(Drawing(f"attention-layer-{number}", attention_figure(reading, number), caption))
    return drawn


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """An SVG file as an element of an HTML page.

    Args:
        svg: the file.
        prefix: put before every name in it, because a page of several figures has one space of names.
        label: what a screen reader says, escaped.
    """
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
