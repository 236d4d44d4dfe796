# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Draws a reading: scores, kept tokens, usage, decay and attention, each as one matplotlib figure.

No figure touches pyplot, so that nothing has to be closed: a notebook shows what a function returns. A text of more
than `MAX_COLUMNS` tokens is drawn in columns of several; `Reading.part` draws a part of it larger.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .kept_tokens import printable
from .readings import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A figure of this many columns gives each at least one pixel at `DPI`.
MAX_COLUMNS = 1000
DPI = 150
WIDTH = 12.0
# Curves of more would hide each other.
MAX_POINTS = 250
# Light for nothing, dark for everything; its lightness falls evenly, so that colour-blind readers see the same order.
COLOURS = "YlGnBu"
NOT_HELD = "#c4c4c4"
EDGE = "#D55E00"
# Okabe and Ito's colours, and a mark for each, because colour alone tells some readers nothing.
HEAD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEAD_MARKS = ("o", "^", "s", "D", "v", "P", "X")
SHOWN_LAYERS, SHOWN_HEADS = 3, 4
MOST_ATTENDED = 10
# More dots than this are one picture in a vector file, where each dot takes 100 bytes.
VECTOR_DOTS = 6000
# What a score of 0 and of 1 mean.
SCORE_MEANINGS = {
    "cosine": "0: the RNN foretold the token's value; 1: it foretold the opposite",
    "l2": "0: the RNN foretold the token's value; 1: it foretold nothing like it",
    "residual": "0: the token changed nothing in the RNN's state; 1: it changed much",
    "learned": "1: the router expects that later tokens attend to it",
    "learned_error": "1: the router expects that later tokens need it, from the token and the RNN's error",
    "random": "a hash of the position, which knows nothing of the token",
    "recency": "the position itself, in units of 2^-24: later tokens score higher",
}


