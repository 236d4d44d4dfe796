# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""MemoryLayout: how the memories of a request lie in vLLM's blocks, for the scheduler as for the workers."""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch

from ...configuration_ham import HAMConfig
from ...paged_store_ham import PAGE_SIZE

# Pages of a block: a request takes and gives back whole blocks, so small ones waste little.
BLOCK_PAGES = 16
# Every field starts at a multiple of this many bytes, which suits every dtype.
ALIGNMENT = 16


@dataclass(frozen=True)
class Field:
    """A tensor within a state or a page: `shape` and `dtype`, from byte `offset` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensors of `memory` `[n, bytes]` int8 as `[n, *shape]`, in place."""
        flat = memory[:, self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.view(len(memory), *self.shape) if self.shape else flat[:, 0]


def _fields(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[dict[str, Field], int]:
    """Fields one behind the other, and their bytes in all."""
    fields, offset = {}, 0
    for name, (shape, dtype) in tensors.items():
        fields[name] = Field(offset, shape, dtype)
        offset += -(-fields[name].nbytes // ALIGNMENT) * ALIGNMENT
    return fields, offset


@dataclass(frozen=True)
class MemoryLayout:
    """How a request's memories lie in blocks of bytes.

    Its first blocks hold its state: what does not grow, and the numbers of tokens. Each further block holds
    `BLOCK_PAGES` pages of `PAGE_SIZE` kept tokens of one stream, that is, one key/value head of one layer with
    attention. A page is taken when a stream needs it, so heads may keep different numbers of tokens.

    Attributes:
        state: fields of the state; those of layer 3 are named `"3.recurrent"`.
        page: fields of a page; `stream` is the number of its owner among the request's streams.
        layers: the layers with attention, whose streams are numbered in this order.
        heads: streams of each of them.
        hybrid_streams: streams that drop tokens.
        full_streams: streams that keep every token.
        state_bytes, page_bytes: sizes of both.
    """

    state: dict[str, Field]
    page: dict[str, Field]
    layers: tuple[int, ...]
    heads: int
    hybrid_streams: int
    full_streams: int
    state_bytes: int
    page_bytes: int

    @classmethod
    def of(cls, config: HAMConfig, dtype: torch.dtype) -> Self:
        """The layout for a model that computes in `dtype`."""
        heads, key_dim, value_dim = config.num_key_value_heads, config.head_dim, config.value_head_dim
        layers = tuple(i for i, kind in enumerate(config.layer_types) if kind != "linear_attention")
        state: dict[str, Any] = {
            "seen": ((), torch.int32),
            "pages": ((), torch.int32),
            "counts": ((len(layers), heads), torch.int32),
        }
        for i, kind in enumerate(config.layer_types):
            state |= _layer_state(config, i, kind, dtype)
        page = {
            "keys": ((PAGE_SIZE, key_dim), dtype),
            "values": ((PAGE_SIZE, value_dim), dtype),
            "scores": ((PAGE_SIZE,), torch.float32),
            "positions": ((PAGE_SIZE,), torch.int32),
            "stream": ((), torch.int32),
        }
        fields, state_bytes = _fields(state)
        page_fields, page_bytes = _fields(page)
        hybrid = config.num_hybrid_layers * heads
        return cls(fields, page_fields, layers, heads, hybrid, len(layers) * heads - hybrid, state_bytes, page_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return BLOCK_PAGES * self.page_bytes

    @property
    def state_blocks(self) -> int:
        """Blocks of a request's state."""
        return -(-self.state_bytes // self.block_bytes)


def _layer_state(config: HAMConfig, layer: int, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Shapes and dtypes of what one layer remembers in a fixed size."""
    shape, heads = config.layer_shape(kind), config.num_key_value_heads
    state: dict[str, Any] = {}
    if kind != "full_attention" or config.attention_conv:
        state["conv"] = ((config.conv_kernel_size - 1, sum(shape.channels)), dtype)
    if kind != "full_attention":
        state["recurrent"] = ((shape.value_heads, shape.key_dim, shape.value_dim), torch.float32)
    # The current token sees itself in any case.
    young = config.window_of(layer) - 1
    if young > 0:
        state |= {
            "recent_keys": ((heads, young, shape.key_dim), dtype),
            "recent_values": ((heads, young, shape.value_dim), dtype),
            "recent_scores": ((heads, young), torch.float32),
            "recent_keep": ((heads, young), torch.bool),
        }
    return {f"{layer}.{name}": tensor for name, tensor in state.items()}
