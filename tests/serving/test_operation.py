# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""How `ham-hf serve` is run: several processes, one that is killed, servers replaced while in use, conversations."""

import contextlib
import os
import signal
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.serving.servers import STORY, free_port, serving, wait_for

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.slow

LONG = {"prompt": STORY, "max_tokens": 400, "temperature": 0, "ignore_eos": True, "vllm_xargs": {"threshold": 0}}
# On SIGTERM a server ends the requests that it has, for this many seconds at most.
DRAIN = ("--shutdown-timeout", "60")


@pytest.mark.parametrize("name", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_killed_process_ends_the_server_for_a_supervisor_to_start_again(served, tmp_path, name):
    port = free_port()
    with serving(served, tmp_path / "log", "--memory", "0.05", port=port) as server, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, "/v1/completions", **LONG)
        wait_for(lambda: server.metrics()["vllm:num_requests_running"] == 1)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (killed,) = [x for x in children if " ".join(x.cmdline()).startswith(name)]
        os.kill(killed.pid, signal.SIGKILL)
        status, _ = reply.result(timeout=60)
        assert status == 500
        server.process.wait(60)  # with status 0, so a supervisor must start it again whatever the status
    with serving(served, tmp_path / "log", "--memory", "0.05", port=port) as again:
        assert again.complete(STORY)


def test_two_copies_share_the_requests(served, generated, tmp_path):
    thresholds = [i / 8 for i in range(8)]
    with (
        serving(served, tmp_path / "log", "--memory", "0.05", "--data-parallel-size", "2") as server,
        ThreadPoolExecutor(8) as pool,
    ):
        replies = list(pool.map(lambda x: server.complete(STORY, threshold=x), thresholds))
        with urllib.request.urlopen(f"{server.address}/metrics", timeout=10) as reply:
            lines = [x for x in reply.read().decode().splitlines() if x.startswith("vllm:request_success_total")]
    assert replies == [generated(STORY, threshold=x) for x in thresholds]
    answered = {engine: sum(float(x.split()[-1]) for x in lines if f'engine="{engine}"' in x) for engine in (0, 1)}
    assert sum(answered.values()) == 8
    assert min(answered.values()) > 0


def test_two_processes_share_a_model(served, generated, tmp_path):
    """Each has one of the two key/value heads of a layer."""
    with serving(served, tmp_path / "log", "--memory", "0.05", "--tensor-parallel-size", "2") as server:
        for routing in ({"threshold": 0.4}, {"kv_usage": 0.5}):
            assert server.complete(STORY, **routing) == generated(STORY, **routing)


def test_the_next_turn_reads_only_what_is_new(served, tmp_path):
    body = {"max_tokens": 8, "temperature": 0, "return_token_ids": True, "vllm_xargs": {"threshold": 0.4}}
    with serving(served, tmp_path / "log", "--memory", "0.05", "--conversations") as server:
        first = server.post("/v1/completions", prompt=STORY, **body)["choices"][0]
        past = [*first["prompt_token_ids"], *first["token_ids"]]
        before = server.metrics()
        second = server.post("/v1/completions", prompt=[*past, *past[:5]], **body)["choices"][0]
        after = server.metrics()
    with serving(served, tmp_path / "log", "--memory", "0.05") as server:
        assert (
            server.post("/v1/completions", prompt=[*past, *past[:5]], **body)["choices"][0]["text"] == second["text"]
        )
    # The last token of an answer was never read.
    assert after["vllm:prompt_tokens_cached_total"] - before["vllm:prompt_tokens_cached_total"] == len(past) - 1


def test_servers_replaced_one_after_the_other_lose_no_request(served, generated, tmp_path):
    """Two servers and a client that goes to the other one when one refuses its request, or answers that it failed."""
    expected, ports = generated(STORY, threshold=0.4), (free_port(), free_port())
    servers, replies, stop = {}, [], threading.Event()

    def ask(i):
        for port in (ports[i % 2], ports[1 - i % 2]):
            with contextlib.suppress(OSError):  # refused or cut off
                reply = servers[port].complete(STORY, threshold=0.4)
                if isinstance(reply, str):
                    return reply
                assert reply[0] in (500, 503), reply  # vLLM fails requests that come while it ends
        return None

    def keep_asking():
        while not stop.wait(0.05):
            replies.append(ask(len(replies)))

    with contextlib.ExitStack() as stack:

        def start(port):
            running = serving(served, tmp_path / str(port), "--memory", "0.05", flags=DRAIN, port=port)
            servers[port] = stack.enter_context(running)

        for port in ports:
            start(port)
        client = stack.enter_context(ThreadPoolExecutor(1)).submit(keep_asking)
        stack.callback(stop.set)
        for port in ports:
            old = servers[port]
            reply = old.open("/v1/completions", **LONG, stream=True)
            reply.readline()
            old.process.terminate()
            assert '"finish_reason":"length"' in reply.read().decode(), "what was begun was ended"
            old.process.wait(60)
            start(port)
        stop.set()
        client.result(timeout=60)
    assert len(replies) > 20
    assert set(replies) == {expected}
