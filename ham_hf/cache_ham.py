# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMCache: per layer the RNN's state and, in pages of real memory, only the tokens that each head kept."""

import contextlib
import heapq
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_file_ham import (
    check_same_model,
    check_saved_layer,
    check_saved_padding,
    fingerprint,
    read_cache,
    write_cache,
)
from .cache_guard_ham import CacheGuard
from .configuration_ham import HAMConfig
from .ops_ham import (
    compact_kept,
    convolution_state,
    gated_delta_rule_with_prediction,
    ragged_decode_attention,
    sparse_prefix_attention,
)
from .paged_store_ham import KeptTokens, PagedStore, map_tensors, ranks, writable
from .routing_ham import check_threshold

# Shortage of free pages at which a store makes a new slab ahead of need, and at which it does when another has to.
GROWS, GROWS_WITH_OTHERS = 0.75, 0.25


@dataclass
class LayerStep:
    """What one forward gives a layer's memories; absent parts are `None`.

    Attributes:
        positions: `[B, T]` index among the real tokens of the row.
        real: `[B, T]` bool, false for padding, or `None`.
        conv_inputs: `[B, T, C]` inputs of the short convolution.
        conv_state: `[B, W - 1, C]` its state after the call.
        rnn: `(k, v, g, beta)` as `gated_delta_rule_with_prediction` takes them.
        recurrent_state: `[B, Hk, K, V]` float32 state after the call, one a value head.
        keys, values: `[B, T, Hk, K]` and `[B, T, Hk, V]` of the attention view.
        scores: `[B, T, Hk]` float32 routing scores.
        keep: `[B, T, Hk]` bool.
    """

    positions: torch.Tensor
    real: torch.Tensor | None = None
    conv_inputs: torch.Tensor | None = None
    conv_state: torch.Tensor | None = None
    rnn: tuple[torch.Tensor, ...] | None = None
    recurrent_state: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    keep: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.positions.shape[1]

    def first(self, length: int) -> "LayerStep":
        """The inputs of the first `length` tokens; states, which belong to the whole, are dropped."""
        fields: dict[str, Any] = {name: x[:, :length] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        fields |= {"conv_state": None, "recurrent_state": None}
        rnn = None if self.rnn is None else tuple(x[:, :length] for x in self.rnn)
        return LayerStep(**(fields | {"rnn": rnn}))

    @classmethod
    def joined(cls, steps: list["LayerStep"]) -> "LayerStep":
        """Successive steps as one; their states are dropped."""
        names = ("conv_inputs", "keys", "values", "scores", "keep", "positions")
        fields: dict[str, Any] = {name: _cat([getattr(step, name) for step in steps]) for name in names}
        if any(step.real is not None for step in steps):
            fields["real"] = torch.cat(
                [torch.ones_like(x.positions, dtype=torch.bool) if x.real is None else x.real for x in steps], dim=1
            )
        rnn = (
            None
            if steps[0].rnn is None
            else tuple(torch.cat(x, dim=1) for x in zip(*(s.rnn for s in steps), strict=True))
        )
        return cls(rnn=rnn, **fields)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerStep":
        """The same with every tensor changed."""
        return LayerStep(**map_tensors(change, vars(self)))

    def kept(self) -> KeptTokens:
        """The kept tokens of a layer with attention, flat and ordered by stream and position."""
        keys, values, scores, keep = self.keys, self.values, self.scores, self.keep
        if keys is None or values is None or scores is None or keep is None:
            raise ValueError("A step of a linear layer keeps no tokens.")
        heads = keep.shape[2]
        row, head, time = keep.transpose(1, 2).nonzero(as_tuple=True)
        return KeptTokens(
            keys[row, time, head],
            values[row, time, head],
            scores[row, time, head],
            self.positions[row, time].int(),
            row * heads + head,
        )


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors, dim=1)


@dataclass
class KeptColumns:
    """A cache's kept tokens, right-aligned: `[B, Hk, M, D]` keys and values, `[B, Hk, M]` scores, `[B, Hk]` counts."""

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor


