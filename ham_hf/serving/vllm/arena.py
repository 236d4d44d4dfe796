# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Arena, the memory of all requests in one pool of blocks that vLLM allocates, and the tables that find it there."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ...configuration_ham import HAMConfig
from ...paged_store_ham import PAGE_SIZE
from .layout import BLOCK_PAGES, MemoryLayout
from .manager import HAMSpec, Report, Row

# Name of the one layer with a cache that vLLM sees, which must hold a number.
ARENA = "ham.layers.0.memory"


class Arena(nn.Module, MambaBase):
    """The pool of blocks, and where in it each request has its memory.

    Attributes:
        blocks: `[blocks, bytes]` int8, the pool.
        pages: the fields of every page in it, `[blocks * BLOCK_PAGES, ...]`.
        table: `[slots, most blocks of a request]` int64, the blocks of each request; block 0 belongs to none.
        rows: the requests of the running step, by their first blocks.
        reports: what the scheduler is to be told, by the epoch of each request.
    """

    def __init__(self, config: HAMConfig, vllm_config: Any):
        super().__init__()
        self.config = config
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.layout = MemoryLayout.of(config, self.dtype)
        most = self.get_kv_cache_spec(vllm_config).max_num_blocks_per_req(
            vllm_config, vllm_config.model_config.max_model_len
        )
        self.table = torch.zeros(vllm_config.scheduler_config.max_num_seqs, most, dtype=torch.long)
        self.rows: dict[int, Row] = {}
        self.reports: dict[int, Report] = {}
        self.kv_cache = (torch.empty(0),)
        vllm_config.compilation_config.static_forward_context[ARENA] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The name under which `register` announced the backend."""
        return MambaAttentionBackendEnum["HAM"]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """A block, as bytes."""
        return ((self.layout.block_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """The dtype of `get_state_shape`."""
        return (torch.int8,)

    def get_kv_cache_spec(self, vllm_config: Any) -> HAMSpec:
        """What the scheduler must know of the layout."""
        return HAMSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=PAGE_SIZE,
            mamba_type=self.mamba_type,
            hybrid_streams=self.layout.hybrid_streams,
            full_streams=self.layout.full_streams,
            state_blocks=self.layout.state_blocks,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Takes the pool that vLLM has allocated."""
        super().bind_kv_cache(kv_cache)
        self.blocks = self.kv_cache[0]
        pages = self.blocks.view(len(self.blocks) * BLOCK_PAGES, self.layout.page_bytes)
        self.pages = {name: field.view(pages) for name, field in self.layout.page.items()}
        self.table = self.table.to(self.blocks.device)

    def begin(self, rows: list[Row]) -> None:
        """Takes in the requests of a step, and where the lists of their blocks have changed."""
        self.rows = {row.first_block: row for row in rows}
        for row in rows:
            slot, start, blocks = row.changes.slot, row.changes.start, row.changes.blocks
            if blocks or row.changes.shrunk:
                entries = torch.tensor(blocks, dtype=torch.long)
                self.table[slot, start : start + len(blocks)] = entries.to(self.table.device)
                # A write by mistake ends in the block that belongs to none.
                self.table[slot, start + len(blocks) :] = 0

    def page_ids(self, slots: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Places in the pool of the pages with a `number` among those of the requests at `slots`, both `[n]`."""
        block = self.table[slots, self.layout.state_blocks + number // BLOCK_PAGES]
        return block * BLOCK_PAGES + number % BLOCK_PAGES

    def take_reports(self) -> dict[int, Report]:
        """The reports since the last call."""
        reports, self.reports = self.reports, {}
        return reports
