# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf serve` over HTTP: clients get what `generate` gives, bad values are refused, who leaves frees memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.servers import NEW_TOKENS, STORY, serving, wait_for

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    with serving(served, log, "--memory", "0.05", "--max-model-len", "1024") as server:
        yield server


def test_completions_and_the_default_of_the_checkpoint(server, generated):
    expected = [generated(STORY, threshold=x) for x in (0.4, 2.0)]
    assert expected[0] != expected[1]
    assert server.complete(STORY, threshold=0.4) == expected[0]
    assert server.complete(STORY) == expected[1]
    assert server.complete(STORY, kv_usage=0.5) == generated(STORY, kv_usage=0.5)
    assert server.complete(STORY, threshold=0, kv_budget=9) == generated(STORY, threshold=0, kv_budget=9)


def test_chat(server, generated):
    body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": NEW_TOKENS, "temperature": 0}
    reply = server.post("/v1/chat/completions", **body, vllm_xargs={"threshold": 0.4})
    assert reply["choices"][0]["message"]["content"] == generated(STORY, threshold=0.4)


def test_clients_at_once_each_get_what_they_get_alone(server, generated):
    words = STORY.split()
    asked = [(" ".join(words[i:] * (1 + i % 3)), i / 8) for i in range(9)]
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda x: server.complete(x[0], threshold=x[1]), asked))
    assert replies == [generated(text, threshold=threshold) for text, threshold in asked]
    assert len(set(replies)) > 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"threshold": "much"}, ["`threshold`", "'much'"]),
        ({"threshold": [0.1, 0.2]}, ["`threshold`", "6"]),
        ({"threshold": float("nan")}, ["`threshold`", "NaN"]),
        ({"threshold": 0.4, "kv_usage": 0.5}, ["`threshold`", "`kv_usage`"]),
        ({"kv_usage": 1.5}, ["`kv_usage`", "1.5"]),
        ({"kv_budget": 0}, ["`kv_budget`", "0"]),
        ({"treshold": 0.4}, ["'treshold'", "`threshold`"]),
    ],
)
def test_bad_values_are_answered_with_400_and_say_what_is_taken(server, arguments, expected):
    status, message = server.complete(STORY, **arguments)
    assert status == 400, message
    assert all(part in message for part in expected), message


def test_metrics_tell_what_requests_held(server):
    before = server.metrics()
    server.complete(STORY, threshold=0)
    after = server.metrics()
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["ham:tokens_seen_count"] == 1
    seen, held = gained["ham:tokens_seen_sum"], gained["ham:token_slots_held_sum"]
    # 6 layers of 2 heads; the last token of an answer is not read again.
    assert seen > NEW_TOKENS
    assert held == 12 * seen
    assert gained["ham:bytes_held_sum"] >= held * 2 * 32 * 4


def test_a_client_that_leaves_frees_its_memory(server):
    body = {"prompt": STORY, "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
    before = server.metrics()["vllm:generation_tokens_total"]
    reply = server.open("/v1/completions", **body, vllm_xargs={"threshold": 0})
    reply.readline()
    wait_for(lambda: server.metrics()["vllm:kv_cache_usage_perc"] > 0)
    assert server.metrics()["vllm:num_requests_running"] == 1
    reply.close()
    wait_for(lambda: server.metrics()["vllm:num_requests_running"] == 0)
    # The gauges are those of the last step, so a short request brings them up to date.
    server.complete("The sea", threshold=2)
    wait_for(lambda: server.metrics()["vllm:kv_cache_usage_perc"] == 0)
    assert server.metrics()["vllm:generation_tokens_total"] < before + 900
