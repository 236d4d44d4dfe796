# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What requests held, in vLLM's log and in the metrics of its server: tokens seen, tokens held, and bytes."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from .manager import HAMManager, Report

# One entry for each request that has ended.
ENDED = ("tokens_seen", "token_slots_held", "bytes_held")
# Sums over the running requests.
RUNNING = tuple(f"running_{name}" for name in ENDED)
MEANINGS = {
    "tokens_seen": "tokens of prompt and answer",
    "token_slots_held": "tokens in memory, summed over layers and key/value heads",
    "bytes_held": "blocks of a request, with its state and what is reserved for its next token",
}


@dataclass
class HAMStats(KVConnectorStats):
    """`data` holds a list for each of `ENDED`, and a number for each of `RUNNING`."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Forgets every request."""
        self.data = {name: [] for name in ENDED} | dict.fromkeys(RUNNING, 0)

    def add(self, report: Report, held_bytes: int) -> None:
        """Counts a request that has ended, by its last report."""
        for name, value in zip(ENDED, (report.tokens, report.held, held_bytes), strict=True):
            self.data[name].append(value)

    def note_running(self, manager: HAMManager) -> None:
        """Sums over the requests that have memory now."""
        reports = [life.report for life in manager.lives.values() if life.report is not None]
        blocks = sum(len(manager.req_to_blocks[request_id]) for request_id in manager.lives)
        sums = (sum(x.tokens for x in reports), sum(x.held for x in reports))
        self.data |= dict(zip(RUNNING, (*sums, blocks * manager.kv_cache_spec.page_size_bytes), strict=True))

    def aggregate(self, other: KVConnectorStats) -> "HAMStats":
        """Adds a later statistic to this one."""
        for name in ENDED:
            self.data[name].extend(other.data[name])
        self.data |= {name: other.data[name] for name in RUNNING}
        return self

    def reduce(self) -> dict[str, int | float]:
        """Means over the requests that have ended, and the sums over the running ones, for a line of the log."""
        ended = len(self.data[ENDED[0]])
        means = {f"mean_{name}": round(sum(self.data[name]) / ended) for name in ENDED} if ended else {}
        return {"requests_ended": ended, **means, **{name: self.data[name] for name in RUNNING}}

    def is_empty(self) -> bool:
        """True if no request has ended, and none runs."""
        return not any(self.data.values())


class HAMPromMetrics(KVConnectorPromMetrics):
    """A histogram over ended requests and a gauge over running ones for each of `ENDED`."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.ended = {name: self._metric(self._histogram_cls, name, "ended", _buckets(name)) for name in ENDED}
        self.running = {name: self._metric(self._gauge_cls, f"running_{name}", "running") for name in ENDED}

    def _metric(self, kind: Any, name: str, requests: str, buckets: list[int] | None = None) -> dict[int, Any]:
        meaning = MEANINGS[name.removeprefix("running_")]
        text = f"HAM, requests that have {requests}: {meaning}." if buckets else f"HAM, running requests: {meaning}."
        more: dict[str, Any] = {"buckets": buckets} if buckets else {"multiprocess_mode": "mostrecent"}
        metric = kind(name=f"ham:{name}", documentation=text, labelnames=self._labelnames, **more)
        return create_metric_per_engine(metric, self.per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes in the `data` of a `HAMStats`."""
        for name in ENDED:
            for value in transfer_stats_data[name]:
                self.ended[name][engine_idx].observe(value)
            self.running[name][engine_idx].set(transfer_stats_data[f"running_{name}"])


def _buckets(name: str) -> list[int]:
    first, last = (16, 44) if name == "bytes_held" else (4, 30)
    return [2**i for i in range(first, last, 2)]
