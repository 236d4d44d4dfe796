# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMCacheLayer, the memories of one layer: convolution state, recurrent state and the pages of kept tokens."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .attention_ham import (
    KeptColumns,
    attend_new,
    attend_stream_by_stream,
    ragged_decode_attention,
    window_starts,
)
from .delta_rule_ham import gated_delta_rule_with_prediction
from .layer_step_ham import LayerStep
from .ops_ham import convolution_state
from .paged_store_ham import KeptTokens, PagedStore, map_tensors, ranks, writable
from .recent_tokens_ham import RecentTokens


def _scatter_columns(
    x: torch.Tensor, streams: torch.Tensor, columns: torch.Tensor, batch: int, heads: int, width: int
) -> torch.Tensor:
    out = x.new_zeros(batch * heads, width, *x.shape[1:])
    out[streams, columns] = x
    return out.unflatten(0, (batch, heads))


def _attend_stored(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor,
    store: PagedStore,
    recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    window_start: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens over a store, the kept new tokens before them, and themselves, as in `attend_new`.

    `recent` is that of `ragged_decode_attention`; with `window_start` `[B, T]`, `k`, `v`, `keep` and `real` begin with
    the recent tokens, as in `attend_stream_by_stream`.
    """
    heads = k.shape[2]
    q, k, v, keep = (x.transpose(1, 2).flatten(0, 1) for x in (q.unflatten(2, (heads, -1)), k, v, keep))
    index = None if window_start is not None else store.index()
    # With an index the operation counts the used pages itself, and whole slabs stay the same until the store grows.
    slabs = store.pages() if index is None else store.slabs
    pages = [(x["keys"], x["values"], x["owner"]) for x in slabs]
    tail = (store.tail["keys"], store.tail["values"], store.fill)
    if window_start is None:
        out = ragged_decode_attention(q, k, v, keep, pages, tail, index=index, recent=recent)
    else:
        windows = (None if x is None else x.repeat_interleave(heads, 0) for x in (window_start, real))
        out = attend_stream_by_stream(q, k, v, keep, pages, tail, q.shape[-1] ** -0.5, *windows)
    return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2, 3)


class HAMCacheLayer(CacheLayerMixin):
    """One layer's memories: convolution state, recurrent state and, unless it is linear, kept and recent tokens.

    `update` takes a whole `LayerStep` instead of Transformers' dense keys and values, and returns nothing; `attend`
    computes attention.

    Args:
        window: number of the last real tokens that a query sees, itself included; 0 in layers that keep every token.
    """

    is_sliding = False
    supports_early_init = False
    is_croppable = True

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.window = window
        # Number of changes: it tells a call that stopped halfway from one that changed nothing.
        self.changes = 0
        self.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a writable copy, also of tensors made in inference mode."""
        steps = [step.mapped(writable) for step in state["_steps"]]
        vars(self).update(map_tensors(writable, state) | {"_steps": steps})

    def reset(self) -> None:
        """Empties the layer, as if newly made."""
        self.changes += 1
        self.record_past = False
        self.conv_state: torch.Tensor | None = None
        self.recurrent_state: torch.Tensor | None = None
        self.store: PagedStore | None = None
        self.recent: RecentTokens | None = None
        self.real_tokens = torch.zeros(0, dtype=torch.long)
        self.seen_tokens = 0
        self.is_initialized = False
        self._base: dict | None = None
        self._steps: list[LayerStep] = []

    @property
    def kernels_may_write(self) -> bool:
        """True if the kernels of a decoding step may update states in place: a rollback needs the old ones."""
        return not self.record_past

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first token."""
        return len(self.real_tokens) if self.is_initialized else -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes an empty store for `[B, T, Hk, K]` keys and `[B, T, Hk, V]` values."""
        self.device, self.dtype = key_states.device, key_states.dtype
        batch, _, heads, key_dim = key_states.shape
        self._make_stores(batch * heads, key_dim, value_states.shape[-1])

    def _make_stores(self, num_streams: int, key_dim: int, value_dim: int) -> None:
        self.store = PagedStore(num_streams, key_dim, value_dim, self.dtype, self.device)
        if self.window > 1:
            self.recent = RecentTokens(num_streams, self.window - 1, key_dim, value_dim, self.dtype, self.device)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not, padding included."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens, as Transformers asks for them."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no largest length."""
        return -1

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keep: torch.Tensor,
        scores: torch.Tensor,
        budget: int | None,
        real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of new tokens over this layer's kept and recent tokens, the new ones before them, and themselves.

        Args:
            q: `[B, n, H, K]`, of all new tokens or, while the layer has no store, of the last `n`.
            k, v: `[B, T, Hk, K]` and `[B, T, Hk, V]`.
            keep: `[B, T, Hk]` bool; scores: `[B, T, Hk]`.
            budget: most tokens per head, beyond which the lowest score is dropped, or `None`.
            real: `[B, T]` bool, false for padding, or `None`.

        Returns:
            `[B, n, H, V]`.
        """
        if not self.is_initialized or self.store is None:
            return attend_new(q, k, v, keep, scores, budget, window=self.window, real=real)
        start = None
        if self.recent is not None:
            # A gradient needs copies: the next token overwrites the oldest one of the ring.
            if q.shape[1] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
                recent = self.recent.keys, self.recent.values, self.recent.fill(self._seen_by_stream())
                return _attend_stored(q, k, v, keep, self.store, recent)
            k, v, keep, scores, real = self._after_recent(self.recent, k, v, keep, scores, real)
            start = window_starts(self.window, k.shape[0], k.shape[1], k.device, real, None)[:, -q.shape[1] :]
        # With a budget, stored tokens may be dropped during a call; the budget also bounds the cost of padding.
        if budget is None or q.shape[1] == 1:
            return _attend_stored(q, k, v, keep, self.store, window_start=start, real=real)
        batch, _, heads, _ = k.shape
        held = self.store.tokens()
        largest = int(self.store.counts.max())
        # Right-aligned, so that the cached and new tokens that a query sees are one span of columns.
        column = ranks(held.streams, self.store.counts) + (largest - self.store.counts)[held.streams]
        keys, values, kept_scores = (
            _scatter_columns(x, held.streams, column, batch, heads, largest)
            for x in (held.keys, held.values, held.scores)
        )
        cached = KeptColumns(keys, values, kept_scores, counts=self.store.counts.view(batch, heads))
        return attend_new(q, k, v, keep, scores, budget, cached, window=self.window, real=real)

    def _seen_by_stream(self) -> torch.Tensor:
        """`[N]` real tokens that each stream has seen."""
        return self.real_tokens.repeat_interleave(self._kept_store().num_streams // self.batch_size)

    def _after_recent(
        self,
        recent: RecentTokens,
        k: torch.Tensor,
        v: torch.Tensor,
        keep: torch.Tensor,
        scores: torch.Tensor,
        real: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """The arguments of `attend`, `[B, R + T, ...]`, after the `R` recent tokens; unused slots are padding."""
        heads = k.shape[2]
        *fields, used = recent.in_order(self._seen_by_stream())
        old_k, old_v, old_scores, old_keep = (x.unflatten(0, (-1, heads)).transpose(1, 2) for x in fields)
        used = used[::heads]
        real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if real is None else real
        pairs = ((old_k, k), (old_v, v), (old_keep & used[..., None], keep), (old_scores, scores), (used, real))
        return tuple(torch.cat(pair, 1) for pair in pairs)

    def dense_keys(self, past_real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Held keys at their columns among all tokens seen, `[B, Hk, S, K]`, and the mask `[B, Hk, S]` of kept tokens.

        Args:
            past_real: `[B, S]` bool, false for padding; `None` if every token seen was real.
        """
        batch, store = self.batch_size, self._kept_store()
        heads = store.num_streams // batch
        held = store.tokens()
        parts = [(held.keys, held.streams, held.positions.long(), torch.ones_like(held.streams, dtype=torch.bool))]
        if self.recent is not None:
            seen = self._seen_by_stream()
            slots, positions = self.recent.slots_in_order(seen, self.recent.size)
            stream, column = (positions >= 0).nonzero(as_tuple=True)
            slot = slots[stream, column]
            parts.append(
                (self.recent.keys[stream, slot], stream, positions[stream, column], self.recent.keep[stream, slot])
            )
        held_keys, streams, columns, kept = (torch.cat(x) for x in zip(*parts, strict=True))
        if past_real is not None:
            # The p-th real token of a row is in the column of the p-th true entry of its mask.
            order = (~past_real).to(torch.uint8).argsort(dim=1, stable=True)
            columns = order[streams // heads, columns]
        keys = _scatter_columns(held_keys, streams, columns, batch, heads, self.seen_tokens)
        return keys, _scatter_columns(kept, streams, columns, batch, heads, self.seen_tokens)

    def kept_tokens(self) -> torch.Tensor:
        """`[B, Hk]` tokens that were kept when they arrived, whether or not they are still in the window."""
        counts = self._kept_store().counts
        if self.recent is not None:
            counts = counts + self.recent.kept_tokens(self._seen_by_stream())
        return counts.view(self.batch_size, -1)

    def held_tokens(self) -> torch.Tensor:
        """`[B, Hk]` tokens whose keys and values take memory: kept ones, and all in the window."""
        counts = self._kept_store().counts
        if self.recent is not None:
            counts = counts + self.recent.fill(self._seen_by_stream())
        return counts.view(self.batch_size, -1)

    def kept_positions(self) -> list[torch.Tensor]:
        """Sorted positions, int32, of the kept tokens of each stream."""
        store = self._kept_store()
        tokens = store.tokens()
        streams, positions = tokens.streams, tokens.positions
        if self.recent is not None:
            seen = self._seen_by_stream()
            young = self.recent.come_of_age(seen, torch.full_like(seen, self.recent.size), self.recent.size)
            streams, positions = torch.cat([streams, young.streams]), torch.cat([positions, young.positions])
            positions = positions[streams.argsort(stable=True)]
        return list(positions.cpu().split(self.kept_tokens().flatten().tolist()))

    def _kept_store(self) -> PagedStore:
        if self.store is None:
            raise ValueError("A linear layer, and a layer that has seen no tokens, keeps none.")
        return self.store

    def update(self, step: LayerStep, budget: int | None = None) -> None:  # type: ignore[override]
        """Stores the results of one forward; with `budget`, a full head drops its lowest scores.

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
        seen = self.real_tokens + (step.length if step.real is None else step.real.sum(1))
        if self.store is not None:
            kept = step.kept() if self.recent is None else self._let_age(self.recent, step, seen)
            self._keep(self.store, kept, budget, step.length)
        self.conv_state, self.recurrent_state = step.conv_state, step.recurrent_state
        self.seen_tokens += step.length
        self.real_tokens = seen

    def _let_age(self, recent: RecentTokens, step: LayerStep, seen: torch.Tensor) -> KeptTokens:
        """Takes in a step, after which rows have `seen` `[B]` real tokens; returns kept tokens that left the ring."""
        if step.keys is None or step.values is None or step.scores is None or step.keep is None:
            raise ValueError("A step of a linear layer keeps no tokens.")
        before = self._seen_by_stream()
        added = seen.repeat_interleave(len(before) // len(seen)) - before
        old = recent.come_of_age(before, added, step.length)
        tokens = (step.keys, step.values, step.scores, step.keep)
        newest = recent.write(tokens, step.positions, seen, step.real)
        if step.length <= recent.size:
            return old
        # A call longer than the window brings tokens that are of age when it ends.
        young = replace(step, keep=step.keep & ~newest[..., None]).kept()
        joined = KeptTokens(*(torch.cat(x) for x in zip(vars(old).values(), vars(young).values(), strict=True)))
        return joined.select(joined.streams.argsort(stable=True))

    def _page_budget(self, budget: int) -> int:
        """Tokens that a head may hold in pages, out of `budget` in all."""
        return budget if self.recent is None else budget - self.recent.size

    def _keep(self, store: PagedStore, kept: KeptTokens, budget: int | None, length: int) -> None:
        if budget is None:
            store.append(kept)
        elif length == 1:
            full = store.counts[kept.streams] >= self._page_budget(budget)
            store.replace_lowest(kept.select(full))
            store.append(kept.select(~full))
        else:
            store.append(kept)
            self.enforce_budget(budget)

    def enforce_budget(self, budget: int) -> None:
        """Drops the lowest scores of every head with more than `budget` tokens; the oldest of equal scores first."""
        if self.store is None or int(self.store.counts.max()) <= self._page_budget(budget):
            return
        self.changes += 1
        tokens = self.store.tokens()
        survives = strongest(tokens, self.store.counts, self._page_budget(budget))
        self.store = self.store.rebuilt(tokens.select(survives))

    def open_pages(self) -> tuple[torch.Tensor, ...] | None:
        """Tensors that the kernel of a decoding step appends to, `None` in a linear layer; call `reserve` first."""
        return None if self.store is None else self.store.open_pages()

    def addressed(self) -> list[torch.Tensor | None]:
        """Tensors whose addresses a captured CUDA graph has baked in; the graph is valid while they are unchanged."""
        store = self.store
        stored = [] if store is None else [store.counts, *(store.index() or ())[:1]]
        stored += [] if self.recent is None else self.recent.tensors()
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
            "recent": None if self.recent is None else self.recent.mark(),
        }

    def accept(self, inputs: torch.Tensor | None = None, keys: torch.Tensor | None = None) -> None:
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
        """Records the tokens that later forwards add, until `crop`, so that they can be removed exactly.

        The record is dense, dropped tokens included: assisted generation holds a whole prompt until its first `crop`.
        """
        self.record_past = True

    def stop_past_recording(self) -> None:
        """Makes every token final and stops recording."""
        self.record_past = False
        self._base, self._steps = None, []

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and makes the ones before them final.

        Raises:
            ValueError: if the number is positive, or exceeds the recorded tokens.
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
        if self.recent is not None:
            self.recent.rollback(base["recent"])
        if recorded > removed:
            self._replay(LayerStep.joined(steps).first(recorded - removed))

    def _replay(self, step: LayerStep) -> None:
        """Stores a step again, and recomputes the states after its inputs."""
        conv_state = recurrent_state = None
        if step.conv_inputs is not None and self.conv_state is not None:
            conv_state = convolution_state(step.conv_inputs, self.conv_state, step.real)
        if step.rnn is not None:
            k, v, g, beta = step.rnn
            _, _, recurrent_state = gated_delta_rule_with_prediction(
                k, k, v, g, beta, initial_state=self.recurrent_state, predict=False
            )
        step = replace(step, conv_state=conv_state, recurrent_state=recurrent_state)
        self._take(step, budget=None)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at `indices` `[n]` (int, repeats allowed, or a bool mask); earlier tokens become final."""
        if not self.is_initialized:
            return
        # The tensors' own device: an offloaded layer is not on the device it works on.
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
            self.recent = None if self.recent is None else self.recent.selected(streams)
        self.real_tokens = self.real_tokens[rows]
        self.conv_state = None if self.conv_state is None else self.conv_state[rows]
        self.recurrent_state = None if self.recurrent_state is None else self.recurrent_state[rows]

    @torch.inference_mode(False)
    def fork(self) -> "HAMCacheLayer":
        """A layer with the same memories, which shares full pages with this one; its tokens are final."""
        layer = copy.copy(self)
        states = [self.conv_state, self.recurrent_state, self.real_tokens]
        layer.conv_state, layer.recurrent_state, layer.real_tokens = map_tensors(torch.clone, states)
        layer._base, layer._steps = None, []
        layer.store = None if self.store is None else self.store.fork()
        layer.recent = copy.deepcopy(self.recent)
        return layer

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
        if self.recent is not None:
            self.recent.keep &= self.recent.scores >= limit[:, None]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer holds."""
        steps = [x for step in self._steps for x in [*vars(step).values(), *(step.rnn or ())]]
        base = [] if self._base is None else [self._base["conv_state"], self._base["recurrent_state"]]
        if self._base is not None and self._base["store"] is not None:
            store = self._base["store"]
            base.extend([store["counts"], store["full_pages"], *store["tail"].values()])
            base.extend((self._base["recent"] or {}).values())
        own = [self.conv_state, self.recurrent_state, self.real_tokens, *steps, *base]
        stored = [] if self.store is None else self.store.tensors()
        recent = [] if self.recent is None else self.recent.tensors()
        return [x for x in own if isinstance(x, torch.Tensor)] + stored + recent

    def memory_bytes(self) -> int:
        """Bytes of storage that the layer has allocated."""
        tensors = self.tensors() if self.is_initialized else []
        storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values())

    def state_bytes(self) -> int:
        """Bytes of the convolution and recurrent states, which do not grow."""
        return sum(x.nbytes for x in (self.conv_state, self.recurrent_state) if x is not None)

    def to(self, device: torch.device) -> None:
        """Moves everything to `device`."""
        if not self.is_initialized:
            return
        move = partial(torch.Tensor.to, device=device)
        own = map_tensors(move, [self.conv_state, self.recurrent_state, self.real_tokens, self._base])
        self.conv_state, self.recurrent_state, self.real_tokens, self._base = own
        self._steps = [step.mapped(move) for step in self._steps]
        for held in (self.store, self.recent):
            if held is not None:
                held.to(device)

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
        if self.recent is not None:
            state |= {f"recent_{name}": getattr(self.recent, name) for name in RecentTokens.FIELDS}
        return {name: x for name, x in state.items() if x is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor], seen_tokens: int) -> None:
        """Restores a `state_dict` that `check_saved_layer` has checked."""
        self.reset()
        self.real_tokens = state["real_tokens"]
        self.conv_state, self.recurrent_state = state.get("conv_state"), state.get("recurrent_state")
        self.device, self.seen_tokens, self.is_initialized = self.real_tokens.device, seen_tokens, True
        if "counts" not in state:
            return
        tokens = KeptTokens(**{name: state[name] for name in (*PagedStore.FIELDS, "streams")})
        self.dtype = tokens.keys.dtype
        self._make_stores(len(state["counts"]), tokens.keys.shape[1], tokens.values.shape[1])
        self._kept_store().append(tokens)
        if self.recent is not None:
            self.recent.rollback({name: state[f"recent_{name}"] for name in RecentTokens.FIELDS})

    def prefetch(self) -> None:
        """Brings an offloaded layer back to the device it works on."""
        if self.is_initialized:
            self.to(self.device)


def strongest(tokens: KeptTokens, counts: torch.Tensor, number: int) -> torch.Tensor:
    """`[n]` bool: the `number` tokens of each stream with the highest scores; the oldest of equal ones leaves first.

    Args:
        tokens: ordered by stream and position.
        counts: `[N]` tokens of each stream.
        number: tokens to remain.
    """
    # Stable sorts by score and then by stream put the oldest first.
    order = tokens.scores.argsort(stable=True)
    order = order[tokens.streams[order].argsort(stable=True)]
    streams = tokens.streams[order]
    survives = torch.zeros_like(streams, dtype=torch.bool)
    survives[order] = ranks(streams, counts) >= (counts - number)[streams]
    return survives


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


__all__ = ["HAMCacheLayer", "checked_rows", "strongest"]