def attend_new(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    budget: int | None = None,
    cached: KeptColumns | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens over cached columns, the kept ones among themselves, and themselves.

    Args:
        q: `[B, n, H, K]` queries of the last `n` tokens, which may be all.
        k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
        keep: `[B, T, Hk]` bool.
        scores: `[B, T, Hk]` routing scores, read only with a budget.
        budget: kept tokens per head after which the lowest score leaves, or `None`.
        cached: what a cache holds already, no more than `budget` per head.
        seq_idx: `[B, T]` int, the document of each token; without a cache only.

    Returns:
        `[B, n, H, V]`.
    """
    (keys, values, kept_scores), end = compact_kept(keep, k, v, scores[..., None])
    begin = torch.zeros_like(end)
    if seq_idx is not None:
        first = torch.searchsorted(seq_idx.contiguous(), seq_idx.contiguous())
        begin = end.gather(1, first[..., None].expand_as(end))
    until = None
    if budget is not None:
        until = eviction_times(keep, kept_scores[..., 0], budget, cached)
    if cached is not None:
        width = cached.keys.shape[2]
        begin, end = begin + (width - cached.counts)[:, None], end + width
        keys, values = torch.cat([cached.keys, keys], 2), torch.cat([cached.values, values], 2)
    skipped = k.shape[1] - q.shape[1]
    if skipped:
        k, v, begin, end = (x[:, skipped:] for x in (k, v, begin, end))
        until = None if until is None else until - skipped
    return sparse_prefix_attention(q, k, v, keys, values, begin, end, until)


def eviction_times(
    keep: torch.Tensor, scores: torch.Tensor, budget: int, cached: KeptColumns | None = None
) -> torch.Tensor | None:
    """From which query on each column is gone when a head holds at most `budget` tokens and the lowest score leaves.

    Args:
        keep: `[B, T, Hk]` bool, the new tokens that are admitted.
        scores: `[B, Hk, M]` their scores, compacted.
        budget: how many tokens a head may hold.
        cached: what it holds already, no more than `budget`.

    Returns:
        `[B, Hk, M]` int64 (cached columns first): queries `t <` this see the column. `None` if nothing is evicted.
    """
    batch, length, heads = keep.shape
    added = keep.sum(1)
    held = torch.zeros_like(added) if cached is None else cached.counts
    if not bool((held + added > budget).any()):
        return None
    width = 0 if cached is None else cached.keys.shape[2]
    until = torch.full((batch * heads, width + scores.shape[2]), length + 1)
    for stream in range(batch * heads):
        row, head = divmod(stream, heads)
        # The column breaks ties of scores, and grows with the position: of equal scores the oldest leaves.
        heap: list[tuple[float, int]] = []
        if cached is not None:
            first = width - int(held[row, head])
            heap = [(s, first + i) for i, s in enumerate(cached.scores[row, head, first:].tolist())]
            heapq.heapify(heap)
        times = keep[row, :, head].nonzero()[:, 0].tolist()
        for i, (time, score) in enumerate(zip(times, scores[row, head].tolist(), strict=False)):
            heapq.heappush(heap, (score, width + i))
            if len(heap) > budget:
                until[stream, heapq.heappop(heap)[1]] = time + 1
    return until.view(batch, heads, -1).to(keep.device)


def _scatter_columns(
    x: torch.Tensor, streams: torch.Tensor, columns: torch.Tensor, batch: int, heads: int, width: int
) -> torch.Tensor:
    out = x.new_zeros(batch * heads, width, *x.shape[1:])
    out[streams, columns] = x
    return out.unflatten(0, (batch, heads))


def _attend_stored(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, store: PagedStore
) -> torch.Tensor:
    """Attention of new tokens over a store, the kept ones among themselves, and themselves; shapes of `attend_new`."""
    heads = k.shape[2]
    q, k, v, keep = (x.transpose(1, 2).flatten(0, 1) for x in (q.unflatten(2, (heads, -1)), k, v, keep))
    index = store.index()
    # Given an index the operation counts the pages in use itself, and whole slabs are the same until the store grows.
    slabs = store.pages() if index is None else store.slabs
    pages = [(x["keys"], x["values"], x["owner"]) for x in slabs]
    tail = (store.tail["keys"], store.tail["values"], store.fill)
    out = ragged_decode_attention(q, k, v, keep, pages, tail, index=index)
    return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2, 3)


class HAMCacheLayer(CacheLayerMixin):
    """One layer's memories: convolution state, recurrent state and, unless it is linear, the paged kept tokens.

    `update` takes a whole `LayerStep` instead of Transformers' dense keys and values, and returns nothing: what
    attention reads is given by `attend`.
    """

    is_sliding = False
    supports_early_init = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        # Grows with every change, so that a call that stopped halfway can be told from one that changed nothing.
        self.changes = 0
        self.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes a copy that can be written, also one made in inference mode."""
        steps = [step.mapped(writable) for step in state["_steps"]]
        vars(self).update(map_tensors(writable, state) | {"_steps": steps})

    def reset(self) -> None:
        """Forgets everything, as if newly made."""
        self.changes += 1
        self.record_past = False
        self.conv_state: torch.Tensor | None = None
        self.recurrent_state: torch.Tensor | None = None
        self.store: PagedStore | None = None
        self.real_tokens = torch.zeros(0, dtype=torch.long)
        self.seen_tokens = 0
        self.is_initialized = False
        self._base: dict | None = None
        self._steps: list[LayerStep] = []

    @property
    def batch_size(self) -> int:
        return len(self.real_tokens) if self.is_initialized else -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes an empty store for `[B, T, Hk, K]` keys and `[B, T, Hk, V]` values."""
        self.device, self.dtype = key_states.device, key_states.dtype
        batch, _, heads, key_dim = key_states.shape
        self.store = PagedStore(batch * heads, key_dim, value_states.shape[-1], self.dtype, self.device)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not, padding included."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keep: torch.Tensor,
        scores: torch.Tensor,
        budget: int | None,
    ) -> torch.Tensor:
        """Attention of new tokens over what is kept here, the kept ones among themselves, and themselves.

        Args:
            q: `[B, n, H, K]`, of all tokens or, while nothing is kept here, of the last `n`.
            k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
            keep: `[B, T, Hk]` bool; scores: `[B, T, Hk]`.
            budget: kept tokens per head after which the lowest score leaves, or `None`.

        Returns:
            `[B, n, H, V]`.
        """
        if not self.is_initialized or self.store is None:
            return attend_new(q, k, v, keep, scores, budget)
        # With a budget stored tokens leave in the course of a call; it also bounds what padding costs.
        if budget is None or q.shape[1] == 1:
            return _attend_stored(q, k, v, keep, self.store)
        batch, _, heads, _ = k.shape
        held = self.store.tokens()
        largest = int(self.store.counts.max())
        # Right-aligned, so that what a query sees of the cache and of the new tokens is one span of columns.
        column = ranks(held.streams, self.store.counts) + (largest - self.store.counts)[held.streams]
        keys, values, kept_scores = (
            _scatter_columns(x, held.streams, column, batch, heads, largest)
            for x in (held.keys, held.values, held.scores)
        )
        cached = KeptColumns(keys, values, kept_scores, counts=self.store.counts.view(batch, heads))
        return attend_new(q, k, v, keep, scores, budget, cached)

    def dense_keys(self, past_real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept keys at their columns among all tokens seen, `[B, Hk, S, K]`, and `[B, Hk, S]` bool where there is one.

        Args:
            past_real: `[B, S]` bool, false for padding; `None` if every token seen was real.
        """
        batch, store = self.batch_size, self._kept_store()
        heads = store.num_streams // batch
        held = store.tokens()
        columns = held.positions.long()
        if past_real is not None:
            # The p-th real token of a row stands where the p-th true entry of its mask is.
            order = (~past_real).to(torch.uint8).argsort(dim=1, stable=True)
            columns = order[held.streams // heads, columns]
        keys = _scatter_columns(held.keys, held.streams, columns, batch, heads, self.seen_tokens)
        ones = torch.ones_like(held.streams, dtype=torch.bool)
        return keys, _scatter_columns(ones, held.streams, columns, batch, heads, self.seen_tokens)

    def _kept_store(self) -> PagedStore:
        if self.store is None:
            raise ValueError("A linear layer, and a layer that has seen no tokens, keeps none.")
        return self.store

    def update(self, step: LayerStep, budget: int | None = None) -> None:  # type: ignore[override]
        """Takes in what one forward computed; with `budget`, a head that is full drops its lowest scores.

        A cache keeps no autograd graph alive: gradients stop here.
        """
        step = step.mapped(torch.Tensor.detach)
        self.changes += 1
        if not self.is_initialized:
            self.device = step.positions.device
            self.real_tokens = step.positions.new_zeros(len(step.positions))
            if step.keys is not None and step.values is not None:
                self.lazy_initialization(step.keys, step.values)
            self.is_initialized = True
        if self.record_past:
            self._base = self._snapshot(step) if self._base is None else self._base
            self._steps.append(step)
        self._take(step, budget)

    def _take(self, step: LayerStep, budget: int | None) -> None:
        if self.store is not None:
            self._keep(self.store, step.kept(), budget, step.length)
        self.conv_state, self.recurrent_state = step.conv_state, step.recurrent_state
        self.seen_tokens += step.length
        self.real_tokens = self.real_tokens + (step.length if step.real is None else step.real.sum(1))

    def _keep(self, store: PagedStore, kept: KeptTokens, budget: int | None, length: int) -> None:
        if budget is None:
            store.append(kept)
        elif length == 1:
            full = store.counts[kept.streams] >= budget
            store.replace_lowest(kept.select(full))
            store.append(kept.select(~full))
        else:
            store.append(kept)
            self.enforce_budget(budget)

    def enforce_budget(self, budget: int) -> None:
        """Drops the lowest scores of every head above `budget` tokens; of scores equal to the bit, the oldest."""
        if self.store is None or int(self.store.counts.max()) <= budget:
            return
        self.changes += 1
        tokens = self.store.tokens()
        # Tokens come ordered by stream and position: stable sorts by score and then by stream rank the oldest first.
        order = tokens.scores.argsort(stable=True)
        order = order[tokens.streams[order].argsort(stable=True)]
        streams = tokens.streams[order]
        survives = torch.zeros_like(streams, dtype=torch.bool)
        survives[order] = ranks(streams, self.store.counts) >= (self.store.counts - budget)[streams]
        self.store = self.store.rebuilt(tokens.select(survives))

    def open_pages(self) -> tuple[torch.Tensor, ...] | None:
        """Where the kernel of a decoding step appends, `None` in a linear layer; `HAMCache.reserve` made room."""
        return None if self.store is None else self.store.open_pages()

    def addressed(self) -> list[torch.Tensor | None]:
        """Tensors at whose addresses a decoding step on the device works: while they are the same, so may it be."""
        store = self.store
        stored = [] if store is None else [store.counts, *(store.index() or ())[:1]]
        return [self.conv_state, self.recurrent_state, self.real_tokens, *stored]

    def count_step(self) -> None:
        """Updates the host's counters after a kernel appended one token per row."""
        self.changes += 1
        self.seen_tokens += 1
        if self.store is not None:
            self.store.reserved_steps -= 1

    def _snapshot(self, step: LayerStep) -> dict:
        conv_state, recurrent_state = self.conv_state, self.recurrent_state
        if conv_state is None and step.conv_state is not None:
            conv_state = torch.zeros_like(step.conv_state)
        if recurrent_state is None and step.recurrent_state is not None:
            recurrent_state = torch.zeros_like(step.recurrent_state)
        return {
            "conv_state": conv_state,
            "recurrent_state": recurrent_state,
            "real_tokens": self.real_tokens,
            "seen_tokens": self.seen_tokens,
            "store": None if self.store is None else self.store.mark(),
        }

    def accept(self, inputs: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        """Raises `ValueError` for a model that computes in another dtype than the one that filled this layer.

        Args:
            inputs: `[..., C]` inputs of the convolution.
            keys: `[..., K]` keys that attention reads.
        """
        held_keys = None if self.store is None else self.store.tail["keys"]
        for name, held, new in (("inputs", self.conv_state, inputs), ("keys", held_keys, keys)):
            if held is not None and new is not None and held.dtype != new.dtype:
                raise ValueError(
                    f"`cache` holds {name} in {held.dtype}, this call computes them in {new.dtype}: convert the "
                    "model, leave or enter autocast, or start with an empty cache."
                )

    def activate_past_recording(self) -> None:
        """Remembers what later forwards add, until `crop`, so that it can be taken back exactly.

        What is remembered is dense, dropped tokens included: assisted generation holds a whole prompt until its first
        `crop`.
        """
        self.record_past = True

    def stop_past_recording(self) -> None:
        """Makes every token final and remembers no more."""
        self.record_past = False
        self._base, self._steps = None, []

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, and makes the ones before them final.

        Raises:
            ValueError: if the number is positive, or reaches further back than what was recorded.
        """
        removed = _check_crop(tokens_to_remove)
        recorded = sum(step.length for step in self._steps)
        if removed > recorded:
            raise ValueError(
                f"`crop({tokens_to_remove})` reaches past the {recorded} tokens recorded since "
                "`activate_past_recording()` or the last `crop`: an RNN state can only go back to where it was "
                "remembered."
            )
        base, steps = self._base, self._steps
        self.changes += 1
        self._base, self._steps = None, []
        if base is None or not removed:
            return
        self.conv_state, self.recurrent_state = base["conv_state"], base["recurrent_state"]
        self.real_tokens, self.seen_tokens = base["real_tokens"], base["seen_tokens"]
        if self.store is not None:
            self.store.rollback(base["store"])
        if recorded > removed:
            self._replay(LayerStep.joined(steps).first(recorded - removed))

    def _replay(self, step: LayerStep) -> None:
        """Takes in inputs whose states after them are not known."""
        if step.conv_inputs is not None and self.conv_state is not None:
            step.conv_state = convolution_state(step.conv_inputs, self.conv_state, step.real)
        if step.rnn is not None:
            k, v, g, beta = step.rnn
            state = self.recurrent_state
            step.recurrent_state = gated_delta_rule_with_prediction(
                k, k, v, g, beta, initial_state=state, predict=False
            )[2]
        self._take(step, budget=None)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at `indices` `[n]` (int, repeats allowed, or a bool mask); earlier tokens become final."""
        if not self.is_initialized:
            return
        # Where the tensors are: an offloaded layer is not on the device it works on.
        device = self.real_tokens.device
        everyone = torch.arange(self.batch_size, device=device)
        rows = everyone[checked_rows(indices, self.batch_size).to(device)]
        self.changes += 1
        self._base, self._steps = None, []
        if torch.equal(rows, everyone):
            return
        if self.store is not None:
            heads = self.store.num_streams // self.batch_size
            streams = (rows[:, None] * heads + torch.arange(heads, device=device)).flatten()
            self.store = self.store.selected(streams)
        self.real_tokens = self.real_tokens[rows]
        self.conv_state = None if self.conv_state is None else self.conv_state[rows]
        self.recurrent_state = None if self.recurrent_state is None else self.recurrent_state[rows]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rearranges rows for beam search."""
        self.batch_select_indices(beam_idx)

    def prune(self, threshold: torch.Tensor) -> None:
        """Drops the kept tokens with a score below `threshold` `[B or 1, Hk or 1]`; earlier tokens become final."""
        self.changes += 1
        self._base, self._steps = None, []
        store = self._kept_store()
        heads = store.num_streams // self.batch_size
        limit = threshold.to(store.device).expand(self.batch_size, heads).flatten()
        tokens = store.tokens()
        self.store = store.rebuilt(tokens.select(tokens.scores >= limit[tokens.streams]))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer holds."""
        steps = [x for step in self._steps for x in [*vars(step).values(), *(step.rnn or ())]]
        base = [] if self._base is None else [self._base["conv_state"], self._base["recurrent_state"]]
        if self._base is not None and self._base["store"] is not None:
            store = self._base["store"]
            base.extend([store["counts"], store["full_pages"], *store["tail"].values()])
        own = [self.conv_state, self.recurrent_state, self.real_tokens, *steps, *base]
        stored = [] if self.store is None else self.store.tensors()
        return [x for x in own if isinstance(x, torch.Tensor)] + stored

    def state_bytes(self) -> int:
        """Bytes of what does not grow: convolution and recurrent state."""
        return sum(x.nbytes for x in (self.conv_state, self.recurrent_state) if x is not None)

    def to(self, device: torch.device) -> None:
        """Moves everything to `device`."""
        if not self.is_initialized:
            return
        move = partial(torch.Tensor.to, device=device)
        own = map_tensors(move, [self.conv_state, self.recurrent_state, self.real_tokens, self._base])
        self.conv_state, self.recurrent_state, self.real_tokens, self._base = own
        self._steps = [step.mapped(move) for step in self._steps]
        if self.store is not None:
            self.store.to(device)

    def offload(self) -> None:
        """Moves the layer to the CPU; `prefetch` brings it back."""
        self.to(torch.device("cpu"))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that `load_state_dict` rebuilds the layer from."""
        state = {
            "real_tokens": self.real_tokens,
            "conv_state": self.conv_state,
            "recurrent_state": self.recurrent_state,
        }
        if self.store is not None:
            state |= vars(self.store.tokens()) | {"counts": self.store.counts}
        return {name: x for name, x in state.items() if x is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor], seen_tokens: int) -> None:
        """Takes over what `state_dict` gave and `check_saved_layer` checked."""
        self.reset()
        self.real_tokens = state["real_tokens"]
        self.conv_state, self.recurrent_state = state.get("conv_state"), state.get("recurrent_state")
        self.device, self.seen_tokens, self.is_initialized = self.real_tokens.device, seen_tokens, True
        if "counts" not in state:
            return
        tokens = KeptTokens(**{name: state[name] for name in (*PagedStore.FIELDS, "streams")})
        self.dtype = tokens.keys.dtype
        sizes = (len(state["counts"]), tokens.keys.shape[1], tokens.values.shape[1])
        self.store = PagedStore(*sizes, self.dtype, self.device)
        self.store.append(tokens)

    def prefetch(self) -> None:
        """Brings an offloaded layer back to the device it works on."""
        if self.is_initialized:
            self.to(self.device)


def _check_crop(tokens_to_remove: object) -> int:
    # Some releases of Transformers give the number as a tensor.
    if isinstance(tokens_to_remove, torch.Tensor) and tokens_to_remove.ndim == 0:
        tokens_to_remove = tokens_to_remove.item()
    if isinstance(tokens_to_remove, bool) or not isinstance(tokens_to_remove, int):
        raise TypeError(f"`tokens_to_remove` must be 0 or a negative int, got {tokens_to_remove!r}.")
    if tokens_to_remove > 0:
        raise ValueError(
            f"`tokens_to_remove` must be 0 or negative (`crop(-n)` takes back n tokens), got {tokens_to_remove}."
        )
    return -tokens_to_remove


def _trimmed(padding: torch.Tensor) -> torch.Tensor | None:
    """`[B, n]` bool up to the last column that holds padding, `None` if none does; a GPU is not waited for."""
    if padding.device.type != "cpu":
        return padding
    columns = padding.any(0).nonzero()
    return padding[:, : int(columns[-1]) + 1].clone() if len(columns) else None


def checked_rows(indices: object, batch: int) -> torch.Tensor:
    """Row numbers `[n]` int64, or bools `[batch]`, from a tensor or a list; `TypeError` or `ValueError` otherwise."""
    expected = f"a tensor or list of row numbers below {batch}, or {batch} bools"
    integers = isinstance(indices, (list, tuple)) and all(isinstance(i, int) for i in indices)
    rows = torch.tensor(indices, device="cpu") if integers and indices else indices
    if not isinstance(rows, torch.Tensor) or rows.is_floating_point() or rows.is_complex():
        found = rows.dtype if isinstance(rows, torch.Tensor) else repr(rows)
        raise TypeError(f"`indices` must be {expected}, got {found}.")
    fits = rows.ndim == 1
    if fits and rows.dtype == torch.bool:
        fits = len(rows) == batch and bool(rows.any())
    elif fits:
        fits = rows.numel() > 0 and bool(((rows >= -batch) & (rows < batch)).all())
    if not fits:
        raise ValueError(f"`indices` must be {expected}, at least one; got {rows.tolist()}.")
    return rows


class HAMCache(Cache):
    """Cache of a HAM model: `generate` makes one itself; pass it on as `cache` to continue a conversation.

    Two numbers are kept apart: tokens seen (`get_seq_length`), which positions come from, and tokens kept
    (`kept_tokens`), which memory is paid for.

    A call that fails before it changed anything leaves the cache as it was. One that stops later (an exception, an
    interrupt) leaves it half-changed: every use but `reset` then raises `RuntimeError`. So does a second call while
    one is under way. A cache holds no autograd graph: gradients stop at it, as in truncated backpropagation.

    Args:
        config: the model's `HAMConfig`.
        offloading: keep every layer on the CPU except while it computes.

    Example:
    ```python
    >>> cache = HAMCache(model.config)
    >>> model.generate(**inputs, cache=cache, threshold=0.4)
    >>> cache.get_seq_length(), cache.kv_usage().mean(), cache.memory_bytes()
    ```
    """

    # Transformers declares a list of layers of any kind.
    layers: list[HAMCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: HAMConfig, offloading: bool = False):
        # By name, because the files of a checkpoint's remote code may each see a class of their own.
        if getattr(config, "model_type", None) != HAMConfig.model_type:
            raise TypeError(f"`config` must be a HAMConfig, got {type(config).__name__}.")
        if not isinstance(offloading, bool):
            raise TypeError(f"`offloading` must be True or False, got {offloading!r}.")
        super().__init__(layers=[HAMCacheLayer() for _ in range(config.num_hidden_layers)])
        self.config = config
        self.offload_layers = offloading
        # The model that filled the cache, and what is known of that one if it is no longer there.
        self._model: weakref.ref[nn.Module] | None = None
        self._fingerprint: dict[str, str] | None = None
        # `[B, n]` bool, true for padding among the first `n` tokens seen; every later one is real.
        self._padding: torch.Tensor | None = None
        self.holds_cut_graph = False
        self._guard = CacheGuard()

    def __getstate__(self) -> dict[str, Any]:
        """Gives a copy the model's fingerprint instead of the model."""
        return vars(self) | {"_model": None, "_fingerprint": self._known_fingerprint()}

    def _stores(self) -> list[PagedStore | None]:
        self._guard.check()
        if not self.layers[0].is_initialized:
            raise ValueError("This cache has seen no tokens yet: run the model with it first.")
        return [layer.store for layer in self.layers]

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Guards a call that changes one layer after the other, see the class.

        Args:
            what: the call's name, for errors.

        Raises:
            RuntimeError: if an earlier call stopped halfway, or another one is under way.
        """
        with self._guard.held(what):
            fresh, before = not self.is_initialized, [layer.changes for layer in self.layers]
            try:
                yield
            except BaseException as error:
                if fresh:
                    self._forget()
                elif before != [layer.changes for layer in self.layers]:
                    self._guard.broke(what, error)
                raise

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen any tokens."""
        return self.layers[0].is_initialized

    @property
    def real_tokens(self) -> torch.Tensor | None:
        """`[B]` tokens seen that were not padding, `None` before the first."""
        self._guard.check()
        return self.layers[0].real_tokens if self.is_initialized else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, kept or not, padding included."""
        self._guard.check()
        return super().get_seq_length(layer_idx)

    def past_real(self) -> torch.Tensor | None:
        """`[B, S]` bool of the tokens seen, false for padding; `None` if every one is real."""
        self._guard.check()
        if self._padding is None:
            return None
        return ~F.pad(self._padding, (0, self.get_seq_length() - self._padding.shape[1]))

    @contextlib.contextmanager
    def filling(self, model: nn.Module, real: torch.Tensor | None) -> Iterator[None]:
        """Guards a call of the decoder `model` that fills every layer with tokens `real` `[B, T]`, false for padding.

        Raises:
            ValueError: if another model filled the cache before.
            RuntimeError: as `changing` does.
        """
        same = self._model is not None and self._model() is model
        if self.is_initialized and not same and (known := self._known_fingerprint()) is not None:
            check_same_model("cache", known, fingerprint(model))
        before = self.get_seq_length()
        with self.changing("forward"):
            yield
            self._note_padding(real, before)
        if not same:
            self._model = weakref.ref(model)

    def _note_padding(self, real: torch.Tensor | None, before: int) -> None:
        if real is None:
            return
        known = real.new_zeros(len(real), 0) if self._padding is None else self._padding.to(real.device)
        self._padding = _trimmed(torch.cat([F.pad(known, (0, before - known.shape[1])), ~real], dim=1))

    def _known_fingerprint(self) -> dict[str, str] | None:
        model = None if self._model is None else self._model()
        return self._fingerprint if model is None else fingerprint(model)

    def reset(self) -> None:
        """Forgets everything, also that a call stopped halfway."""
        self._guard.forgive()
        with self.changing("reset"):
            self._forget()

    def _forget(self) -> None:
        super().reset()
        self._model = self._fingerprint = self._padding = None
        self.holds_cut_graph = False

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, which must have been recorded; earlier ones become final.

        Raises:
            ValueError: if the number is positive, or reaches further back than what was recorded.
        """
        with self.changing("crop"):
            super().crop(tokens_to_remove)
            if self._padding is not None:
                self._padding = _trimmed(self._padding[:, : self.layers[0].seen_tokens])

    def stop_past_recording(self) -> None:
        """Makes every token final, and ends what `activate_past_recording` began."""
        for layer in self.layers:
            layer.stop_past_recording()

    def batch_select_indices(self, indices: torch.Tensor | list[int]) -> None:
        """Keeps the rows at `indices` `[n]` (int, repeats allowed, or bools); earlier tokens become final."""
        if not self.is_initialized:
            self._guard.check()
            return
        rows = checked_rows(indices, self.batch_size)
        with self.changing("batch_select_indices"):
            super().batch_select_indices(rows)
            if self._padding is not None:
                self._padding = _trimmed(self._padding[rows.to(self._padding.device)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rearranges rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies side by side."""
        if isinstance(repeats, bool) or not isinstance(repeats, int):
            raise TypeError(f"`repeats` must be a positive int, got {repeats!r} of type {type(repeats).__name__}.")
        if repeats < 1:
            raise ValueError(f"`repeats` must be a positive int, got {repeats}.")
        rows = torch.arange(max(self.batch_size, 0), device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reserve(self, layer_idx: int | None = None) -> None:
        """Sees to it that the device can append one more token to every head of every row by itself.

        For as many steps as the free pages surely suffice nothing is done. Then the host waits for the device and
        looks at all layers. They grow together, because a captured step does not outlive growth: when one has used up
        three quarters of what it had, all that have used up a quarter.

        Args:
            layer_idx: the layer that is to append next, all of them if `None`. Within a step the room of layers before
                it may have ended with this very token, and must not make the host wait.
        """
        stores = [store for store in self._stores() if store is not None]
        next_one = None if layer_idx is None else self.layers[layer_idx].store
        if all(store.reserved_steps for store in stores if layer_idx is None or store is next_one):
            return
        counts = [store.counts.cpu() for store in stores]
        shortages = [store.shortage(n) for store, n in zip(stores, counts, strict=True)]
        least = GROWS_WITH_OTHERS if max(shortages) >= GROWS else GROWS
        for store, n, shortage in zip(stores, counts, shortages, strict=True):
            store.reserve(n, grow=shortage >= least)

    def kept_tokens(self) -> torch.Tensor:
        """`[layers, B, Hk]` int64 number of kept tokens; zero in linear layers."""
        stores = self._stores()
        heads, batch = self.config.num_key_value_heads, self.batch_size
        empty = torch.zeros(batch, heads, dtype=torch.long, device="cpu")
        return torch.stack([empty if s is None else s.counts.view(batch, heads).cpu() for s in stores])

    def kept_positions(self, layer_idx: int) -> list[list[torch.Tensor]]:
        """Of one layer, for each row and head, the sorted positions (among real tokens) that are kept, int32."""
        stores = self._stores()
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"`layer_idx` must be an int, got {layer_idx!r}.")
        if not 0 <= layer_idx < len(stores):
            raise ValueError(f"`layer_idx` must be between 0 and {len(stores) - 1}, got {layer_idx}.")
        store = stores[layer_idx]
        if store is None:
            raise ValueError(f"`layer_idx` {layer_idx} is a linear layer, which keeps no tokens.")
        parts = store.tokens().positions.cpu().split(store.counts.tolist())
        heads = self.config.num_key_value_heads
        return [list(parts[i : i + heads]) for i in range(0, len(parts), heads)]

    def kv_usage(self) -> torch.Tensor:
        """`[layers, B, Hk]` float32 fraction of the tokens seen (padding aside) that is kept."""
        return self.kept_tokens().float() / self.layers[0].real_tokens.cpu().clamp(min=1)[None, :, None]

    def memory_bytes(self) -> int:
        """Bytes of memory that the cache really holds: allocated storage, unused slots included."""
        self._guard.check()
        storages = {}
        if self._padding is not None:
            storages[self._padding.device, self._padding.data_ptr()] = self._padding.nbytes
        for layer in self.layers:
            for x in layer.tensors() if layer.is_initialized else []:
                storages[x.device, x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(storages.values())

    def state_bytes(self) -> int:
        """Bytes of the states of fixed size (convolution and RNN), part of `memory_bytes`."""
        self._guard.check()
        return sum(layer.state_bytes() for layer in self.layers)

    def full_kv_bytes(self) -> int:
        """Bytes of keys and values if every token seen were kept in every layer that has attention."""
        config = self.config
        per_token = config.num_key_value_heads * (config.head_dim + config.value_head_dim)
        itemsizes = sum(store.dtype.itemsize for store in self._stores() if store is not None)
        return self.get_seq_length() * self.batch_size * per_token * itemsizes

    def prune(self, threshold: float | list[float] | torch.Tensor) -> None:
        """Forgets what lies below a threshold: what remains is what it would have kept at the same scores.

        Args:
            threshold: as in `generate`; `ValueError` or `TypeError` as there.
        """
        self._stores()
        hybrid = [i for i, layer_type in enumerate(self.config.layer_types) if layer_type == "hybrid"]
        tensor = check_threshold(threshold, len(hybrid), self.batch_size, self.config.num_key_value_heads)
        if tensor is None:
            raise TypeError("`threshold` must be given: `prune` has no learned thresholds to fall back to.")
        with self.changing("prune"):
            for layer_idx, limit in zip(hybrid, tensor.expand(len(hybrid), -1, -1), strict=True):
                self.layers[layer_idx].prune(limit)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to one safetensors file, whole or not at all, with the permissions of any new file.

        Raises:
            OSError: if the file cannot be written; it names `path`.
            ValueError: if the cache is empty, or holds values that are not finite.
        """
        self._stores()
        states = [layer.state_dict() for layer in self.layers]
        for i, (state, layer_type) in enumerate(zip(states, self.config.layer_types, strict=True)):
            check_saved_layer(f"layer {i}", state, self.config, layer_type, self.get_seq_length())
        tensors = {f"{i}.{name}": x.contiguous() for i, state in enumerate(states) for name, x in state.items()}
        if self._padding is not None:
            tensors["padding"] = self._padding.contiguous()
        write_cache(path, tensors, self.config, self.get_seq_length(), self._known_fingerprint())

    @classmethod
    def load(cls, path: str | os.PathLike, config: HAMConfig, device: torch.device | str = "cpu") -> "HAMCache":
        """Reads a cache written by `save`; `config` must be the one of the model that filled it.

        The first call of a model compares its dtype and a sample of its weights with those that filled the cache.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is damaged, not a cache, of another version, or of a model of another configuration.
        """
        cache, device = cls(config), torch.device(device)
        seen_tokens, known, tensors = read_cache(path, config, device)
        padding = tensors.pop("padding", None)
        for i, layer in enumerate(cache.layers):
            prefix = f"{i}."
            state = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
            where = f"`path` {os.fspath(path)!r}, layer {i}"
            check_saved_layer(where, state, config, config.layer_types[i], seen_tokens)
            layer.load_state_dict(state, seen_tokens)
            if not torch.equal(layer.real_tokens, cache.layers[0].real_tokens):
                raise ValueError(f"{where}: `real_tokens` must be those of layer 0.")
        check_saved_padding(f"`path` {os.fspath(path)!r}", padding, cache.layers[0].real_tokens, seen_tokens)
        cache._padding, cache._fingerprint = padding, known
        return cache


__all__ = ["HAMCache"]
