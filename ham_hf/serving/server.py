# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""vLLM's OpenAI server for a HAM: whether it can be started here, and by which command."""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence

# vLLM's own command looks for a distribution named "vllm", which a CPU's is not; its module does not.
SERVER = "vllm.entrypoints.launchers.api_server.entry"
GIB = 2**30


def vllm_is_installed() -> bool:
    """True if vLLM can be imported; imports nothing."""
    return importlib.util.find_spec("vllm") is not None


def server_command(
    model: str,
    *,
    host: str,
    port: int,
    max_model_len: int | None = None,
    memory: float | None = None,
    kv_budget: int | None = None,
    conversations: bool = False,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    further: Sequence[str] = (),
) -> list[str]:
    """The command that starts vLLM's server.

    Args:
        model: folder of a checkpoint, or its name on the Hub.
        host: address to listen on.
        port: port to listen on.
        max_model_len: most tokens of a request, prompt and answer; `None`: what the checkpoint allows.
        memory: GiB for the memories of all requests in each process; `None`: what vLLM finds free.
        kv_budget: most tokens that a head holds, unless a request says another; `None`: the checkpoint's default.
        conversations: has a conversation's next turn go on with the memory of the last.
        tensor_parallel_size: processes that share the layers of one copy of the model.
        data_parallel_size: copies of the model.
        further: more of vLLM's flags, which win over those above.
    """
    flags: dict[str, object] = {"model": model, "host": host, "port": port}
    if max_model_len is not None:
        flags["max-model-len"] = max_model_len
    if memory is not None:
        flags["kv-cache-memory-bytes"] = round(memory * GIB)
    own: dict[str, object] = {"kv_budget": kv_budget} if kv_budget is not None else {}
    if conversations:
        own |= {"conversations": True}
    if own:
        flags["additional-config"] = json.dumps({"ham": own})
    flags |= {"tensor-parallel-size": tensor_parallel_size, "data-parallel-size": data_parallel_size}
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", SERVER, *parts, *further]


def server_environment() -> dict[str, str]:
    """The environment of the server: this process's, which wins over two defaults.

    vLLM reports no usage, and takes its first model runner: where it finds Triton it would take the second, which
    cannot serve a HAM.
    """
    return {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", **os.environ}
