# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Thousands of short requests of every kind, in a pool too small for them: no block is lost, and memory stays flat."""

import gc
import random

import pytest

from tests.serving.vllm.engine import generated, prompt, small_model

REQUESTS = 3000
# Requests whose answers are compared with those of `generate`.
COMPARED = 40
# Growth of the process between the first third and the end: allocators and tables of vLLM take some.
MOST_GROWTH = 24 * 2**20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def draw(rng):
    """A random prompt, length of the answer and routing arguments."""
    routing = rng.choice([{}, {"threshold": rng.uniform(-0.1, 1.1)}, {"kv_usage": rng.random()}])
    if rng.random() < 0.3:
        routing = routing | {"kv_budget": rng.randint(8, 60)}
    length = rng.choice([1, 2, 9, 16, 31, 60])
    return prompt(length, rng.randrange(1000)), rng.randint(1, 24), routing


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_block_is_lost_and_memory_stays_flat(engines):
    rng, model = random.Random(0), small_model(num_key_value_heads=4, attention_window=4, attention_sinks=1)
    engine = engines(model, max_model_len=96, num_gpu_blocks_override=18, max_num_seqs=12, max_num_batched_tokens=48)
    preempted = []
    preempt = engine.scheduler._preempt_request

    def noted(request, *args, **kwargs):
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    engine.scheduler._preempt_request = noted
    waiting, answers, begun, first = {}, {}, 0, 0
    while begun < REQUESTS or waiting:
        while begun < REQUESTS and len(waiting) < 16:
            name = f"request {begun}"
            tokens, length, routing = waiting[name] = draw(rng)
            engine.add(name, tokens, length, **routing)
            begun += 1
        for output in engine.llm.llm_engine.step():
            if output.finished:
                asked = waiting.pop(output.request_id)
                if len(answers) < COMPARED or output.request_id in preempted[:COMPARED]:
                    answers[output.request_id] = (asked, list(output.outputs[0].token_ids))
        if waiting and rng.random() < 0.05:
            name = rng.choice(sorted(waiting))
            engine.llm.llm_engine.abort_request([name])
            del waiting[name]
        if not first and begun > REQUESTS // 3:
            gc.collect()
            first = resident_bytes()
    gc.collect()
    growth = resident_bytes() - first
    assert engine.lost_blocks == 0
    assert not engine.manager.lives
    assert not engine.manager.req_to_blocks
    assert not engine.manager.expectations
    assert not engine.scheduler.connector.routing
    assert preempted
    assert growth < MOST_GROWTH, f"{growth / 2**20:.1f} MiB more"
    for (tokens, length, routing), answer in answers.values():
        assert answer == generated(model, tokens, length, **routing)
