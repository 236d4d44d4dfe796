# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMForServing, the model that vLLM runs: HAMForCausalLM's own layers over the memories of an Arena."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree

from ...configuration_ham import HAMConfig
from ...inputs_ham import TokenLayout
from ...modeling_ham import HAMForCausalLM
from ...routing_ham import Retention
from .arena import ARENA, Arena
from .manager import Row
from .memory import GroupMemory
from .metadata import HAMMetadata
from .sharding import Shard

# Tensors by which the thresholds of requests are found.
LEARNED = (".threshold", ".score_quantiles")


class HAMForServing(nn.Module, HasInnerState, IsAttentionFree):
    """A HAMForCausalLM for batches of tokens of many requests, some with a prompt or a part of one, most with one.

    Requests with equally many tokens run together: all those that generate in one call of each layer, prompts of
    different lengths one after the other. Each request keeps tokens by its own thresholds.

    Args:
        vllm_config: vLLM's configuration, as `HAMSettings` has completed it.
        prefix: of the names of weights; vLLM gives it to models within others.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.config: HAMConfig = vllm_config.model_config.hf_config
        self.shard = Shard(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        part = self.shard.config(self.config)
        with no_init_weights():
            self.ham = HAMForCausalLM(part).eval()
        self.shard.prepare(self.ham)
        self.arena = Arena(part, vllm_config)
        self.mixers = [layer.mixer for layer in self.ham.model.layers]
        # Learned thresholds and score quantiles of all heads, by their names in a checkpoint.
        self.learned: dict[str, torch.Tensor] = {}
        # Of the request at each slot: its thresholds `[hybrid layers, Hk]`, and its budget.
        shape = (len(self.arena.table), part.num_hybrid_layers, part.num_key_value_heads)
        self.thresholds = torch.zeros(shape, dtype=torch.float32)
        self.budgets: list[int | None] = [None] * len(self.arena.table)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[T, D]` of tokens `[T]`."""
        return self.ham.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states `[T, D]` of the tokens of a step `[T]`, or of their embeddings `[T, D]`, by request."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            # vLLM measures the memory that activations need, or warms up: there is no request.
            return self._run(hidden[None], positions[None], None, [Retention()] * len(self.mixers))[0]
        out = torch.empty_like(hidden)
        for rows, spans in self._groups(metadata[ARENA]):
            start = torch.tensor([first for first, _ in spans], device=hidden.device)
            at = start[:, None] + torch.arange(spans[0][1] - spans[0][0], device=hidden.device)
            slots = [row.changes.slot for row in rows]
            budget = self.budgets[slots[0]]
            memory = GroupMemory(self.arena, rows, rows[0].fresh, budget)
            out[at] = self._run(hidden[at], positions[at], memory, self._rules(slots, budget))
            memory.save()
        return out

    def _groups(self, metadata: HAMMetadata) -> Iterable[tuple[list[Row], list[tuple[int, int]]]]:
        """Requests that run together, and the first and last token of each."""
        groups: dict[Any, tuple[list[Row], list[tuple[int, int]]]] = {}
        spans = zip(metadata.starts, metadata.starts[1:], strict=False)
        for block, (first, last) in zip(metadata.first_blocks, spans, strict=True):
            row = self.arena.rows[block]
            if not row.changes.start:
                self._take_in(row)
            rows, places = groups.setdefault((last - first, row.fresh, self.budgets[row.changes.slot]), ([], []))
            rows.append(row)
            places.append((first, last))
        return groups.values()

    def _take_in(self, row: Row) -> None:
        """Notes by which rule a request keeps tokens."""
        hybrid = [i for i, kind in enumerate(self.config.layer_types) if kind == "hybrid"]
        # A checkpoint may have none; then no request with `kv_usage` comes this far.
        asks = row.routing.get("kv_usage") is not None
        quantiles = [self.learned[f"model.layers.{i}.mixer.score_quantiles"] for i in hybrid if asks]
        rules = Retention.resolve(self.config, quantiles, 1, **row.routing)
        for n, i in enumerate(hybrid):
            name, asked = f"model.layers.{i}.mixer.threshold", rules[i].threshold
            threshold = self.learned[name] if asked is None else asked[0].expand(self.config.num_key_value_heads)
            self.thresholds[row.changes.slot, n] = self.shard.part(name, threshold, self.config)
        self.budgets[row.changes.slot] = rules[hybrid[0]].budget if hybrid else None

    def _rules(self, slots: list[int], budget: int | None) -> list[Retention]:
        """The rule of each layer for the requests at `slots`."""
        device = self.arena.blocks.device
        thresholds = iter(self.thresholds[slots].to(device).unbind(1))
        return [
            Retention(next(thresholds), budget) if mixer.layer_type == "hybrid" else Retention()
            for mixer in self.mixers
        ]

    def _run(self, hidden: torch.Tensor, positions: torch.Tensor, memory: Any, rules: list[Retention]) -> torch.Tensor:
        """`[R, T, D]` through every layer, for tokens at `positions` `[R, T]`."""
        model = self.ham.model
        angles = None if model.rotary_emb is None else model.rotary_emb(hidden, positions)
        for layer, rule in zip(model.layers, rules, strict=True):
            hidden = layer(
                hidden,
                position_embeddings=angles,
                tokens=TokenLayout(positions),
                cache=memory,
                retention=rule,
            )
        return model.norm(hidden)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[n, vocabulary]` float32 of hidden states `[n, D]`."""
        return self.ham.lm_head(hidden_states).float()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copies a checkpoint's tensors; returns the names of the parameters that they filled.

        Raises:
            ValueError: for a tensor that the model does not have.
        """
        own = dict(self.ham.named_parameters()) | dict(self.ham.named_buffers())
        loaded = set()
        with torch.no_grad():
            for name, weight in weights:
                if name not in own:
                    raise ValueError(f"The checkpoint holds {name!r}, which a model of its configuration has not.")
                if name.endswith(LEARNED):
                    self.learned[name] = weight.to("cpu", torch.float32, copy=True)
                own[name].copy_(self.shard.part(name, weight, self.config))
                loaded.add(f"ham.{name}")
        self.ham.tie_weights()
        self.ham.requires_grad_(False)
        if self.ham.config.tie_word_embeddings:
            loaded.add("ham.lm_head.weight")
        return loaded
