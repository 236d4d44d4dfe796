# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures for `test_parallel.py` what Transformers' own tests of FSDP2 and tensor parallelism ask, as JSON.

``parallel_run.py FILE TOPIC...``, run by torch's launcher: each topic is a function of this file.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.distributed import DistributedConfig
from two_processes import VOCABULARY, difference, make_model, optimizer_of, save_once, weights, whole

from ham_hf import HAMForCausalLM

try:
    from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
except ImportError:  # before Transformers 5.23
    from transformers.distributed.utils import load_optimizer_distributed, save_optimizer_distributed

# Ranks share an even number of tokens: of an odd one, FSDP2 as Transformers 5.24 applies it takes a tied head's old
# weights after the first step, also in a Llama.
EVEN = {"vocab_size": 98}
LLAMA = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "learned thresholds": {"router": "learned_error"},
    "fixed threshold, tied": {"threshold": 0.5, "tie_word_embeddings": True},
}


def batch(seed: int) -> torch.Tensor:
    """Four rows of one length, so that the thresholds of any number of ranks see the mean of their usages."""
    return torch.randint(1, 97, (4, 24), generator=torch.Generator().manual_seed(seed))


def load(path: Path, **arguments: Any) -> HAMForCausalLM:
    return HAMForCausalLM.from_pretrained(path, use_cache=False, **arguments).train()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds: range, alone: bool = False) -> list[float]:
    """A step for each seed, on the rows of this rank, or on all of them if it trains alone; the losses of all rows."""
    losses = []
    for seed in seeds:
        rows = batch(seed) if alone else batch(seed).tensor_split(dist.get_world_size())[dist.get_rank()]
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().float()
        if not alone:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root of the mean square of the differences."""
    return (found - expected).square().mean().sqrt().item()


def largest(one: list[float], two: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(one, two, strict=True))


def resumed(folder: Path) -> dict[str, Any]:
    """Four steps of DDP, and of FSDP2 that stops after two, is saved and goes on in new models."""
    found: dict[str, Any] = {}
    for name, settings in CASES.items():
        path = save_once(make_model(**settings | EVEN), folder / f"source of {name}")
        # DDP waits for every parameter that asks for a gradient.
        alone = DistributedDataParallel(load(path))
        expected = train(alone, optimizer_of(alone), range(4))
        config = {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}
        model = load(path, **config)
        optimizer = optimizer_of(model)
        losses = train(model, optimizer, range(2))
        model.save_pretrained(folder / f"model of {name}")
        save_optimizer_distributed(model, optimizer, str(folder / f"optimizer of {name}"))
        model.save_pretrained(folder / f"shards of {name}", distributed_checkpoint=True)
        dist.barrier()
        again, shards, forgetful = (
            load(folder / f"{kind} of {name}", **config) for kind in ("model", "shards", "model")
        )
        found[name] = {
            "saved": difference(weights(model), weights(again)),
            "shards": difference(weights(model), weights(shards)),
            "groups": sorted(n for n, m in again.named_modules() if isinstance(m, FSDPModule)),
            "tied": again.lm_head.weight is again.model.embed_tokens.weight,
            "sharded": all(isinstance(p.data, DTensor) for p in again.parameters()),
        }
        optimizer = optimizer_of(again)
        load_optimizer_distributed(again, optimizer, str(folder / f"optimizer of {name}"))
        losses += train(again, optimizer, range(2, 4))
        train(forgetful, optimizer_of(forgetful), range(2, 4))
        trained = weights(alone)
        found[name]["losses"] = largest(expected, losses)
        found[name]["weights"] = difference(trained, weights(again))
        found[name]["weights without the optimizer's state"] = difference(trained, weights(forgetful))
    return found


def in_bfloat16(folder: Path) -> dict[str, Any]:
    """Steps of FSDP2 with weights in bfloat16, among which some stay float32."""
    found: dict[str, Any] = {}
    for name, settings in CASES.items():
        path = save_once(make_model(**settings | EVEN), folder / f"source of {name}")
        config = DistributedConfig(fsdp_size=dist.get_world_size())
        try:
            model = load(path, dtype=torch.bfloat16, distributed_config=config)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            continue
        before = weights(model)
        losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(3))
        after = weights(model)
        found[name] = {
            "losses": losses,
            "finite": all(bool(x.isfinite().all()) for x in after.values()),
            "still": sorted({n.rpartition(".")[2] for n, x in after.items() if torch.equal(x, before[n])}),
            "float32": sorted({n.rpartition(".")[2] for n, x in after.items() if x.dtype == torch.float32}),
        }
    return found


def replicated(folder: Path) -> dict[str, Any]:
    """HSDP: pairs of ranks share a model, and train as one process does with all rows."""
    found: dict[str, Any] = {}
    for name, settings in CASES.items():
        path = save_once(make_model(**settings | EVEN), folder / f"source of {name}")
        alone = load(path)
        expected = train(alone, optimizer_of(alone), range(3), alone=True)
        config = DistributedConfig(dp_replicate_size=2, fsdp_size=dist.get_world_size() // 2)
        model = load(path, distributed_config=config)
        losses = train(model, optimizer_of(model), range(3))
        found[name] = {"losses": largest(expected, losses), "mesh": list(next(model.parameters()).device_mesh.shape)}
        model.save_pretrained(folder / f"model of {name}")
        dist.barrier()
        found[name]["weights"] = difference(weights(alone), weights(load(folder / f"model of {name}")))
    return found


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """The logits of a prompt and of what is generated, with an odd vocabulary where Transformers shares one."""
    found: dict[str, Any] = {}
    prompt = batch(7)[:2]
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    for name, settings in CASES.items():
        path = save_once(make_model(**VOCABULARY | settings), folder / f"source of {name}")
        alone = load(path).eval()
        config = DistributedConfig(tp_size=dist.get_world_size())
        model = load(path, distributed_config=config).eval()
        llama = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=model.config.tie_word_embeddings))
        llama_path = save_once(llama, folder / f"Llama of {name}")
        native = LlamaForCausalLM.from_pretrained(llama_path, distributed_config=config)
        texts = [each.generate(prompt, **options) for each in (alone, model)]
        steps = [torch.stack([whole(x) for x in text.logits], dim=1) for text in texts]
        exact = load(path, dtype=torch.float64).eval()
        with torch.no_grad():
            logits = [whole(each(prompt).logits) for each in (alone, model)]
            expected = exact(texts[0].sequences).logits
        expected_steps = expected[:, prompt.shape[1] - 1 : -1]
        found[name] = {
            "logits": [error_of(x, expected[:, : prompt.shape[1]]) for x in logits],
            "steps": [error_of(x, expected_steps) for x in steps],
            "text": torch.equal(texts[0].sequences, texts[1].sequences),
            "kept": torch.equal(texts[0].cache.kept_tokens(), texts[1].cache.kept_tokens()),
            "head": isinstance(model.lm_head.weight.data, DTensor),
            "embedding": isinstance(model.model.embed_tokens.weight.data, DTensor),
            "rules": [each.tp_plan.get("model.embed_tokens") for each in (model, native)],
            "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        }
    return found


def quantized(folder: Path) -> dict[str, Any]:
    """Tensor parallelism of weights in float8: how far logits are from those in float32, also in one process."""
    from torchao.quantization import Float8WeightOnlyConfig

    path = save_once(make_model(**VOCABULARY, hidden_size=64, intermediate_size=64), folder / "source")
    config = {"quantization_config": TorchAoConfig(Float8WeightOnlyConfig())}
    alone = load(path, **config).eval()
    model = load(path, **config, distributed_config=DistributedConfig(tp_size=dist.get_world_size())).eval()
    with torch.no_grad():
        expected, one, two = (whole(each(batch(7)).logits) for each in (load(path).eval(), alone, model))
    return {
        "scale": expected.std().item(),
        "one process": error_of(one, expected),
        "two processes": error_of(two, expected),
    }


def main() -> None:
    """Writes what every topic found to the file that the first argument names."""
    torch.set_num_threads(1)
    output, topics = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    found = {topic: globals()[topic](output.parent / topic) for topic in topics}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
