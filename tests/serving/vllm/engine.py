# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""An engine of vLLM in the test's process, and what `generate` answers to the same requests."""

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.serving.vllm import register

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def small_model(seed: int = 0, **changes: Any) -> HAMForCausalLM:
    """A model whose scores lie on both sides of the thresholds that tests ask for."""
    torch.manual_seed(seed)
    model = HAMForCausalLM(HAMConfig(**(SMALL | changes))).eval()
    for layer in model.model.layers:
        if layer.mixer.layer_type == "hybrid":
            # As calibrated on scores spread between 0.3 and 0.7.
            layer.mixer.score_quantiles.copy_(torch.linspace(0.3, 0.7, 65).expand_as(layer.mixer.score_quantiles))
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist()


def generated(model: HAMForCausalLM, tokens: list[int], length: int, **routing: Any) -> list[int]:
    """The answer of `generate` to one request."""
    ids = torch.tensor([tokens])
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, settings, attention_mask=torch.ones_like(ids), **routing)[0, len(tokens) :].tolist()


class Engine:
    """vLLM's engine with a model.

    Args:
        model: saved to `folder`, or the folder of a checkpoint.
        options: of `vllm.LLM`, before those that suit a small model.
    """

    def __init__(self, model: HAMForCausalLM | Path, folder: Path, **options: Any):
        register()
        from vllm import LLM

        if isinstance(model, HAMForCausalLM):
            model.save_pretrained(folder)
            options = {"skip_tokenizer_init": True} | options
        else:
            folder = model
        defaults = {"dtype": "float32", "max_model_len": 192, "max_num_batched_tokens": 64, "max_num_seqs": 8}
        defaults |= {"num_gpu_blocks_override": 400, "disable_log_stats": True}
        self.llm = LLM(str(folder), **(defaults | options))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]

    def stop(self) -> None:
        """Ends the engine, so that another can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler, self.pool, self.manager
        gc.collect()
        cleanup_dist_env_and_memory()

    @staticmethod
    def parameters(length: int, **routing: Any) -> Any:
        """Sampling parameters of a request for the likeliest tokens."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=routing or None
        )

    def answers(self, requests: list[tuple[list[int], int, dict[str, Any]]]) -> list[list[int]]:
        """The answers to requests (prompt, length of the answer, routing arguments) that run together."""
        prompts: Any = [{"prompt_token_ids": tokens} for tokens, _, _ in requests]
        outputs = self.llm.generate(prompts, [self.parameters(n, **r) for _, n, r in requests], use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def add(self, name: str, tokens: list[int], length: int, **routing: Any) -> None:
        """Queues a request, for `step`."""
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, self.parameters(length, **routing))

    def step(self) -> list[str]:
        """Runs one step; returns the names of the requests that it ended."""
        return [output.request_id for output in self.llm.llm_engine.step() if output.finished]

    @property
    def lost_blocks(self) -> int:
        """Blocks in use; block 0 belongs to none for ever."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
