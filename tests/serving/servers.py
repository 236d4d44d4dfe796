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

# Without what the tests of the engine set for their own process.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
STORY = (
    "The captain looked at the sea, and the sea looked at him. He had sailed for forty years, and in all of them he"
)
NEW_TOKENS = 12
# vLLM would serve float32 in 16 bits. Small steps, so that a prompt takes several.
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

    def complete(self, text: str, **arguments):
        """The likeliest `NEW_TOKENS` after a text, at these routing arguments; or status and message of a refusal."""
        body = {"prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0}
        reply = self.post("/v1/completions", **body, **({"vllm_xargs": arguments} if arguments else {}))
        return reply if isinstance(reply, tuple) else reply["choices"][0]["text"]

    def open(self, path: str, **body):
        """The open reply to a request, whatever its status."""
        content = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(f"{self.address}{path}", content, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            return error

    def healthy(self) -> bool:
        """True if the server answers; fails if it has ended."""
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{self.address}/health", timeout=10).close()
        except OSError:
            return False
        return True

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
def serving(model: Path, log: Path, *options: str, flags: tuple[str, ...] = (), port: int | None = None):
    """A `Server` of `ham-hf serve` with these options and further flags of vLLM, which ends with the block."""
    number = str(port or free_port())
    command = [sys.executable, "-m", "ham_hf.cli", "serve", str(model), "--port", number, *options, "--", *VLLM_FLAGS]
    with log.open("a") as output:
        process = subprocess.Popen([*command, *flags], stdout=output, stderr=output, env=ENVIRONMENT)
    server = Server(process, f"http://127.0.0.1:{number}", str(model), log)
    try:
        wait_for(server.healthy, 300)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def wait_for(condition, seconds: int = 30) -> None:
    """Returns when the condition is true; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not true in {seconds} s"
        time.sleep(0.05)
