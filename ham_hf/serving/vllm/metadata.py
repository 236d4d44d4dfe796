# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMBackend, by which vLLM tells the model which tokens of a batch belong to which request."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata


@dataclass
class HAMMetadata:
    """The requests of a batch.

    Attributes:
        starts: index of each request's first token, and the number of tokens.
        first_blocks: the first block of each request, which names it.
    """

    starts: list[int]
    first_blocks: list[int]


class HAMMetadataBuilder(AttentionMetadataBuilder[HAMMetadata]):
    """Makes a `HAMMetadata` of each batch."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> HAMMetadata:
        """Reads what the model needs; the block table's first column waits for a GPU."""
        requests = common_attn_metadata.num_reqs
        return HAMMetadata(
            common_attn_metadata.query_start_loc_cpu[: requests + 1].tolist(),
            common_attn_metadata.block_table_tensor[:requests, 0].tolist(),
        )


class HAMBackend(AttentionBackend):
    """The backend under whose name vLLM finds `HAMMetadataBuilder`; the model computes attention itself."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's registry."""
        return "HAM"

    @staticmethod
    def get_builder_cls() -> type[HAMMetadataBuilder]:
        """The builder of the metadata."""
        return HAMMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """True: there are no keys and values that vLLM could read."""
        return True
