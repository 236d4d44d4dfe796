# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`transformers serve` and `transformers chat` on loopback: a request's threshold, or the checkpoint's, is obeyed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from ham_hf import HAMForCausalLM
from ham_hf.inspection.demo_prompt import DEMO_PROMPT

for package in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(package)

STORY = " ".join(DEMO_PROMPT.split())  # a chat is typed in one line
NEW_TOKENS = 8
# The client looks for updates of itself, and an offline one refuses loopback, too.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}


@pytest.fixture(scope="module")
def served(with_code, tmp_path_factory):
    """A checkpoint whose generation configuration keeps nothing unless it is asked to."""
    folder = tmp_path_factory.mktemp("served") / "ham"
    shutil.copytree(with_code, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threshold": 2.0}))
    return folder


@pytest.fixture(scope="module")
def url(served, tmp_path_factory):
    """The address of a server, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    command = [sys.executable, "-m", "ham_hf.cli", "run", "transformers", "serve", str(served)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}) as server,
    ):
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def generation(threshold):
    return json.dumps({"max_new_tokens": NEW_TOKENS, "do_sample": False, "threshold": threshold})


@pytest.fixture(scope="module")
def expected(served, tokenizer):
    """The checkpoint's text at a threshold of 0 and of 2, by `generate` itself."""
    model = HAMForCausalLM.from_pretrained(served).eval()
    inputs = tokenizer(STORY, return_tensors="pt")
    texts = {}
    for threshold in (0, 2):
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, threshold=threshold)
        texts[threshold] = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
    assert texts[0] != texts[2]
    return texts


def test_chat_completions(url, served, expected):
    messages = [{"role": "user", "content": STORY}]
    address = f"{url}/chat/completions"
    plain = post(address, model=str(served), messages=messages, max_tokens=NEW_TOKENS, temperature=0)
    asked = post(address, model=str(served), messages=messages, generation_config=generation(0))
    assert plain["choices"][0]["message"]["content"] == expected[2]
    assert asked["choices"][0]["message"]["content"] == expected[0]


def test_completions(url, served, expected):
    address = f"{url}/completions"
    plain = post(address, model=str(served), prompt=STORY, max_tokens=NEW_TOKENS, temperature=0)
    asked = post(address, model=str(served), prompt=STORY, generation_config=generation(0))
    assert plain["choices"][0]["text"] == expected[2]
    assert asked["choices"][0]["text"] == expected[0]


def test_responses(url, served, expected):
    asked = post(f"{url}/responses", model=str(served), input=STORY, stream=False, generation_config=generation(0))
    assert asked["output"][0]["content"][0]["text"] == expected[0]


def test_chat_client(url, served, expected, tmp_path):
    """A generation configuration sets the threshold, and `!set` another; flags pass only names that it holds."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"threshold": 0}))
    main = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", main, "chat", str(served), url, "--generation-config", str(settings)]
    command += [f"max_new_tokens={NEW_TOKENS}", "do_sample=False"]
    # "n": the reply is not to go on after its last token.
    typed = [STORY, "n", "!clear", "!set threshold=2", STORY, "n", "!exit", ""]
    environment = ENVIRONMENT | {"COLUMNS": "200", "TERM": "dumb"}
    result = subprocess.run(
        command, input="\n".join(typed), env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    replies = [" ".join(reply.split()) for reply in result.stdout.split(f"<{served}>:")[1:]]
    assert len(replies) == 2
    assert replies[0].startswith(expected[0].strip())
    assert replies[1].startswith(expected[2].strip())
