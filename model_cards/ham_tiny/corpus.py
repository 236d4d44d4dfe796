# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Builds the training text of ham-tiny from long public-domain English works: cleaned, without duplicates, split.

Usage: ``python -m model_cards.ham_tiny.corpus --output DIR``
"""

import argparse
import hashlib
import html
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ham_hf.training.documents import SPLIT_FILES, Document, write_documents

from .sources import SOURCES, Source, download, read_members

HELD_OUT_PERCENT = 3

DUPLICATE_WINDOW_WORDS = 8
DUPLICATE_SAMPLING = 8
DUPLICATE_SHARE = 0.5

TABLE_DIGIT_SHARE = 0.12


# --- Cleaning --------------------------------------------------------------------------------------------------------

PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2011": "-",
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "_": None,  # plain-text books mark italics with underscores
    }
)
BACK_MATTER = re.compile(
    r"^[* ]*(End of (the |this )?Project Gutenberg|A NOTE ON THE TEXT).*", re.DOTALL | re.IGNORECASE | re.MULTILINE
)
EDITORIAL_NOTE = re.compile(
    r"\[(illustration|laughter|applause|missing text|at this point in|later editions|\d)[^\]]*\]"
    r"|\((laughter|applause)\W*\)",
    re.IGNORECASE,
)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
CONTROL_CHARACTERS = re.compile(r"[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff\ufffd]")
SENTENCE_BOUNDARY = re.compile(r'(?<=[.!?]["\')]) +|(?<=[.!?]) +')


def clean_text(raw: str) -> str:
    """Turns a plain-text work into paragraphs of one line each, with a blank line between them."""
    text = unicodedata.normalize("NFC", html.unescape(raw)).replace("\r\n", "\n")
    text = BACK_MATTER.sub("", text).translate(PUNCTUATION)
    text = EDITORIAL_NOTE.sub("", TAG.sub("", text))
    text = CONTROL_CHARACTERS.sub(" ", text)
    paragraphs = (clean_paragraph(paragraph) for paragraph in re.split(r"\n[ \n]*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def clean_paragraph(paragraph: str) -> str:
    """Joins the lines of a paragraph and drops ornaments and the rows of tables; empty if nothing is left."""
    joined = " ".join(paragraph.split())
    if not any(character.isalpha() for character in joined):
        return ""
    return " ".join(sentence for sentence in SENTENCE_BOUNDARY.split(joined) if not is_table_row(sentence))


def is_table_row(sentence: str) -> bool:
    """Tells rows of figures, which the speeches run into their prose, from sentences that mention a figure."""
    digits = sum(character.isdigit() for character in sentence)
    return "....." in sentence or (digits > 8 and digits > TABLE_DIGIT_SHARE * len(sentence))


# --- Deduplicating and splitting -------------------------------------------------------------------------------------


def stable_hash(text: str) -> int:
    """Returns the same number for the same text on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def fingerprint(text: str) -> set[int]:
    """Returns hashes of a sample of the text's word windows; the sample depends on the words, not on their place."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - DUPLICATE_WINDOW_WORDS + 1)
    windows = (" ".join(words[start : start + DUPLICATE_WINDOW_WORDS]) for start in range(last))
    # CRC-32 rather than a cryptographic hash: there are millions of windows, and a rare collision changes nothing.
    hashes = (zlib.crc32(window.encode()) for window in windows)
    return {value for value in hashes if value % DUPLICATE_SAMPLING == 0}


def drop_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Keeps the first of works that are equal or are editions of one work."""
    seen: set[int] = set()
    seen_texts: set[int] = set()
    for document in documents:
        hashes = fingerprint(document.text)
        text_hash = stable_hash(document.text)
        if text_hash in seen_texts or (hashes and len(hashes & seen) > DUPLICATE_SHARE * len(hashes)):
            print(f"{document.source}: left out '{document.title}', another source has it already", flush=True)
            continue
        seen |= hashes
        seen_texts.add(text_hash)
        yield document


def is_held_out(document: Document, held_out_titles: frozenset[str] | None) -> bool:
    """True if a whole work is held out, so that none of its names or phrases is learned from another part of it."""
    if held_out_titles is not None:
        return document.title in held_out_titles
    return stable_hash(document.title) % 100 < HELD_OUT_PERCENT


def split_documents(documents: Iterable[Document], sources: Iterable[Source]) -> dict[str, list[Document]]:
    """Assigns every document to the training or to the held-out split."""
    held_out_titles = {source.package: source.held_out for source in sources}
    splits: dict[str, list[Document]] = {split: [] for split in SPLIT_FILES}
    for document in documents:
        held_out = is_held_out(document, held_out_titles[document.source])
        splits["held_out" if held_out else "train"].append(document)
    return splits


# --- Building --------------------------------------------------------------------------------------------------------


def load_documents(source: Source, cache: Path) -> Iterator[Document]:
    """Downloads, reads and cleans one source."""
    archive = download(source, cache)
    found = False
    for name, content in read_members(source, archive):
        for title, raw in source.read(name, content):
            found = True
            yield Document(source.package, title, clean_text(raw))
    if not found:
        raise RuntimeError(
            f"{source.package} {source.version} has no file like {source.patterns}; correct the patterns."
        )


def print_table(splits: dict[str, list[Document]]) -> None:
    """Prints source, licence, and documents and bytes in each split."""
    print(f"{'source':<24} {'version':<8} {'licence':<26} {'split':<9} {'documents':>9} {'bytes':>10}")
    for source in SOURCES:
        for split, documents in splits.items():
            texts = [document.text for document in documents if document.source == source.package]
            size = sum(len(text.encode()) for text in texts)
            print(
                f"{source.package:<24} {source.version:<8} {source.licence:<26} {split:<9} {len(texts):>9} {size:>10}"
            )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Build the training text of the embedded checkpoint.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two splits")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded packages; default: OUTPUT/packages")
    arguments = parser.parse_args()

    cache = arguments.cache or arguments.output / "packages"
    arguments.output.mkdir(parents=True, exist_ok=True)
    documents = (document for source in SOURCES for document in load_documents(source, cache))
    splits = split_documents(drop_duplicates(documents), SOURCES)
    for split, file_name in SPLIT_FILES.items():
        write_documents(arguments.output / file_name, splits[split])
    print_table(splits)


if __name__ == "__main__":
    main()
