# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""RecentTokens: the last tokens of each stream, kept or not, which attention reads while they are in its window."""

from typing import Any

import torch

from .paged_store_ham import KeptTokens, map_tensors, writable


class RecentTokens:
    """A ring of the last `size` real tokens of `num_streams` streams: the token at position `p` is in slot `p % size`.

    A token that comes of age leaves the ring for the pages if it was kept when it arrived, and is dropped otherwise.
    The number of tokens that a stream has seen, which `HAMCacheLayer` counts, says which slots are in use.

    Attributes:
        keys, values: `[N, size, K]` and `[N, size, V]`.
        scores: `[N, size]` float32.
        keep: `[N, size]` bool, the tokens that were kept when they arrived.
    """

    FIELDS = ("keys", "values", "scores", "keep")

    @torch.inference_mode(False)  # tensors made in inference mode could not be written outside of it
    def __init__(
        self,
        num_streams: int,
        size: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.size = size
        self.keys = torch.zeros(num_streams, size, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(num_streams, size, value_dim, dtype=dtype, device=device)
        self.scores = torch.zeros(num_streams, size, dtype=torch.float32, device=device)
        self.keep = torch.zeros(num_streams, size, dtype=torch.bool, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a writable copy, also of tensors made in inference mode."""
        vars(self).update(map_tensors(writable, state))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the ring."""
        return [getattr(self, name) for name in self.FIELDS]

    def to(self, device: torch.device) -> None:
        """Moves every tensor to `device`."""
        for name in self.FIELDS:
            setattr(self, name, getattr(self, name).to(device))

    def fill(self, seen: torch.Tensor) -> torch.Tensor:
        """`[N]` slots in use, the first of each stream, after it has `seen` `[N]` tokens."""
        return seen.clamp(max=self.size)

    def slots_in_order(self, seen: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and positions `[N, number]` of the oldest tokens, rising; a position below 0 marks an unused slot."""
        positions = (seen - self.size)[:, None] + torch.arange(number, device=seen.device)
        return positions % self.size, positions

    def in_order(self, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys, values, scores and `keep` `[N, size, ...]` from the oldest token on, and which slots are in use."""
        slots, positions = self.slots_in_order(seen, self.size)
        stream = torch.arange(len(seen), device=seen.device)[:, None]
        return *(x[stream, slots] for x in self.tensors()), positions >= 0

    def kept_tokens(self, seen: torch.Tensor) -> torch.Tensor:
        """`[N]` tokens of the ring that were kept."""
        slot = torch.arange(self.size, device=seen.device)
        return (self.keep & (slot < self.fill(seen)[:, None])).sum(1)

    def come_of_age(self, seen: torch.Tensor, added: torch.Tensor, most: int) -> KeptTokens:
        """The kept tokens that leave the ring when each stream takes in `added` `[N]` tokens, at most `most`."""
        slots, positions = self.slots_in_order(seen, min(most, self.size))
        leaves = (positions >= 0) & (positions < (seen + added - self.size)[:, None])
        stream, column = (leaves & self.keep.gather(1, slots)).nonzero(as_tuple=True)
        slot = slots[stream, column]
        keys, values, scores = (x[stream, slot] for x in (self.keys, self.values, self.scores))
        return KeptTokens(keys, values, scores, positions[stream, column].int(), stream)

    def write(
        self, tokens: tuple[torch.Tensor, ...], positions: torch.Tensor, seen: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Overwrites the oldest tokens with the newest.

        Args:
            tokens: keys, values, scores and `keep` of the new tokens, `[B, T, Hk, ...]`.
            positions: `[B, T]` of the new tokens among the real ones.
            seen: `[B]` real tokens of each row, the new ones included.
            real: `[B, T]` bool, false for padding, or `None`.

        Returns:
            `[B, T]` bool, the new tokens that are in the ring now.
        """
        newest = positions >= (seen - self.size)[:, None]
        newest = newest if real is None else newest & real
        row, time = newest.nonzero(as_tuple=True)
        slot = positions[row, time] % self.size
        heads = tokens[0].shape[2]
        for ring, new in zip(self.tensors(), tokens, strict=True):
            ring.unflatten(0, (-1, heads))[row, :, slot] = new[row, time]
        return newest

    def selected(self, streams: torch.Tensor) -> "RecentTokens":
        """A ring whose streams are copies of those at `streams` `[n]`."""
        ring = RecentTokens(
            len(streams), self.size, self.keys.shape[2], self.values.shape[2], self.keys.dtype, self.keys.device
        )
        ring.rollback({name: getattr(self, name)[streams] for name in self.FIELDS})
        return ring

    @torch.inference_mode(False)
    def mark(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor, for `rollback`."""
        return {name: getattr(self, name).clone() for name in self.FIELDS}

    def rollback(self, mark: dict[str, torch.Tensor]) -> None:
        """Takes over the tensors of a `mark`."""
        for name in self.FIELDS:
            setattr(self, name, mark[name])


__all__ = ["RecentTokens"]
