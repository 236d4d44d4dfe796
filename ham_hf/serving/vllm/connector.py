# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""HAMConnector, the two ends of what scheduler and workers tell each other about the memory of requests.

vLLM has this channel for the transfer of KV caches. Here the scheduler tells a worker which blocks and which routing
arguments the requests of a step have, and the worker tells the scheduler how much they kept.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.request import Request, RequestStatus

from .arena import ARENA
from .conversations import group_of
from .manager import Expectation, HAMManager, Report, Row
from .metrics import HAMPromMetrics, HAMStats
from .requests import expected_usage, routing_of
from .settings import keeps_conversations, routing_defaults

# How a request ends whose answer is whole.
ANSWERED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler tells the workers before a step: the requests that take part."""

    rows: list[Row]


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """What a worker tells the scheduler after a step, by the epoch of each request."""

    kept: dict[int, Report] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Reports":
        """Of workers that hold different heads in blocks of the same numbers: the largest numbers, and all tokens."""
        if not isinstance(other, Reports):
            raise TypeError(f"`other` must be Reports, got {type(other).__name__}.")
        both = {}
        for epoch in self.kept.keys() & other.kept.keys():
            ours, theirs = self.kept[epoch], other.kept[epoch]
            both[epoch] = Report(*map(max, ours, theirs))._replace(held=ours.held + theirs.held)
        return Reports(self.kept | other.kept | both)


class HAMConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in the scheduler's process, one in each worker's; transfers nothing from elsewhere."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = vllm_config.model_config.hf_config
        self.defaults = routing_defaults(vllm_config)
        self.keeps_conversations = keeps_conversations(vllm_config)
        self.routing: dict[str, dict[str, Any]] = {}
        self.stats = HAMStats()

    # In a worker:

    @property
    def _arena(self) -> Any:
        return self._vllm_config.compilation_config.static_forward_context[ARENA]

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Has the arena take in a `Step`."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, Step):
            self._arena.begin(connector_metadata.rows)

    def build_connector_worker_meta(self) -> Reports | None:
        """What the requests of the step have kept."""
        kept = self._arena.take_reports()
        return Reports(kept) if kept else None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Waits for nothing."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves nothing."""

    def wait_for_save(self) -> None:
        """Waits for nothing."""

    # In the scheduler:

    @property
    def manager(self) -> HAMManager:
        """The scheduler's manager of blocks."""
        if self._kv_cache_manager is None:
            raise RuntimeError("The scheduler has not bound its cache manager to the connector.")
        return self._kv_cache_manager.coordinator.single_type_managers[0]

    def on_new_request(self, request: Request) -> None:
        """Notes the routing arguments of a request and what it will keep by them."""
        routing = routing_of(request.sampling_params.extra_args, self.defaults)
        self.routing[request.request_id] = routing
        usage = expected_usage(self.config, routing)
        expectation = Expectation(usage, routing.get("kv_budget"), request.num_prompt_tokens)
        self.manager.expect(request.request_id, expectation)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """The tokens that a conversation has seen, which the request then need not read."""
        if not self._may_go_on(request):
            return 0, False
        return self.manager.find(request.request_id, self._group(request), request.all_token_ids), False

    def _may_go_on(self, request: Request) -> bool:
        # Embeddings in the place of tokens are not among the tokens that a conversation is found by.
        return self.keeps_conversations and request.prompt_embeds is None

    def _group(self, request: Request) -> str:
        return group_of(self.routing[request.request_id], request.cache_salt)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Does nothing: `build_connector_meta` tells of the blocks."""

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """The requests of the step; each change of a request's blocks is told once."""
        seen = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        seen |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        rows = []
        for request_id in scheduler_output.num_scheduled_tokens:
            first = self.manager.req_to_blocks[request_id][0].block_id
            changes = self.manager.changes_of(request_id)
            rows.append(Row(request_id, changes, first, seen[request_id] == 0, self.routing[request_id]))
        return Step(rows)

    def update_connector_output(self, connector_output: Any) -> None:
        """Passes the workers' reports to the manager."""
        reports = connector_output.kv_connector_worker_meta
        if isinstance(reports, Reports):
            for epoch, report in reports.kept.items():
                self.manager.report(epoch, report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Counts what the request held, and keeps its memory if the conversation may go on; else it may be freed."""
        life = self.manager.lives.get(request.request_id)
        if life is not None and life.report is not None:
            self.stats.add(life.report, len(life.blocks) * self.manager.kv_cache_spec.page_size_bytes)
            # A step that was scheduled before the end was known has read the last token, too.
            if self._may_go_on(request) and request.status in ANSWERED and life.promised <= request.num_tokens:
                tokens = request.all_token_ids[: life.promised]
                self.manager.keep(request.request_id, self._group(request), tokens)
        self.routing.pop(request.request_id, None)
        self.manager.forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`: there is one group of layers."""
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """Forgets every conversation."""
        self.manager.drop_conversations()
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """False: nothing leaves this process."""
        return False

    # Metrics:

    def get_kv_connector_stats(self) -> HAMStats | None:
        """What the requests held that have ended since the last call, and what the running ones hold."""
        if self.role is KVConnectorRole.WORKER:
            return None
        stats, self.stats = self.stats, HAMStats()
        stats.note_running(self.manager)
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HAMStats:
        """The statistics in the form in which vLLM carries them between processes."""
        return HAMStats(data=data) if data else HAMStats()

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> HAMPromMetrics:
        """The metrics in which a server shows them."""
        return HAMPromMetrics(*args)
