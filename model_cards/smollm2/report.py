# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The table and the picture of SmolLM2 as a HAM, from stored results alone.

Usage: ``python -m model_cards.smollm2.report``
"""

import statistics
from pathlib import Path

from ham_hf.evaluation.markdown import table
from ham_hf.evaluation.report import mean_and_error
from ham_hf.files import read_rows, write_whole

from ..rows import Row
from .measure import MAIN, Arm

ROOM = Path(__file__).parent
COLUMNS = [
    "window, sinks",
    "router",
    "asked for",
    "kept",
    "held",
    "loss (nats/token)",
    "above everything kept",
    "texts",
]
COLOURS = {"l2": "#2e6db5", "cosine": "#b5432e", "random": "#777777"}


def above(row: Row, everything: Row) -> tuple[float, float]:
    """Percent by which a row's loss is above that of everything kept, and its standard error, window by window.

    A row of fewer windows was judged by every second, or every fourth, of them.
    """
    step = len(everything["losses"]) // len(row["losses"])
    source = everything["losses"][::step]
    differences = [100 * (a - b) / statistics.mean(source) for a, b in zip(row["losses"], source, strict=True)]
    return mean_and_error(differences)


def is_everything(row: Row) -> bool:
    """True for the row of the source's own loss."""
    return row["arm"]["asked"] == 1.0


def in_order(rows: list[Row]) -> list[Row]:
    """Everything kept first, then by window, by what was asked for, and by loss."""
    return sorted(rows, key=lambda x: (not is_everything(x), x["arm"]["window"], -x["arm"]["asked"], x["loss"]))


def to_markdown(rows: list[Row]) -> str:
    """A row for each arm that has a result."""
    everything = next(row for row in rows if is_everything(row))
    lines = []
    for row in in_order(rows):
        arm = row["arm"]
        difference = "" if row is everything else "{:+.1f}% ± {:.1f}%".format(*above(row, everything))
        lines.append(
            [
                "" if row is everything else f"{arm['window']}, {arm['sinks']}",
                arm["router"] or "",
                "everything" if row is everything else f"{arm['asked']:.0%}",
                f"{row['kept']:.1%}",
                f"{row['held']:.1%}",
                f"{row['loss']:.4f}",
                difference,
                len(row["losses"]),
            ]
        )
    tail = (
        f"Texts of {everything['context']} tokens. Kept: by the router; held: at the end of a text, the tokens "
        "of window and sinks included. ± are standard errors over texts, each compared with itself when everything is "
        f"kept. Calibrated on {everything['calibration_windows']} other texts of this length."
    )
    return f"{table(COLUMNS, lines)}\n\n{tail} {between_routers(rows)}\n"


def between_routers(rows: list[Row]) -> str:
    """How far each router's loss is above that of `l2` on the texts that judge the main arms."""
    main = {x["arm"]["router"]: x["losses"] for x in rows if Arm(**x["arm"]) in MAIN and not is_everything(x)}
    told = []
    for router in [x for x in main if x != "l2"]:
        differences = [a - b for a, b in zip(main[router], main["l2"], strict=True)]
        mean, error = mean_and_error(differences)
        won = sum(x > 0 for x in differences)
        told.append(f"`{router}` by {mean:.3f} ± {error:.3f} nats ({won} of {len(differences)} texts)")
    return f"With window 64, asked for 25%, above `l2`: {', '.join(told)}."


def plot(rows: list[Row], path: Path) -> None:
    """Loss above that of everything kept against what is held, one line for each window and router."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    everything = next(row for row in rows if is_everything(row))
    sizes = sorted({(row["arm"]["window"], row["arm"]["sinks"]) for row in rows})
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, shown in zip(axes, (sizes, [size for size in sizes if size[0]]), strict=True):
        for (window, sinks), style in zip(sizes, ("o:", "o-", "s--"), strict=False):
            of_size = [x for x in rows if (x["arm"]["window"], x["arm"]["sinks"]) == (window, sinks)]
            for router, colour in COLOURS.items() if (window, sinks) in shown else ():
                # All routers meet where nothing more, and where everything is kept.
                line = [x for x in of_size if x["arm"]["router"] in (router, None) and not is_everything(x)]
                if all(x["arm"]["router"] is None for x in line):
                    continue
                line = sorted([*line, everything], key=lambda x: x["held"])
                points = [100 * x["held"] for x in line], [above(x, everything)[0] for x in line]
                axis.plot(
                    *points, style, color=colour, markersize=4, label=f"{router}, window {window}, sinks {sinks}"
                )
        axis.set(xlabel="tokens held at the end (%)", ylabel="loss above everything kept (%)")
        axis.grid(alpha=0.3)
    axes[0].set(title="All")
    axes[1].set(title="With a window; the black line: 4% above")
    axes[1].axhline(4, color="black", linewidth=0.8)
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Writes results.md and loss.png."""
    rows = read_rows(ROOM / "results.jsonl")
    report = to_markdown(rows)
    write_whole(ROOM / "results.md", report)
    plot(rows, ROOM / "loss.png")
    print(report)


if __name__ == "__main__":
    main()
