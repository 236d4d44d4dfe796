# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""GroupMemory, which stands in the place of a HAMCache for some requests of a step, with its bytes in an Arena.

The layers run as they do under `generate`, and each layer's memory is a `HAMCacheLayer` whose store of kept tokens
lies in the arena: there is one implementation of the memories, and this file only says where their bytes are.
`PagedStore` keeps a stream's open page apart and copies it when it is full; here pages fill where they lie, because
all bytes of a request must be in its blocks.

States are read at the start of a step and written at its end, for all rows and layers at once. The pages of all rows
and layers are found by one index, and read and written by one a layer: no loop runs over rows, heads or tokens.
"""

from functools import cached_property

import torch

from ...cache_layer_ham import HAMCacheLayer, strongest
from ...layer_step_ham import LayerStep
from ...paged_store_ham import PAGE_SIZE, KeptTokens, PagedStore, ranks
from ...recent_tokens_ham import RecentTokens
from .arena import Arena
from .layout import BLOCK_PAGES
from .manager import Report, Row


def _pages_for(tokens: torch.Tensor) -> torch.Tensor:
    """Pages that hold so many tokens."""
    return (tokens + PAGE_SIZE - 1) // PAGE_SIZE


class GroupMemory:
    """The memories of requests that take equally many tokens in, all of them their first ones or none.

    Attributes:
        arena: where they lie.
        rows: the `R` requests.
        fresh: true if they have seen no token yet.
        budget: most tokens that a head may hold, or `None`.
        state: the fields of the requests' states, `[R, ...]`, as views of a copy of their first blocks.
        pages: `[R]` int64 pages that each request has taken.
        layers: the memories of the layers, as of a `HAMCache`.
    """

    offload_layers = False

    def __init__(self, arena: Arena, rows: list[Row], fresh: bool, budget: int | None):
        self.arena, self.rows, self.fresh, self.budget = arena, rows, fresh, budget
        layout, device = arena.layout, arena.blocks.device
        self.slots = torch.tensor([row.changes.slot for row in rows], device=device)
        self._state_blocks = arena.table[self.slots, : layout.state_blocks]
        size = (len(rows), layout.state_blocks * layout.block_bytes)
        if fresh:
            self._bytes = torch.zeros(size, dtype=torch.int8, device=device)
        else:
            self._bytes = arena.blocks[self._state_blocks].view(size)
        self.state = {name: field.view(self._bytes) for name, field in layout.state.items()}
        self.pages = self.state["pages"].long()
        held = self._pages_by_layer()
        self.layers = [
            LayerMemory(self, i, held[layout.layers.index(i)] if i in layout.layers else None)
            for i in range(arena.config.num_hidden_layers)
        ]

    def _pages_by_layer(self) -> tuple[torch.Tensor, ...]:
        """The pages of each layer with attention, ordered by row, head and time."""
        layout, counts = self.arena.layout, self.state["counts"]
        number = torch.arange(int(self.pages.max()), device=self.pages.device)
        row, number = (number < self.pages[:, None]).nonzero(as_tuple=True)
        ids = self.arena.page_ids(self.slots[row], number)
        stream = self.arena.pages["stream"][ids].long()
        # A request takes pages in the order of time.
        order = ((stream // layout.heads * len(self.rows) + row) * layout.heads + stream % layout.heads).argsort(
            stable=True
        )
        return ids[order].split(_pages_for(counts).sum((0, 2)).tolist())

    def take_pages(self, layer_number: int, streams: torch.Tensor) -> torch.Tensor:
        """New pages for streams `[n]` of one layer, rising; `layer_number` counts the layers with attention."""
        heads = self.arena.layout.heads
        row = streams // heads
        taken = torch.bincount(row, minlength=len(self.rows))
        ids = self.arena.page_ids(self.slots[row], self.pages[row] + ranks(row, taken))
        self.arena.pages["stream"][ids] = (layer_number * heads + streams % heads).int()
        self.pages = self.pages + taken
        return ids

    def save(self) -> None:
        """Writes the states to the arena, and the reports of the requests.

        Raises:
            RuntimeError: if a request took more pages than the scheduler gave it blocks for.
        """
        arena = self.arena
        counts = [layer.store.counts.view(len(self.rows), -1) for layer in self.layers if layer.store is not None]
        if counts:
            self.state["counts"].copy_(torch.stack(counts, 1))
        seen = self.layers[0].real_tokens
        self.state["seen"].copy_(seen)
        self.state["pages"].copy_(self.pages)
        arena.blocks[self._state_blocks] = self._bytes.view(*self._state_blocks.shape, -1)
        closed, held = torch.zeros_like(seen), torch.zeros_like(seen)
        for layer in self.layers:
            if layer.store is not None:
                closed, held = closed + layer.closed_streams(), held + layer.held_tokens().sum(1)
        numbers = torch.stack([seen, self.pages, closed, held], 1).tolist()
        for row, report in zip(self.rows, map(Report._make, numbers), strict=True):
            blocks = row.changes.start + len(row.changes.blocks) - arena.layout.state_blocks
            if report.pages > blocks * BLOCK_PAGES:
                raise RuntimeError(f"Request {row.request_id} took {report.pages} pages, and has {blocks} blocks.")
            arena.reports[row.changes.epoch] = report


class LayerMemory(HAMCacheLayer):
    """The memories of one layer for the requests of a group.

    Args:
        group: the requests.
        layer_idx: the layer.
        held: `[n]` the pages that its streams have taken, ordered by stream and time; `None` in a linear layer.
    """

    def __init__(self, group: GroupMemory, layer_idx: int, held: torch.Tensor | None):
        self.group, self.layer_idx, self.held = group, layer_idx, held
        config = group.arena.config
        super().__init__(config.window_of(layer_idx))
        if group.fresh:
            return
        shape = config.layer_shape(config.layer_types[layer_idx])
        self.conv_state, self.recurrent_state = self._state("conv"), self._state("recurrent")
        self.device, self.dtype = group.pages.device, group.arena.dtype
        self.real_tokens = group.state["seen"].long()
        if held is not None:
            self._make_stores(len(group.rows) * group.arena.layout.heads, shape.key_dim, shape.value_dim)
        self.is_initialized = True

    def _state(self, name: str) -> torch.Tensor | None:
        return self.group.state.get(f"{self.layer_idx}.{name}")

    @property
    def kernels_may_write(self) -> bool:
        """False: kernels write to a `PagedStore` of their own kind."""
        return False

    def _make_stores(self, num_streams: int, key_dim: int, value_dim: int) -> None:
        if self.held is None:
            raise ValueError("A linear layer keeps no tokens.")
        self.store = ArenaStore(self.group, self.layer_idx, self.held, key_dim, value_dim)
        if self.window > 1:
            self.recent = RecentTokens(num_streams, self.window - 1, key_dim, value_dim, self.dtype, self.device)
            rings = {name: self.group.state[f"{self.layer_idx}.recent_{name}"] for name in RecentTokens.FIELDS}
            self.recent.rollback({name: x.flatten(0, 1).clone() for name, x in rings.items()})

    def update(self, step: LayerStep, budget: int | None = None) -> None:  # type: ignore[override]
        """Stores the results of one forward, states in the group's copy of them."""
        super().update(step, budget)
        fields = {"conv": self.conv_state, "recurrent": self.recurrent_state}
        if self.recent is not None:
            fields |= {f"recent_{name}": getattr(self.recent, name) for name in RecentTokens.FIELDS}
        for name, new in fields.items():
            old = self._state(name)
            if old is not None and new is not None:
                old.copy_(new.view(old.shape))
        if isinstance(self.store, ArenaStore):
            self.store.release()

    def _keep(self, store: PagedStore, kept: KeptTokens, budget: int | None, length: int) -> None:
        """As in HAMCacheLayer, but a call of many tokens drops the lowest scores before they could take a page."""
        if budget is None or length == 1 or not isinstance(store, ArenaStore):
            super()._keep(store, kept, budget, length)
            return
        pairs = zip(vars(store.tokens()).values(), vars(kept).values(), strict=True)
        tokens = KeptTokens(*(torch.cat(pair) for pair in pairs))
        tokens = tokens.select(tokens.streams.argsort(stable=True))
        counts = torch.bincount(tokens.streams, minlength=store.num_streams)
        store.refill(tokens.select(strongest(tokens, counts, self._page_budget(budget))))

    def closed_streams(self) -> torch.Tensor:
        """`[R]` streams of each request whose next kept token takes a new page."""
        counts = self._kept_store().counts
        closed = counts % PAGE_SIZE == 0
        if self.group.budget is not None and self.group.arena.config.layer_types[self.layer_idx] == "hybrid":
            closed &= counts < self._page_budget(self.group.budget)
        return closed.view(self.batch_size, -1).sum(1)


