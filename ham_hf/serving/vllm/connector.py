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
from vllm.v1.request import Request

from .arena import ARENA
from .manager import Expectation, HAMManager, Report, Row
from .metrics import HAMPromMetrics, HAMStats
from .requests import expected_usage, routing_of
from .settings import routing_defaults


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler tells the workers before a step: the requests that take part."""

    rows: list[Row]


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """What a worker tells the scheduler after a step, by request and epoch."""

    kept: dict[tuple[str, int], Report] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Reports":
        """The largest numbers of all workers, which hold different heads and take the same blocks."""
        if not isinstance(other, Reports):
            raise TypeError(f"`other` must be Reports, got {type(other).__name__}.")
        both = {
            key: Report(*map(max, self.kept[key], other.kept[key])) for key in self.kept.keys() & other.kept.keys()
        }
        return Reports(self.kept | other.kept | both)


class HAMConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in the scheduler's process, one in each worker's; transfers nothing from elsewhere."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self.config = vllm_config.model_config.hf_config
        self.defaults = routing_defaults(vllm_config)
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
        self.manager.expect(request.request_id, Expectation(usage, routing.get("kv_budget")))

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """No token is known from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Does nothing: `build_connector_meta` tells of the blocks."""

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """The requests of the step; each change of a request's blocks is told once."""
        seen = dict.fromkeys((new.req_id for new in scheduler_output.scheduled_new_reqs), 0)
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
            for (request_id, epoch), report in reports.kept.items():
                self.manager.report(request_id, epoch, report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Counts what the request held; its blocks may be freed at once."""
        life = self.manager.lives.get(request.request_id)
        if life is not None and life.report is not None:
            blocks = len(self.manager.req_to_blocks[request.request_id])
            self.stats.add(life.report, blocks * self.manager.kv_cache_spec.page_size_bytes)
        self.routing.pop(request.request_id, None)
        self.manager.forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`: there is one group of layers."""
        return self.request_finished(request, block_ids[0])

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
