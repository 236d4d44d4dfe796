# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes files whole or not at all, for the tools."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# How the name of an unfinished file ends; only a process that was killed leaves one.
UNFINISHED = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a new file beside `path`, which takes its name when the block ends, and is removed when the block fails.

    Permissions are those of any new file, by the umask; safetensors would keep what it writes to the owner alone.

    Raises:
        OSError: that names `path`, for a folder that is missing or has this name, a full disk, a lack of rights.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        permissions = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield unfinished
            os.chmod(unfinished, permissions)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except SafetensorError as error:
        raise OSError(f"Cannot write {path}: {error}") from error
    except OSError as error:
        # A full disk is reported without a name, other failures with that of the unfinished file.
        if error.errno is None or error.filename not in (None, str(unfinished), unfinished):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path`, see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def copy_whole(source: Path, target: Path) -> None:
    """Copies `source` to `target`, see `whole_file`."""
    with whole_file(target) as unfinished:
        shutil.copyfile(source, unfinished)


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed has left of `whole_file` in `folder`."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()