class ArenaStore(PagedStore):
    """A `PagedStore` whose pages lie in an arena: a layer's step reads copies of them, and writes tokens in place.

    Args:
        group: the requests.
        layer_idx: the layer.
        held: as in `LayerMemory`.
        key_dim, value_dim: sizes of a key and a value.
    """

    def __init__(self, group: GroupMemory, layer_idx: int, held: torch.Tensor, key_dim: int, value_dim: int):
        self.group, self.held = group, held
        self.layer_number = group.arena.layout.layers.index(layer_idx)
        self.num_streams = len(group.rows) * group.arena.layout.heads
        self.key_dim, self.value_dim, self.dtype = key_dim, value_dim, group.arena.dtype
        self.counts = group.state["counts"][:, self.layer_number].flatten().long()
        self._shared = []

    @cached_property
    def _copies(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Each stream's open page, its unused slots zero, and the full pages, with their places in the arena."""
        taken = _pages_for(self.counts)
        owner = torch.repeat_interleave(taken, output_size=len(self.held))
        full = ranks(owner, taken) < (self.counts // PAGE_SIZE)[owner]
        tail = torch.zeros(self.num_streams, dtype=torch.long, device=owner.device)
        tail[owner[~full]] = self.held[~full]
        # Scores decide what leaves a full head, and nothing else.
        fields = self.FIELDS if self.group.budget is not None else ("keys", "values")
        pages = self.group.arena.pages
        opened = {name: pages[name][tail] for name in fields} | {"ids": tail}
        unused = torch.arange(PAGE_SIZE, device=owner.device) >= self.fill[:, None]
        for name in ("keys", "values"):
            # They may hold anything, and not even zero times NaN is zero.
            opened[name].masked_fill_(unused[..., None], 0)
        ids = self.held[full]
        return opened, {name: pages[name][ids] for name in fields} | {"ids": ids, "owner": owner[full].int()}

    @property
    def tail(self) -> dict[str, torch.Tensor]:  # type: ignore[override]  # PagedStore has it as an attribute
        """A copy of each stream's open page, as the layer's step found it."""
        return self._copies[0]

    def pages(self) -> list[dict[str, torch.Tensor]]:
        """Copies of the full pages, as the layer's step found them."""
        return [self._copies[1]]

    def release(self) -> None:
        """Frees the copies when the layer's step is done, so that those of one layer exist at a time."""
        vars(self).pop("_copies", None)

    def index(self) -> None:
        """`None`: no kernel reads the arena in place."""
        return None

    def append(self, tokens: KeptTokens) -> None:
        """Appends tokens, ordered by stream and position, to their streams."""
        self._place(tokens, self.counts)

    def refill(self, tokens: KeptTokens) -> None:
        """Replaces everything by at least as many tokens of each stream, ordered by stream and position."""
        self._place(tokens, torch.zeros_like(self.counts))

    def _place(self, tokens: KeptTokens, first: torch.Tensor) -> None:
        """Writes tokens to their streams, which begin to take them at the places `first` `[N]`."""
        if tokens.streams.numel() == 0:
            return
        added = torch.bincount(tokens.streams, minlength=self.num_streams)
        place = first[tokens.streams] + ranks(tokens.streams, added)
        before, counts = _pages_for(self.counts), first + added
        after = _pages_for(counts)
        owner = torch.repeat_interleave(after)
        new = ranks(owner, after) >= before[owner]
        held = torch.empty_like(owner)
        held[~new], held[new] = self.held, self.group.take_pages(self.layer_number, owner[new])
        page = (after.cumsum(0) - after)[tokens.streams] + place // PAGE_SIZE
        self._write({"ids": held}, tokens, page, place % PAGE_SIZE)
        self.held, self.counts = held, counts

    def _write(
        self, pages: dict[str, torch.Tensor], tokens: KeptTokens, page: torch.Tensor, slot: torch.Tensor
    ) -> None:
        ids = pages["ids"][page]
        for name in self.FIELDS:
            self.group.arena.pages[name][ids, slot] = getattr(tokens, name)
