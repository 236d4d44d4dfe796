# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Counts the requests that run at once in a pool of given bytes: a HAM at several usages, and a Llama of its shape.

Usage, in the environment of ``make test-vllm``:

    .venv-vllm/bin/python -m model_cards.serving.capacity

writes capacity.jsonl, a row for each arm; `model_cards.serving.report` writes serving.md. More requests are
queued than the pool can hold; what counts is how many run while others wait.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ham_hf.files import append_row, write_whole

from ..benchmarks.bench import in_fresh_process
from ..rows import Row, current_commit
from .arms import HAM, prompts, save_llama

RESULTS = Path(__file__).parent / "capacity.jsonl"
USAGES = (0.1, 0.25, 0.5, 1.0)
POOL = 24 * 2**20
PROMPT, ANSWER, REQUESTS = 1024, 256, 96
# Tokens of a step, over all requests.
CHUNK = 256
# The engine runs in this process, so that its scheduler can be asked.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine_of(model: Path) -> Any:
    """An engine of vLLM with a pool of `POOL` bytes."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=PROMPT + ANSWER,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=REQUESTS,
        kv_cache_memory_bytes=POOL,
        enable_prefix_caching=False,
    )
    return llm.llm_engine


def measure(model: Path, kv_usage: float | None) -> Row:
    """Runs `REQUESTS` requests, all queued at the start.

    The row counts the steps from the end of the first answer, by when the pool is full, to the last one in which a
    request waits.

    Args:
        model: folder of a checkpoint.
        kv_usage: what its routers are asked for; `None` for a model without them.
    """
    engine = engine_of(model)
    from vllm import SamplingParams

    arguments = None if kv_usage is None else {"kv_usage": kv_usage}
    sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=0, extra_args=arguments)
    for i, prompt in enumerate(prompts(REQUESTS, PROMPT)):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    scheduler = engine.engine_core.engine_core.scheduler
    running, held, ended = [], [], 0
    preemptions: dict[str, int] = {}
    while engine.has_unfinished_requests():
        ended += sum(output.finished for output in engine.step())
        preemptions |= {name: request.num_preemptions for name, request in scheduler.requests.items()}
        if ended and scheduler.waiting:
            running.append(len(scheduler.running))
            held += [] if kv_usage is None else [held_share(scheduler)]
    return {
        "running": statistics.mean(running),
        "most": max(running),
        "steps": len(running),
        "preemptions": sum(preemptions.values()),
        "held": statistics.mean(held) if held else 1.0,
        "reserved": reserved(scheduler),
    }


def memory_manager(scheduler: Any) -> Any:
    """The manager of the one kind of memory that both models have."""
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    return manager


def held_share(scheduler: Any) -> float:
    """Tokens held by the running requests of a HAM, over those seen, in all layers and heads."""
    manager = memory_manager(scheduler)
    spec, reports = manager.kv_cache_spec, [x.report for x in manager.lives.values() if x.report is not None]
    seen = sum(x.tokens for x in reports) * (spec.hybrid_streams + spec.full_streams)
    return sum(x.held for x in reports) / seen


def reserved(scheduler: Any) -> int:
    """Requests that fit if each reserves a full cache for prompt and answer when it starts."""
    manager, tokens = memory_manager(scheduler), PROMPT + ANSWER
    spec = manager.kv_cache_spec
    blocks = spec.blocks(spec.pages(tokens, tokens)) if hasattr(spec, "pages") else -(-tokens // spec.block_size)
    return (scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1) // blocks


def main() -> None:
    """Measures every arm, each in a process of its own."""
    write_whole(RESULTS, "")
    with tempfile.TemporaryDirectory() as folder:
        llama = save_llama(Path(folder))
        for model, usage in [(llama, None), *((HAM, usage) for usage in USAGES)]:
            row = {"arm": "llama" if usage is None else "ham", "kv_usage": usage, "pool": POOL}
            row |= {"prompt": PROMPT, "answer": ANSWER, "requests": REQUESTS, "chunk": CHUNK}
            row |= in_fresh_process(measure, model, usage) | {"commit": current_commit()}
            append_row(RESULTS, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