def score_figure(
    reading: Reading, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> "Figure":
    """Routing scores along the text, one panel a layer, with the thresholds.

    Args:
        reading: of any length.
        layers: numbers of hybrid layers; `None`: the first, the middle and the last.
        heads: numbers of key/value heads; `None`: at most four of them.

    Raises:
        ValueError: for a layer or a head that the reading lacks.
    """
    rows, columns = rows_of(reading, layers), heads_of(reading, heads)
    figure = _new_figure(1.2 + 2.1 * len(rows))
    axes = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    dots = len(rows) * len(columns) * len(reading.texts)
    for axis, row in zip(axes, rows, strict=True):
        for head in columns:
            _draw_scores(axis, reading, row, head, rasterized=dots > VECTOR_DOTS)
        _mark_always_held(axis, reading, row)
        axis.set_ylabel(f"layer {reading.layers[row]}\nscore (0 to 1)")
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    if reading.router != "recency":
        axes[0].set_ylim(-0.02, 1.02)
    _label_tokens(axes[-1], reading, most=MAX_POINTS)
    shown = "filled marks" if column_width(len(reading.texts)) == 1 else "bands: least to greatest score of a column"
    _title(figure, reading, f"Routing scores: tokens on or above a head's dashed line are kept ({shown})")
    figure.supxlabel(f"score of the router {reading.router!r}: {SCORE_MEANINGS[reading.router]}", fontsize="small")
    return figure


def kept_figure(reading: Reading) -> "Figure":
    """Heat map, token by layer, of the share of heads that keep a token, with sinks and window outlined."""
    figure = _new_figure(2.2 + 0.28 * len(reading.layers))
    axis = figure.subplots()
    image = _heat_map(axis, reading, binned_mean(100 * reading.kept_share), vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, label="heads that keep it (%)")
    for row in range(len(reading.layers)):
        _separate_always_held(axis, reading, row)
    _label_rows(axis, reading.layers, "layer")
    _label_tokens(axis, reading)
    always = any(any(pair) for pair in _always_held(reading))
    note = "; beyond the orange lines sinks and window are held at any score" if always else ""
    _title(figure, reading, f"Which tokens each layer keeps: dark ones are kept by many heads{note}")
    return figure


def usage_figure(reading: Reading) -> "Figure":
    """Share of these tokens that each head of each layer keeps and, where a window holds more, has in memory."""
    panels = [("kept by the router", reading.kept)]
    if bool((reading.held != reading.kept).any()):
        panels.append(("held in memory: kept, or still in the window", reading.held))
    layers, heads = len(reading.layers), reading.kept.shape[2]
    figure = _new_figure(1.2 + (0.9 + 0.28 * heads) * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, marks) in zip(axes, panels, strict=True):
        usage = 100 * marks.float().mean(1).T
        image = axis.imshow(usage.numpy(), aspect="auto", cmap=COLOURS, vmin=0, vmax=100, interpolation="none")
        figure.colorbar(image, ax=axis, label="tokens (%)", ticks=(0, 50, 100))
        axis.set_title(name, fontsize="medium")
        _label_rows(axis, tuple(range(heads)), "key/value head")
        if layers <= 24 and heads <= 16:
            for head in range(heads):
                for row in range(layers):
                    share = usage[head, row].item()
                    ink = "white" if share > 65 else "black"
                    axis.text(row, head, f"{share:.0f}", ha="center", va="center", color=ink, fontsize="small")
    step = -(-layers // 24)
    axes[-1].set(xlabel="layer", xticks=range(0, layers, step), xticklabels=reading.layers[::step])
    _title(figure, reading, "Memory used by each head of each layer: dark heads keep most tokens")
    return figure


def decay_figure(
    reading: Reading, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> "Figure":
    """Heat maps, head by token, of scores and, under them, of the RNN's decay, a pair for each layer.

    Arguments and errors are those of `score_figure`.
    """
    rows, columns = rows_of(reading, layers), heads_of(reading, heads)
    figure = _new_figure(1.4 + len(rows) * (1.1 + 0.32 * len(columns)))
    axes = figure.subplots(2 * len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for row, above, below in zip(rows, axes[::2], axes[1::2], strict=True):
        scores, decay = (binned_mean(x[row].T[columns]) for x in (reading.scores, reading.decay))
        # A few outliers, such as the first token, would leave the others one colour.
        most = max(scores.quantile(0.99).item(), 1e-9)
        for axis, values, name, largest in ((above, scores, "score", most), (below, decay, "decay", 1.0)):
            image = _heat_map(axis, reading, values, vmin=0, vmax=largest)
            figure.colorbar(image, ax=axis, label=name, extend="max" if axis is above else "neither")
            _label_rows(axis, tuple(columns), "head")
        above.set_title(f"layer {reading.layers[row]}: routing score, and under it decay exp(g)", fontsize="medium")
    _label_tokens(axes[-1], reading)
    _title(figure, reading, "Scores and decay (share of its state that the RNN carries on): light decay is forgetting")
    return figure


def attention_figure(reading: Reading, layer: int | None = None) -> "Figure":
    """What the reading's query attended to: a heat map, query head by token, and the most attended tokens.

    Args:
        reading: of `read(..., query=...)`.
        layer: number of a hybrid layer; `None`: the last one.

    Raises:
        ValueError: if the reading has no query, or lacks the layer or every token up to the query.
    """
    if reading.query is None:
        raise ValueError("`reading` must hold the attention of a query: give `read` a `query`.")
    if reading.query < reading.first:
        raise ValueError(f"`reading` must begin at or before its query {reading.query}, got {reading.first}.")
    (row,) = rows_of(reading, [reading.layers[-1] if layer is None else layer])
    reading = reading.part(reading.first, min(reading.first + len(reading.texts), reading.query + 1))
    assert reading.attention is not None, "it comes with the query"
    assert reading.visible is not None
    weights = 100 * reading.attention[row]
    seen = reading.visible[row].T.repeat_interleave(len(weights) // reading.visible.shape[2], 0)
    columns = binned(weights, torch.sum).masked_fill(binned(~seen, torch.all), torch.nan)
    figure = _new_figure(4.6 + 0.22 * len(weights))
    above, below = figure.subplots(2, 1, height_ratios=[1 + 0.2 * len(weights), 2.6])
    _draw_weights(figure, above, reading, columns)
    _draw_most_attended(below, reading, weights.mean(0))
    _title(
        figure,
        reading,
        f"Layer {reading.layers[row]}: what the token at {reading.query} reads; grey tokens are not in memory",
    )
    return figure


def _draw_weights(figure: "Figure", axis: "Axes", reading: Reading, columns: torch.Tensor) -> None:
    from matplotlib.colors import PowerNorm

    # The root tells small weights apart.
    most = columns.nan_to_num().max().item()
    image = _heat_map(axis, reading, columns, norm=PowerNorm(0.5, vmin=0, vmax=most))
    axis.set_facecolor(NOT_HELD)
    figure.colorbar(image, ax=axis, label="attention (%)")
    _label_rows(axis, tuple(range(len(columns))), "query head")
    _label_tokens(axis, reading, "sum")


def _draw_most_attended(axis: "Axes", reading: Reading, percent: torch.Tensor) -> None:
    top = percent.topk(min(MOST_ATTENDED, len(percent)))
    names = [f"{reading.first + i}  {drawable(reading.texts[i])}" for i in top.indices.tolist()]
    axis.barh(range(len(names)), top.values.numpy(), color=HEAD_COLOURS[0])
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.invert_yaxis()
    axis.set(xlabel="attention, mean over query heads (%)", ylabel="position and token")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def rows_of(reading: Reading, layers: Sequence[int] | None) -> list[int]:
    """Where the layers with these numbers stand in a reading; `ValueError` for one that it lacks."""
    if layers is None:
        last = len(reading.layers) - 1
        return sorted({round(last * i / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)})
    for layer in layers:
        if layer not in reading.layers:
            kind = dict(reading.left_out).get(layer)
            got = f"{layer}" if kind is None else f"{layer}, which is of type {kind!r} and does not route"
            raise ValueError(f"`layers` must be among the hybrid layers {_listed(reading.layers)}, got {got}.")
    return [reading.layers.index(layer) for layer in layers]


def heads_of(reading: Reading, heads: Sequence[int] | None) -> list[int]:
    """The key/value heads to draw; `ValueError` for one that the model lacks."""
    count = reading.scores.shape[2]
    if heads is None:
        shown = min(count, SHOWN_HEADS)
        return sorted({round((count - 1) * i / max(shown - 1, 1)) for i in range(shown)})
    for head in heads:
        if not 0 <= head < count:
            raise ValueError(f"`heads` must be key/value heads from 0 to {count - 1}, got {head}.")
    return list(heads)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 12 else f"{numbers[0]} to {numbers[-1]}"


def column_width(length: int, most: int = MAX_COLUMNS) -> int:
    """Tokens in a column of a figure: 1 up to `MAX_COLUMNS` tokens, then as many as leave `most` columns."""
    return 1 if length <= MAX_COLUMNS else -(-length // most)


def binned(x: torch.Tensor, reduce: Any, most: int = MAX_COLUMNS) -> torch.Tensor:
    """Reduces each column's tokens in `[..., T]`, by `torch.mean`, `torch.sum` or alike, to `[..., columns]`."""
    return torch.stack([reduce(part, -1) for part in x.split(column_width(x.shape[-1], most), -1)], -1)


def binned_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of each column's tokens, `[..., T]` to `[..., columns]`."""
    return binned(x, torch.mean)


def drawable(text: str) -> str:
    """`text` in quotes, without control characters and without letters that matplotlib's font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    shown = printable(text).replace("\n", "⏎")
    shown = "".join(x if font.get_char_index(ord(x)) else "□" for x in shown)
    return f"“{shown[:24]}…”" if len(shown) > 25 else f"“{shown}”"


def _new_figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _title(figure: "Figure", reading: Reading, text: str) -> None:
    figure.suptitle(f"{text}\nat {reading.setting}", fontsize="large", parse_math=False)


def _label_tokens(axis: "Axes", reading: Reading, reduction: str = "mean", most: int = MAX_COLUMNS) -> None:
    width = column_width(len(reading.texts), most)
    note = "" if width == 1 else f"; each column is the {reduction} of {width} tokens"
    axis.set_xlabel(f"position (tokens{note})")
    axis.set_xlim(reading.first - 0.5, reading.first + len(reading.texts) - 0.5)


def _label_rows(axis: "Axes", numbers: tuple[int, ...], name: str) -> None:
    step = -(-len(numbers) // 24)
    axis.set(ylabel=name, yticks=range(0, len(numbers), step), yticklabels=numbers[::step])


def _heat_map(axis: "Axes", reading: Reading, columns: torch.Tensor, **scale: Any) -> Any:
    """Draws values `[rows, columns]` at the tokens' positions, however many tokens a column has."""
    left = reading.first - 0.5
    right = left + columns.shape[1] * column_width(len(reading.texts))
    extent = (left, right, len(columns) - 0.5, -0.5)
    # Without interpolation a vector file stores the values themselves, one pixel each, and zooming shows them.
    return axis.imshow(columns.numpy(), aspect="auto", cmap=COLOURS, interpolation="none", extent=extent, **scale)


def _draw_scores(axis: "Axes", reading: Reading, row: int, head: int, rasterized: bool) -> None:
    scores, threshold = reading.scores[row, :, head], reading.thresholds[row, head].item()
    colour, mark = HEAD_COLOURS[head % len(HEAD_COLOURS)], HEAD_MARKS[head % len(HEAD_MARKS)]
    label = f"head {head}, threshold {threshold:.3g}"
    if column_width(len(scores)) > 1:
        _draw_curve(axis, reading, scores, colour, label)
    else:
        x, kept = reading.first + torch.arange(len(scores)), reading.kept[row, :, head]
        look: dict[str, Any] = {"color": colour, "marker": mark, "linestyle": "", "markersize": 4}
        look["rasterized"] = rasterized
        axis.plot(x[kept].numpy(), scores[kept].numpy(), label=label, **look)
        axis.plot(x[~kept].numpy(), scores[~kept].numpy(), fillstyle="none", alpha=0.4, **look)
    # Positions, which `recency` scores by, lie far below 1.
    if 0 <= threshold <= (scores.max().item() if reading.router == "recency" else 1):
        axis.axhline(threshold, color=colour, linestyle="--", linewidth=1)


def _draw_curve(axis: "Axes", reading: Reading, values: torch.Tensor, colour: str, label: str) -> None:
    """Draws the mean of values `[T]` in columns of several tokens, between their extremes."""
    low, means, high = (binned(values, x, MAX_POINTS).numpy() for x in (torch.amin, torch.mean, torch.amax))
    width = column_width(len(values), MAX_POINTS)
    x = reading.first + torch.arange(len(means)).numpy() * width + (width - 1) / 2
    axis.plot(x, means, linewidth=1, color=colour, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _always_held(reading: Reading) -> list[tuple[int, int]]:
    """Of each layer, how many of the first and of the last tokens of the text it holds at any score."""
    # A window of w holds w - 1 tokens besides the current one.
    return [(sinks, max(window - 1, 0)) for sinks, window in zip(reading.sinks, reading.windows, strict=True)]


def _spans_always_held(reading: Reading, row: int) -> dict[str, tuple[float, float]]:
    """The part of the drawn positions that sinks and window cover, as edges on the axis."""
    sinks, young = _always_held(reading)[row]
    start, stop = reading.first, reading.first + len(reading.texts)
    spans = {"sinks": (0, min(sinks, reading.seen)), "window": (max(reading.seen - young, 0), reading.seen)}
    clipped = {name: (max(low, start), min(high, stop)) for name, (low, high) in spans.items()}
    return {name: (low - 0.5, high - 0.5) for name, (low, high) in clipped.items() if low < high}


def _mark_always_held(axis: "Axes", reading: Reading, row: int) -> None:
    for name, (low, high) in _spans_always_held(reading, row).items():
        look = {"hatch": "///", "edgecolor": "#999999"} if name == "sinks" else {"linewidth": 0}
        axis.axvspan(low, high, facecolor="#e8e8e8", zorder=0, label=f"{name}, held at any score", **look)


def _separate_always_held(axis: "Axes", reading: Reading, row: int) -> None:
    """Draws the inner edges of sinks and window, in a row of a heat map."""
    spans = _spans_always_held(reading, row)
    edges = [spans[name][inner] for name, inner in (("sinks", 1), ("window", 0)) if name in spans]
    # Two lines, so that one of them shows on every colour.
    for colour, width in (("white", 4), (EDGE, 2)) if edges else ():
        axis.vlines(edges, row - 0.5, row + 0.5, colors=colour, linewidth=width)
