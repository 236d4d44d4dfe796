# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Servers of `ham-hf serve` in processes of their own, and requests to them."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
# vLLM would serve float32 as bfloat16. Small steps, so that a prompt takes several.
VLLM_FLAGS = ["--dtype", "float32", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]


@dataclass
class Server:
    """A server that answers, the checkpoint that it serves, and the file with what it says."""

    process: subprocess.Popen
    address: str
    model: str
    log: Path

    def post(self, path: str, **body):
        """The answer to a request, or of its refusal the status and the message."""
        with contextlib.closing(self.open(path, **body)) as reply:
            content = json.loads(reply.read())
        return content if reply.status == 200 else (reply.status, content["error"]["message"])

    def open(self, path: str, **body):
        """The open reply to a request, whatever its status."""
        content = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(f"{self.address}{path}", content, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            return error

    def metrics(self) -> dict[str, float]:
        """The numbers of the server's metrics, summed over labels."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        sums: dict[str, float] = {}
        for line in lines:
            if match := re.fullmatch(r"([\w:]+)(?:\{.*\})? (\S+)", line):
                sums[match[1]] = sums.get(match[1], 0.0) + float(match[2])
        return sums


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(model: Path, log: Path, *options: str):
    """A `Server` of `ham-hf serve` with further `options`, which ends with the block."""
    port = str(free_port())
    command = [sys.executable, "-m", "ham_hf.cli", "serve", str(model), "--port", port, *options, "--", *VLLM_FLAGS]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT)
    server = Server(process, f"http://127.0.0.1:{port}", str(model), log)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(server: Server, seconds: int = 300) -> None:
    """Returns when the server answers."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=10).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer in {seconds} s:\n{server.log.read_text()[-4000:]}")
