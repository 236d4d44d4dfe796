# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes a file whole or not at all."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Suffix of the folder of an unfinished file; only a process that was killed leaves one.
UNFINISHED = ".partial"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a new file, which takes the place of `path` when the block ends and is removed when the block fails.

    The file lies in a hidden folder of its own beside `path`, with whatever the block's libraries make beside it.
    Folders that killed processes left are removed. Permissions are those of any new file, by the umask.

    Raises:
        OSError: naming `path`, for a missing folder, a folder of this name, a full disk or missing permissions.
    """
    prefix = f".{path.name}."
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "A file cannot take the place of a folder", str(path))
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "There is no folder for this file", str(path))
        with _folder_beside(path, prefix) as folder:
            unfinished = folder / path.name
            unfinished.touch(exist_ok=False)
            # safetensors makes its files readable by the owner only.
            permissions = stat.S_IMODE(unfinished.stat().st_mode)
            yield unfinished
            os.chmod(unfinished, permissions)
            os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"Cannot write {path}: {error}") from error
    except OSError as error:
        # A full disk is reported without a name, other failures with that of the unfinished file.
        if error.errno is None or not (error.filename is None or str(path.parent / prefix) in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _folder_beside(path: Path, prefix: str) -> Iterator[Path]:
    """A new folder beside `path` that this process holds; removes folders that no process holds any more."""
    for left in path.parent.iterdir():
        if left.name.startswith(prefix) and left.name.endswith(UNFINISHED):
            _remove_abandoned(left)
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(UNFINISHED, prefix, path.parent))
            # Until this process holds it, another may take it for abandoned.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                stack.enter_context(_held(folder))
                if folder.is_dir():
                    break
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _remove_abandoned(folder: Path) -> None:
    if fcntl is None:  # nobody can tell
        return
    # Another process holds it or has just removed it, or it is a user's file.
    with contextlib.suppress(BlockingIOError, FileNotFoundError, NotADirectoryError), _held(folder):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on `folder` that ends with the process; `BlockingIOError` if another one has it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


__all__ = ["UNFINISHED", "whole_file"]
