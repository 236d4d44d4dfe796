# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Conversations, the memories of requests that have ended, found again by the tokens that they have seen.

The next turn of a conversation begins with all the tokens of the turns before. Where a request with the same routing
arguments has ended after just these, the new one takes its memory over and reads only what is new. A state stands for
all tokens up to one, so a memory serves requests that go on from its end, and no other.
"""

import hashlib
import json
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

Memory = TypeVar("Memory")


class Key(NamedTuple):
    """What a memory depends on.

    Attributes:
        group: routing arguments, and the salt that keeps the memories of unlike users apart.
        tokens: number of tokens.
        digest: their hash, a cryptographic one: a collision would show one user's conversation to another.
    """

    group: str
    tokens: int
    digest: bytes


def group_of(routing: dict[str, Any], salt: str | None) -> str:
    """The part of a key that is known without the tokens."""
    return json.dumps([routing, salt], sort_keys=True)


class Conversations(Generic[Memory]):
    """Memories by their keys, from the one unused for longest to the newest."""

    def __init__(self) -> None:
        self._memories: OrderedDict[Key, Memory] = OrderedDict()
        self._lengths: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return len(self._memories)

    def add(self, group: str, tokens: Sequence[int], memory: Memory) -> Memory | None:
        """Keeps a memory; returns the one that it replaces."""
        key = Key(group, len(tokens), hashlib.sha256(array("q", tokens)).digest())
        old = self.take(key) if key in self._memories else None
        self._memories[key] = memory
        self._lengths[key.group, key.tokens] += 1
        return old

    def longest(self, group: str, tokens: Sequence[int]) -> Key | None:
        """The key of the memory that has seen the most of the first of these tokens, but not all of them."""
        lengths = sorted(n for kind, n in self._lengths if kind == group and n < len(tokens))
        digest, read, found = hashlib.sha256(), 0, None
        for length in lengths:
            digest.update(array("q", tokens[read:length]))
            read = length
            key = Key(group, length, digest.copy().digest())
            found = key if key in self._memories else found
        return found

    def get(self, key: Key) -> Memory:
        """The memory with a key."""
        return self._memories[key]

    def take(self, key: Key) -> Memory:
        """Removes a memory, and returns it."""
        length = (key.group, key.tokens)
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
        return self._memories.pop(key)

    def take_oldest(self, but: Key | None = None) -> Memory | None:
        """Removes and returns the memory unused for longest; `None` if there is none but that with the key `but`."""
        for key in self._memories:
            if key != but:
                return self.take(key)
        return None
