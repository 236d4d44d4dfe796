# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""PagedStore: memory for the kept tokens of each stream, any number of them, in pages that never move."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .attention_ham import slab_table

# Small pages waste little on a head that keeps few tokens; 16 is also the smallest side that suits matrix units.
PAGE_SIZE = 16
# Size of a new slab relative to the store: unused memory stays small and the number of slabs logarithmic.
SLAB_GROWTH = 1 / 16
MIN_SLAB_PAGES = 4


@dataclass
class KeptTokens:
    """Kept tokens as flat tensors, ordered by stream (row times heads plus head) and position within it.

    Attributes:
        keys: `[n, K]`, after QK-norm and RoPE.
        values: `[n, V]`.
        scores: `[n]` float32 routing scores.
        positions: `[n]` int32, index among the real tokens of the row.
        streams: `[n]` int64.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor
    streams: torch.Tensor

    def select(self, index: torch.Tensor, streams: torch.Tensor | None = None) -> "KeptTokens":
        """The tokens at `index` (a bool mask or indices), under new stream numbers if given."""
        streams = self.streams[index] if streams is None else streams
        return KeptTokens(self.keys[index], self.values[index], self.scores[index], self.positions[index], streams)


class PagedStore:
    """Append-only storage of kept tokens for `num_streams` streams of any length, in pages that never move.

    Each stream fills an open page of its own; a full page is copied once, to the next free page of the slabs. So
    appending is amortised O(1), no step copies stored tokens, and a stream wastes less than one page plus its share
    of the free pages, which are little more than one slab.

    The device may append by itself, one token per stream at a time (`open_pages`). So only `counts` and `full_pages`
    tell what is stored, and the host reads them when it needs them; `reserve` makes free pages for the device, and
    `reserved_steps` is the number of such steps for which they surely suffice.

    Stores that were forked from each other share full pages. Appending never writes to these; what does takes a copy.
    """

    FIELDS = ("keys", "values", "scores", "positions")

    def __init__(self, num_streams: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device):
        self.num_streams = num_streams
        self.key_dim, self.value_dim = key_dim, value_dim
        self.dtype = dtype
        self.slabs: list[dict[str, torch.Tensor]] = []
        self.counts = torch.zeros(num_streams, dtype=torch.long, device=device)
        self.full_pages = torch.zeros((), dtype=torch.long, device=device)
        self.tail = self._new_pages(num_streams, device)
        self.reserved_steps = 0
        self._slab_table: torch.Tensor | None = None
        # First pages of each slab that another store may read; slabs that are not listed are shared with none.
        self._shared: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies everything but the addresses of this store's tensors; a copy shares no pages."""
        return vars(self) | {"_slab_table": None, "_shared": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a writable copy, also of tensors made in inference mode."""
        vars(self).update(map_tensors(writable, state))

    @torch.inference_mode(False)  # tensors made in inference mode could not be written outside of it
    def _new_pages(self, pages: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "keys": torch.zeros(pages, PAGE_SIZE, self.key_dim, dtype=self.dtype, device=device),
            "values": torch.zeros(pages, PAGE_SIZE, self.value_dim, dtype=self.dtype, device=device),
            "scores": torch.zeros(pages, PAGE_SIZE, dtype=torch.float32, device=device),
            "positions": torch.zeros(pages, PAGE_SIZE, dtype=torch.int32, device=device),
            "owner": torch.zeros(pages, dtype=torch.int32, device=device),
            "rank": torch.zeros(pages, dtype=torch.int32, device=device),  # index within its stream
        }

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.counts.device

    @property
    def fill(self) -> torch.Tensor:
        """`[N]` tokens in each stream's open page."""
        return self.counts % PAGE_SIZE

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the store holds, so that their bytes are its memory."""
        table = [] if self._slab_table is None else [self._slab_table]
        pages = [x for slab in (self.tail, *self.slabs) for x in slab.values()]
        return [self.counts, self.full_pages, *table, *pages]

    def to(self, device: torch.device) -> None:
        """Moves every tensor to `device`."""
        self.counts, self.full_pages = self.counts.to(device), self.full_pages.to(device)
        self.tail = {name: x.to(device) for name, x in self.tail.items()}
        self.slabs = [{name: x.to(device) for name, x in slab.items()} for slab in self.slabs]
        self._slab_table = None

    def append(self, tokens: KeptTokens) -> None:
        """Appends tokens, ordered by stream and position, to their streams."""
        if tokens.streams.numel() == 0:
            return
        added = torch.bincount(tokens.streams, minlength=self.num_streams)
        slot = self.fill[tokens.streams] + ranks(tokens.streams, added)
        pages = (self.fill + added) // PAGE_SIZE
        total = int(pages.sum())
        if total == 0:
            self._write(self.tail, tokens, tokens.streams, slot)
        else:
            self._seal(tokens, slot, pages, total)
            self.full_pages = self.full_pages + total
        # Counted last: if memory runs out before, the store is unchanged.
        self.counts, self.reserved_steps = self.counts + added, 0

    def _seal(self, tokens: KeptTokens, slot: torch.Tensor, pages: torch.Tensor, total: int) -> None:
        """Writes tokens, some of which fill pages.

        Args:
            tokens: ordered by stream and position.
            slot: `[n]` offset of each from the start of its stream's open page.
            pages: `[N]` pages that each stream fills.
            total: their sum.
        """
        spans = self._room(total)
        # Full pages are laid out stream by stream; each stream's first one begins with the tokens of its open page.
        start = pages.cumsum(0) - pages
        complete = slot < pages[tokens.streams] * PAGE_SIZE
        sealed, rest = tokens.select(complete), tokens.select(~complete)
        page, column = start[sealed.streams] + slot[complete] // PAGE_SIZE, slot[complete] % PAGE_SIZE
        in_use = torch.arange(PAGE_SIZE, device=self.device) < self.fill[:, None]
        stream, opened_column = (in_use & (pages > 0)[:, None]).nonzero(as_tuple=True)
        fields = {name: self.tail[name][stream, opened_column] for name in self.FIELDS}
        opened = KeptTokens(**fields, streams=stream)
        owner = torch.repeat_interleave(pages, output_size=total)
        rank = (self.counts // PAGE_SIZE)[owner] + ranks(owner, pages)
        for slab, offset, first, last in spans:
            slab["owner"][offset : offset + last - first] = owner[first:last]
            slab["rank"][offset : offset + last - first] = rank[first:last]
            for part, part_page, part_column in ((opened, start[stream], opened_column), (sealed, page, column)):
                if last - first < total:
                    here = (part_page >= first) & (part_page < last)
                    part, part_page, part_column = part.select(here), part_page[here], part_column[here]
                self._write(slab, part, offset + part_page - first, part_column)
        self._write(self.tail, rest, rest.streams, slot[~complete] % PAGE_SIZE)

    def _write(
        self, pages: dict[str, torch.Tensor], tokens: KeptTokens, page: torch.Tensor, slot: torch.Tensor
    ) -> None:
        for name in self.FIELDS:
            pages[name][page, slot] = getattr(tokens, name)

    @property
    def capacity(self) -> int:
        """Pages of the slabs, used and free."""
        return sum(len(slab["owner"]) for slab in self.slabs)

    @property
    def used(self) -> list[int]:
        """Full pages of each slab; slabs fill one after the other. Waits for the device."""
        left, used = int(self.full_pages), []
        for slab in self.slabs:
            used.append(min(left, len(slab["owner"])))
            left -= used[-1]
        return used

    def _grow(self, pages: int) -> None:
        """Adds a slab of `pages` pages, at least `MIN_SLAB_PAGES`."""
        self.slabs.append(self._new_pages(max(pages, MIN_SLAB_PAGES), self.device))
        self._slab_table = None

    def _room(self, pages: int) -> list[tuple[dict[str, torch.Tensor], int, int, int]]:
        """The next `pages` free pages, as `(slab, offset, first, last)`: pages `first` to `last` start at `offset`."""
        used = self.used
        begin = sum(used)
        missing = begin + pages - self.capacity
        if missing > 0:
            self._grow(max(missing, int(self.capacity * SLAB_GROWTH)))
            used.append(0)
        spans, first = [], 0
        for slab, offset in zip(self.slabs, used, strict=True):
            last = min(first + len(slab["owner"]) - offset, pages)
            if last > first:
                spans.append((slab, offset, first, last))
            first = last
        return spans

    def shortage(self, counts: torch.Tensor) -> float:
        """Fraction of the spare pages already used; 1 if the next token might find none.

        Args:
            counts: `[N]` the store's counts, on the CPU.
        """
        free, due = self._free_and_due(counts)
        if free < due or not self.slabs:
            return 1.0
        wanted = int(self.capacity * SLAB_GROWTH)
        # Even the smallest slab would exceed the shortage.
        return 0.0 if wanted - free < MIN_SLAB_PAGES else 1 - free / wanted

    def _free_and_due(self, counts: torch.Tensor) -> tuple[int, int]:
        """Number of free pages, and of pages that become full if every stream keeps the next token."""
        free = self.capacity - int((counts // PAGE_SIZE).sum())
        return free, int((counts % PAGE_SIZE == PAGE_SIZE - 1).sum())

    def reserve(self, counts: torch.Tensor, grow: bool) -> None:
        """Computes `reserved_steps`, after adding free pages with `grow`.

        Args:
            counts: `[N]` the store's counts, on the CPU.
            grow: True to make a new slab, as a `shortage` of 1 requires.
        """
        free, due = self._free_and_due(counts)
        if grow:
            self._grow(max(due, int(self.capacity * SLAB_GROWTH)) - free)
            free, _ = self._free_and_due(counts)
        # In 16 steps a stream that keeps all tokens fills one page; in fewer, only if its open page is full enough.
        rounds, rest = divmod(free, self.num_streams)
        sealing = [int((counts % PAGE_SIZE + step >= PAGE_SIZE).sum()) for step in range(PAGE_SIZE)]
        self.reserved_steps = PAGE_SIZE * rounds + max(step for step, n in enumerate(sealing) if n <= rest)

    def open_pages(self) -> tuple[torch.Tensor, ...]:
        """Tensors that the kernel of a decoding step appends to, in its order; call `reserve` first."""
        index = self.index()
        if index is None:
            raise ValueError("The device can append only to a store that has slabs, and only by a kernel.")
        return *(self.tail[name] for name in self.FIELDS), self.counts, self.full_pages, index[0]

    def pages(self) -> list[dict[str, torch.Tensor]]:
        """The full pages of every slab, as views."""
        return [{k: x[:n] for k, x in slab.items()} for slab, n in zip(self.slabs, self.used, strict=True) if n]

    def index(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The slabs' addresses and the number of tokens in each stream, for a kernel; `None` without kernels."""
        if self._slab_table is None and self.slabs:
            fields = ("keys", "values", "owner", "rank", "scores", "positions")
            self._slab_table = slab_table([tuple(slab[name] for name in fields) for slab in self.slabs])
        return None if self._slab_table is None else (self._slab_table, self.counts)

    def tokens(self) -> KeptTokens:
        """A copy of everything stored, ordered by stream and position."""
        opened = torch.arange(PAGE_SIZE, device=self.device) < self.fill[:, None]
        parts = {name: [pages[name].flatten(0, 1) for pages in self.pages()] for name in self.FIELDS}
        flat = {name: torch.cat([*parts[name], self.tail[name][opened]]) for name in self.FIELDS}
        owners = [pages["owner"].long().repeat_interleave(PAGE_SIZE) for pages in self.pages()]
        streams = torch.cat([*owners, opened.nonzero()[:, 0]])
        tokens = KeptTokens(flat["keys"], flat["values"], flat["scores"], flat["positions"], streams)
        order = tokens.positions.argsort(stable=True)
        return tokens.select(order[tokens.streams[order].argsort(stable=True)])

    def rebuilt(self, tokens: KeptTokens, num_streams: int | None = None) -> "PagedStore":
        """A new store of the same kind that holds `tokens` and no unused slab."""
        num_streams = self.num_streams if num_streams is None else num_streams
        store = PagedStore(num_streams, self.key_dim, self.value_dim, self.dtype, self.device)
        store.append(tokens)
        return store

    def selected(self, source: torch.Tensor) -> "PagedStore":
        """A new store whose streams are copies of those at `source` `[n]`."""
        counts = self.counts[source]
        streams = torch.repeat_interleave(counts)
        first = self.counts.cumsum(0) - self.counts
        index = first[source][streams] + ranks(streams, counts)
        return self.rebuilt(self.tokens().select(index, streams), len(source))

    @torch.inference_mode(False)
    def fork(self) -> "PagedStore":
        """A store with the same tokens that shares the full pages; waits for the device."""
        used = self.used
        store = PagedStore(self.num_streams, self.key_dim, self.value_dim, self.dtype, self.device)
        store.rollback(self.mark())
        # The free pages stay with this store.
        store.slabs = self.pages()
        self._shared, store._shared = used, [n for n in used if n]
        return store

    @torch.inference_mode(False)
    def _unshare(self, slabs: Iterable[int]) -> None:
        """Replaces slabs, given by their number, by copies."""
        for i in slabs:
            self.slabs[i] = {name: x.clone() for name, x in self.slabs[i].items()}
            self._shared[i], self._slab_table = 0, None

    def replace_lowest(self, tokens: KeptTokens) -> None:
        """Replaces the lowest score of a stream by its new token, at most one per stream, unless that scores lower.

        The oldest of equal scores leaves. Scores of identical tokens differ by float32 rounding.
        """
        self._unshare(i for i, shared in enumerate(self._shared) if shared)
        everything = [(pages, pages["owner"].long()) for pages in self.pages()]
        everything.append((self.tail, torch.arange(self.num_streams, device=self.device)))
        opened = torch.arange(PAGE_SIZE, device=self.device) < self.fill[:, None]
        scores = [pages["scores"] for pages, _ in everything[:-1]]
        scores.append(self.tail["scores"].masked_fill(~opened, torch.inf))
        lowest = torch.full((self.num_streams,), torch.inf, dtype=torch.float32, device=self.device)
        for page_scores, (_, owner) in zip(scores, everything, strict=True):
            lowest.scatter_reduce_(0, owner, page_scores.amin(1), "amin")
        oldest = torch.full((self.num_streams,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=self.device)
        for page_scores, (pages, owner) in zip(scores, everything, strict=True):
            position = pages["positions"].masked_fill(page_scores != lowest[owner, None], oldest.max())
            oldest.scatter_reduce_(0, owner, position.amin(1), "amin")
        incoming = torch.full((self.num_streams,), -1, dtype=torch.long, device=self.device)
        enters = tokens.scores >= lowest[tokens.streams]
        incoming[tokens.streams[enters]] = enters.nonzero()[:, 0]
        for page_scores, (pages, owner) in zip(scores, everything, strict=True):
            leaves = (page_scores == lowest[owner, None]) & (pages["positions"] == oldest[owner, None])
            page, slot = (leaves & (incoming[owner] >= 0)[:, None]).nonzero(as_tuple=True)
            self._write(pages, tokens.select(incoming[owner[page]]), page, slot)

    @torch.inference_mode(False)
    def mark(self) -> dict:
        """Copies counters and open pages, for `rollback` to undo later appends; full pages are never copied."""
        tail = {name: x.clone() for name, x in self.tail.items()}
        return {
            "counts": self.counts.clone(),
            "full_pages": self.full_pages.clone(),
            "tail": tail,
            "slabs": len(self.slabs),
        }

    def rollback(self, mark: dict) -> None:
        """Undoes every append since `mark`."""
        self.counts, self.full_pages, self.tail = mark["counts"], mark["full_pages"], mark["tail"]
        del self.slabs[mark["slabs"] :], self._shared[mark["slabs"] :]
        self.reserved_steps, self._slab_table = 0, None
        if any(self._shared):
            # Later appends write to the pages that were given back.
            used = self.used
            self._unshare(i for i, shared in enumerate(self._shared) if used[i] < shared)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], x: Any) -> Any:
    """Applies `change` to every tensor in nested lists, tuples and dictionaries."""
    if isinstance(x, (list, tuple)):
        return type(x)(map_tensors(change, y) for y in x)
    if isinstance(x, dict):
        return {name: map_tensors(change, y) for name, y in x.items()}
    return change(x) if isinstance(x, torch.Tensor) else x


@torch.inference_mode(False)
def writable(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy if it was made in inference mode: such a tensor cannot be written outside that mode."""
    return x.clone() if x.is_inference() else x


def ranks(streams: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`[n]` rank of each token within its stream, for tokens ordered by stream; `counts` `[N]` tokens per stream."""
    return torch.arange(len(streams), device=streams.device) - (counts.cumsum(0) - counts)[streams]


__all__ = ["KeptTokens", "PagedStore", "map_tensors", "ranks", "writable"]
