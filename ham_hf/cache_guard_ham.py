# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""CacheGuard: one call at a time changes a cache, and a call that stopped halfway is not forgotten."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class CacheGuard:
    """Guards an object whose parts a call changes one after the other.

    Attributes:
        broken: the call that stopped between two parts and why, or `None`.
    """

    def __init__(self) -> None:
        self.broken: str | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Copies everything but the lock."""
        return {"broken": self.broken}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy with a free lock."""
        self.broken = state["broken"]
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises `RuntimeError` if a call stopped halfway."""
        if self.broken is not None:
            raise RuntimeError(
                f"This cache was left half-changed when {self.broken}. Call `reset()` and give the whole conversation "
                "again, or load a saved cache."
            )

    def forgive(self) -> None:
        """Clears the record of a call that stopped halfway."""
        self.broken = None

    @contextlib.contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Keeps other calls away while `what` changes the object.

        Raises:
            RuntimeError: if an earlier call stopped halfway, or another one is changing the object.
        """
        self.check()
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"`{what}` found this cache in use by another call: give every thread a cache of its own, or wait."
            )
        try:
            yield
        finally:
            self._lock.release()

    def broke(self, what: str, error: BaseException) -> None:
        """Remembers that `what` stopped halfway, and why."""
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self.broken = f"`{what}` stopped ({reason})"
