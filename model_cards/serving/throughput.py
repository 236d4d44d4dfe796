# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures tokens per second of CPU at several numbers of clients: `ham-hf serve` beside other servers.

Usage, in the environment of ``make test-vllm`` with accelerate, which `transformers serve` needs:

    .venv-vllm/bin/python -m model_cards.serving.throughput

starts all servers on loopback and asks them in turn, so that what else the machine does falls on all; it writes
throughput.jsonl, a row for each server, number of clients and round. `model_cards.serving.report` writes serving.md.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from ham_hf import HAMForCausalLM
from ham_hf.files import append_row, write_whole
from ham_hf.serving.server import SERVER

from ..rows import Row, current_commit
from .arms import HAM, prompts, save_llama

RESULTS = Path(__file__).parent / "throughput.jsonl"
CLIENTS, ROUNDS = (1, 4, 8, 16), 3
PROMPT, ANSWER = 256, 48
# So that one client is measured over more than a moment.
FEWEST_REQUESTS = 4
KV_USAGE = 0.25
MEMORY = "0.25"  # GiB
VLLM_FLAGS = ["--dtype", "float32", "--max-model-len", "1024", "--no-enable-prefix-caching", "--enforce-eager"]
# vLLM's worker in the process of its engine: they wait for each other by spinning, which costs the CPU time of both.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Arm:
    """A server and how it is asked for `ANSWER` tokens."""

    name: str
    command: list[str]
    model: str
    request: dict[str, Any]


def arms(folder: Path) -> list[Arm]:
    """The servers; the models are written to `folder`, in float32."""
    ham, llama = str(folder / "ham"), str(save_llama(folder / "llama"))
    HAMForCausalLM.from_pretrained(HAM, dtype=torch.float32).save_pretrained(ham)
    AutoTokenizer.from_pretrained(HAM).save_pretrained(ham)
    python = [sys.executable, "-m"]
    pool = str(round(float(MEMORY) * 2**30))
    greedy = {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    generation = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "kv_usage": KV_USAGE}
    return [
        Arm(
            "ham-hf serve",
            [*python, "ham_hf.cli", "serve", ham, "--memory", MEMORY, "--port", "PORT", "--", *VLLM_FLAGS],
            ham,
            {**greedy, "vllm_xargs": {"kv_usage": KV_USAGE}},
        ),
        Arm(
            "transformers serve",
            [*python, "ham_hf.cli", "run", "transformers", "serve", ham, "--device", "cpu", "--port", "PORT"],
            ham,
            {"generation_config": json.dumps(generation)},
        ),
        Arm(
            "vLLM, Llama",
            [*python, SERVER, "--model", llama, "--kv-cache-memory-bytes", pool, "--port", "PORT", *VLLM_FLAGS],
            llama,
            greedy,
        ),
    ]


@contextlib.contextmanager
def running(arm: Arm, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address and the process of a server that answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [port if part == "PORT" else part for part in arm.command]
    environment = os.environ | ENVIRONMENT
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server:
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1/completions", psutil.Process(server.pid)
        finally:
            server.terminate()


def wait_until_healthy(server: subprocess.Popen, address: str, log: Path) -> None:
    """Returns when the server answers; raises `RuntimeError` with its log if it ended."""
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"{' '.join(server.args)} ended:\n{log.read_text()[-4000:]}")  # type: ignore[arg-type]
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except OSError:
            time.sleep(0.2)


def ask(address: str, arm: Arm, prompt: str) -> int:
    """Has a server go on with a prompt; returns the tokens that it says it made."""
    body = json.dumps({"model": arm.model, "prompt": prompt, **arm.request}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())["usage"]["completion_tokens"]


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time of a server and its processes so far."""
    times = [x.cpu_times() for x in (server, *server.children(recursive=True))]
    return sum(x.user + x.system for x in times)


def measure(arm: Arm, address: str, server: psutil.Process, clients: int, texts: list[str]) -> Row:
    """Has `clients` ask at once, until each text was asked."""
    cpu, begin = cpu_seconds(server), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(lambda text: ask(address, arm, text), texts))
    seconds, cpu = time.monotonic() - begin, cpu_seconds(server) - cpu
    if tokens != ANSWER * len(texts):
        raise RuntimeError(f"{arm.name} must make {ANSWER} tokens for each of {len(texts)} requests, made {tokens}.")
    return {"arm": arm.name, "clients": clients, "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}


def main() -> None:
    """Measures every server at every number of clients, in turn, `ROUNDS` times."""
    tokenizer = AutoTokenizer.from_pretrained(HAM)
    texts = [str(tokenizer.decode(x)) for x in prompts(max(*CLIENTS, FEWEST_REQUESTS), PROMPT)]
    write_whole(RESULTS, "")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, servers = Path(name), []
        for i, arm in enumerate(arms(folder)):
            servers.append((arm, *stack.enter_context(running(arm, folder / f"{i}.log"))))
            measure(*servers[-1], max(CLIENTS), texts)  # what a server does once, it has done then
        for round_number in range(ROUNDS):
            for clients in CLIENTS:
                for arm, address, server in servers:
                    row = measure(arm, address, server, clients, texts[: max(clients, FEWEST_REQUESTS)])
                    row |= {"round": round_number, "prompt": PROMPT, "answer": ANSWER, "kv_usage": KV_USAGE}
                    append_row(RESULTS, row | {"commit": current_commit()})
                    print(row, flush=True)


if __name__ == "__main__":
    main()
