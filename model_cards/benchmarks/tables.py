# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Puts measured tables into documents, between markers, so that no figure is copied by hand.

Usage: ``python -m model_cards.benchmarks.tables README.md usage=model_cards/ham_tiny/usage.md``. From a long table,
``study=model_cards/study/differences.md:cosine - gdn;cosine - random`` takes only the rows with these first cells.
"""

import argparse
from pathlib import Path

from ham_hf.files import write_whole


def insert_table(document: str, name: str, table: str) -> str:
    """Replaces the text between `<!-- name:begin -->` and `<!-- name:end -->`; `ValueError` without a marker."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"The document must hold {begin} and {end} once each.")
    head, rest = document.split(begin)
    return f"{head}{begin}\n{table.strip()}\n{end}{rest.split(end)[1]}"


def rows_of(table: str, labels: list[str]) -> str:
    """The first table of a text, with the rows whose first cell is in `labels`; `ValueError` if one is missing."""
    lines = table.strip().split("\n\n")[0].splitlines()
    rows = [line for line in lines[2:] if line.split("|")[1].strip() in labels]
    missing = sorted(set(labels) - {row.split("|")[1].strip() for row in rows})
    if missing:
        raise ValueError(f"The table has no rows {missing}.")
    return "\n".join([*lines[:2], *rows])


def main() -> None:
    """Inserts every `NAME=FILE` into the document and writes it whole."""
    parser = argparse.ArgumentParser(description="Puts measured tables into a document.")
    parser.add_argument("document", type=Path, help="a Markdown file with markers")
    help_text = "the table between the markers NAME, or its rows with these first cells"
    parser.add_argument("tables", nargs="+", metavar="NAME=FILE[:LABEL;...]", help=help_text)
    arguments = parser.parse_args()
    text = arguments.document.read_text()
    for assignment in arguments.tables:
        name, _, path = assignment.partition("=")
        path, _, labels = path.partition(":")
        table = Path(path).read_text()
        text = insert_table(text, name, rows_of(table, labels.split(";")) if labels else table)
    write_whole(arguments.document, text)


if __name__ == "__main__":
    main()
