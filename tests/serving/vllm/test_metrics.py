# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What requests held, from the worker's report to vLLM's log and to the metrics of its server."""

import pytest
from prometheus_client import REGISTRY

from ham_hf.serving.vllm.manager import Report
from ham_hf.serving.vllm.metrics import HAMStats
from tests.serving.vllm.engine import prompt, small_model


def test_statistics_of_ended_requests_add_up_and_those_of_running_ones_replace_each_other():
    first, second = HAMStats(), HAMStats()
    assert first.is_empty()
    first.add(Report(100, 8, 0, 120), 4096)
    first.data["running_tokens_seen"] = 50
    second.add(Report(300, 8, 0, 240), 8192)
    second.data["running_tokens_seen"] = 70
    both = HAMStats(data=first.to_dict()).aggregate(second)
    assert both.reduce() == {
        "requests_ended": 2,
        "mean_tokens_seen": 200,
        "mean_token_slots_held": 180,
        "mean_bytes_held": 6144,
        "running_tokens_seen": 70,
        "running_token_slots_held": 0,
        "running_bytes_held": 0,
    }
    assert not both.is_empty()


def test_the_server_shows_what_requests_held(engines):
    model = small_model(attention_window=6)
    engine = engines(model, disable_log_stats=False)
    engine.add("long", prompt(90), 30, threshold=0.0)
    engine.add("short", prompt(40), 5, threshold=2.0)
    samples = {}
    for _ in range(20):
        engine.step()
        samples |= {sample.name: sample.value for metric in REGISTRY.collect() for sample in metric.samples}
    assert samples["ham:tokens_seen_count"] == 1
    # The report of a request's last token comes when it has ended.
    assert samples["ham:tokens_seen_sum"] == 40 + 4 - 1
    # Two layers of two heads: nothing but the window, of which the current token is one.
    assert samples["ham:token_slots_held_sum"] == 2 * 2 * 5
    (running,) = engine.manager.lives.values()
    assert running.report.held == 2 * 2 * running.report.tokens
    # One block for the state, and one for the worst case of the next token.
    assert samples["ham:bytes_held_sum"] == 2 * engine.manager.kv_cache_spec.page_size_bytes
    assert samples["ham:running_tokens_seen"] == pytest.approx(running.report.tokens, abs=2)
