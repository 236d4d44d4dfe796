# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMCache, the memories of all layers: Transformers' interface, memory use, saving and loading."""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .cache_file_ham import (
    check_same_model,
    check_saved_layer,
    check_saved_padding,
    fingerprint,
    read_cache,
    write_cache,
)
from .cache_guard_ham import CacheGuard
from .cache_layer_ham import HAMCacheLayer, checked_rows
from .cache_report_ham import cache_report
from .configuration_ham import HAMConfig
from .paged_store_ham import PagedStore
from .routing_ham import check_threshold

# Shortage of free pages at which a store makes a new slab on its own, and at which it does when another store does.
GROWS, GROWS_WITH_OTHERS = 0.75, 0.25


def _trimmed(padding: torch.Tensor) -> torch.Tensor | None:
    """`[B, n]` bool up to the last column with padding, `None` without any; unchanged on a GPU, to avoid a wait."""
    if padding.device.type != "cpu":
        return padding
    columns = padding.any(0).nonzero()
    return padding[:, : int(columns[-1]) + 1].clone() if len(columns) else None


class HAMCache(Cache):
    """Cache of a HAM model. `generate` makes one by itself; pass one as `cache` to continue a conversation.

    Two numbers differ: tokens seen (`get_seq_length`), which determine positions, and tokens kept (`kept_tokens`),
    which take memory.

    A call that fails before it changes anything leaves the cache as it was. A call that stops later (an exception, an
    interrupt) leaves it half-changed: every use but `reset` then raises `RuntimeError`. A second call during another
    one raises it too. A cache holds no autograd graph: gradients stop at it, as in truncated backpropagation.

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
        # Compared by name, because a checkpoint's remote code may load a class of its own.
        if getattr(config, "model_type", None) != HAMConfig.model_type:
            raise TypeError(f"`config` must be a HAMConfig, got {type(config).__name__}.")
        if not isinstance(offloading, bool):
            raise TypeError(f"`offloading` must be True or False, got {offloading!r}.")
        super().__init__(layers=[HAMCacheLayer(config.window_of(i)) for i in range(config.num_hidden_layers)])
        self.config = config
        self.offload_layers = offloading
        # The model that filled the cache, and its fingerprint in case the model is gone.
        self._model: weakref.ref[nn.Module] | None = None
        self._fingerprint: dict[str, str] | None = None
        # `[B, n]` bool, true for padding among the first `n` tokens seen; every later one is real.
        self._padding: torch.Tensor | None = None
        self.holds_cut_graph = False
        self._guard = CacheGuard()

    def __getstate__(self) -> dict[str, Any]:
        """Replaces the model by its fingerprint in a copy."""
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
        """True once the cache has seen a token."""
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
        """Empties the cache, and clears the record of a call that stopped halfway."""
        self._guard.forgive()
        with self.changing("reset"):
            self._forget()

    def _forget(self) -> None:
        super().reset()
        self._model = self._fingerprint = self._padding = None
        self.holds_cut_graph = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, which must have been recorded; earlier ones become final.

        Raises:
            ValueError: if the number is positive, or exceeds the recorded tokens.
        """
        with self.changing("crop"):
            super().crop(tokens_to_remove)
            if self._padding is not None:
                self._padding = _trimmed(self._padding[:, : self.layers[0].seen_tokens])

    def stop_past_recording(self) -> None:
        """Makes every token final, and ends the recording that `activate_past_recording` began."""
        for layer in self.layers:
            layer.stop_past_recording()

    def fork(self) -> "HAMCache":
        """A cache with the same past, to go on from it in another way; its tokens are final.

        Full pages of kept tokens are shared, and `memory_bytes` of both counts them. Neither changes what the other
        holds: what would write to a shared page (a `kv_budget` that is full, a `crop`) takes a copy of its slab first.

        Raises:
            RuntimeError: as every use does, see the class.
        """
        with self._guard.held("fork"):
            cache = HAMCache(self.config, self.offload_layers)
            cache.layers = [layer.fork() for layer in self.layers]
            cache._model, cache._fingerprint, cache._padding = self._model, self._fingerprint, self._padding
            cache.holds_cut_graph = self.holds_cut_graph
            return cache

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
        """Ensures that the device can append one more token to every head of every row by itself.

        Does nothing while the free pages are sure to suffice. Otherwise the host waits for the device and checks all
        layers. Layers grow together, because growth invalidates a captured step: when one has used three quarters of
        its spare pages, every layer that has used a quarter grows too.

        Args:
            layer_idx: the layer that appends next, or `None` for all layers. Within a step, earlier layers may have
                used their last reserved step with this very token, which must not make the host wait.
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
        """`[layers, B, Hk]` int64 number of tokens that the routers and `kv_budget` kept; zero in linear layers."""
        return self._tokens(HAMCacheLayer.kept_tokens)

    def held_tokens(self) -> torch.Tensor:
        """`[layers, B, Hk]` int64 number of tokens in memory, which attention reads: kept ones, and the window's."""
        return self._tokens(HAMCacheLayer.held_tokens)

    def _tokens(self, count: Callable[[HAMCacheLayer], torch.Tensor]) -> torch.Tensor:
        self._stores()
        empty = torch.zeros(self.batch_size, self.config.num_key_value_heads, dtype=torch.long, device="cpu")
        return torch.stack([empty if layer.store is None else count(layer).cpu() for layer in self.layers])

    def kept_positions(self, layer_idx: int) -> list[list[torch.Tensor]]:
        """Sorted positions (among real tokens) of one layer's kept tokens, for each row and head, int32."""
        stores = self._stores()
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int):
            raise TypeError(f"`layer_idx` must be an int, got {layer_idx!r}.")
        if not 0 <= layer_idx < len(stores):
            raise ValueError(f"`layer_idx` must be between 0 and {len(stores) - 1}, got {layer_idx}.")
        if stores[layer_idx] is None:
            raise ValueError(f"`layer_idx` {layer_idx} is a linear layer, which keeps no tokens.")
        parts = self.layers[layer_idx].kept_positions()
        heads = self.config.num_key_value_heads
        return [parts[i : i + heads] for i in range(0, len(parts), heads)]

    def kv_usage(self) -> torch.Tensor:
        """`[layers, B, Hk]` float32 fraction of the real tokens seen that is held in memory."""
        return self.held_tokens().float() / self.layers[0].real_tokens.cpu().clamp(min=1)[None, :, None]

    def memory_bytes(self) -> int:
        """Bytes of storage that the cache has allocated, unused slots included."""
        self._guard.check()
        padding = 0 if self._padding is None else self._padding.nbytes
        return padding + sum(layer.memory_bytes() for layer in self.layers)

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

    def report(self) -> str:
        """Tokens seen, the share of them in memory and the bytes of both, of all layers and of each, as lines of text.

        Raises:
            ValueError: if the cache has seen no tokens yet.
        """
        usage = self.kv_usage()
        return cache_report(
            self.layers[0].real_tokens,
            self.config.layer_types,
            usage,
            self.memory_bytes(),
            self.state_bytes(),
            self.full_kv_bytes(),
            [layer.memory_bytes() for layer in self.layers],
        )

    def prune(self, threshold: float | list[float] | torch.Tensor) -> None:
        """Drops tokens with scores below a threshold, which leaves those it would have kept at the same scores.

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
        for i, state in enumerate(states):
            check_saved_layer(f"layer {i}", state, self.config, i, self.get_seq_length())
        tensors = {f"{i}.{name}": x.contiguous() for i, state in enumerate(states) for name, x in state.items()}
        if self._padding is not None:
            tensors["padding"] = self._padding.contiguous()
        write_cache(path, tensors, self.config, self.get_seq_length(), self._known_fingerprint())

    @classmethod
    def load(cls, path: str | os.PathLike, config: HAMConfig, device: torch.device | str = "cpu") -> "HAMCache":
        """Reads a cache written by `save`; `config` must be that of the model that filled it.

        The first call of a model compares its dtype and a sample of its weights with those that filled the cache.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is damaged or not a cache, or if its version or the model's configuration differs.
        """
        cache, device = cls(config), torch.device(device)
        seen_tokens, known, tensors = read_cache(path, config, device)
        padding = tensors.pop("padding", None)
        for i, layer in enumerate(cache.layers):
            prefix = f"{i}."
            state = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
            where = f"`path` {os.fspath(path)!r}, layer {i}"
            check_saved_layer(where, state, config, i, seen_tokens)
            layer.load_state_dict(state, seen_tokens)
            if not torch.equal(layer.real_tokens, cache.layers[0].real_tokens):
                raise ValueError(f"{where}: `real_tokens` must be those of layer 0.")
        check_saved_padding(f"`path` {os.fspath(path)!r}", padding, cache.layers[0].real_tokens, seen_tokens)
        cache._padding, cache._fingerprint = padding, known
        return cache


__all__ = ["HAMCache"]
