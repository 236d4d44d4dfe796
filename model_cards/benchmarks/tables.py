# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Puts measured tables into documents, between markers, so that no figure is copied by hand.

Usage: ``python -m model_cards.benchmarks.tables README.md usage=model_cards/ham_tiny/usage.md``
"""

import argparse
from pathlib import Path

from ham_hf.files import write_whole


def insert_table(document: str, name: str, table: str) -> str:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`; `ValueError` without a marker."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"The document must hold {begin} and {end} once each.")
    head, rest = document.split(begin)
    return f"{head}{begin}\n{table.strip()}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Inserts every `NAME=FILE` into the document and writes it whole."""
    parser = argparse.ArgumentParser(description="Puts measured tables into a document.")
    parser.add_argument("document", type=Path, help="a Markdown file with markers")
    parser.add_argument("tables", nargs="+", metavar="NAME=FILE", help="which table goes between which markers")
    arguments = parser.parse_args()
    text = arguments.document.read_text()
    for assignment in arguments.tables:
        name, _, path = assignment.partition("=")
        text = insert_table(text, name, Path(path).read_text())
    write_whole(arguments.document, text)


if __name__ == "__main__":
    main()
