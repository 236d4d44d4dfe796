# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Two processes that compute what one computes, for `test_scale_out.py`: run by torch's launcher, written as JSON.

Importing takes longer than all that is computed here, so one program answers every test. What one process computes is
computed by each of the two on its own.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from packaging.version import Version
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from ham_hf import HAMConfig, HAMForCausalLM
from ham_hf.configuration_ham import ROUTERS
from ham_hf.training.control import UsageMeter
from model_cards.benchmarks import cost

LENGTHS = (40, 14, 30, 24)
# What keeps some tokens and drops others, where 0.5 does not.
THRESHOLDS = {"l2": 0.55, "residual": 0.35}
# Before Transformers 5.21 tensor parallelism refuses rows of a weight that ranks cannot share evenly.
SHARES_UNEVENLY = Version(transformers.__version__) >= Version("5.21")
VOCABULARY = {} if SHARES_UNEVENLY else {"vocab_size": 98}


def make_model(**settings: Any) -> HAMForCausalLM:
    """A model whose every parameter differs from what it starts as, in training; about half of the tokens are kept."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["hybrid", "linear_attention", "full_attention", "hybrid"],
        "pad_token_id": 0,
        "use_cache": False,
    }
    model = HAMForCausalLM(HAMConfig(**(shape | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias", "threshold")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("threshold"):
                parameter.fill_(THRESHOLDS.get(model.config.router, 0.5))
    return model.train()


def make_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    """Four rows of unequal lengths, whose second halves are learned; two ranks have equally many tokens and labels."""
    ids = torch.randint(1, 97, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, length:], mask[row, length:] = 0, 0
        labels[row, : length // 2], labels[row, length:] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(batch: dict[str, torch.Tensor], which: slice) -> dict[str, torch.Tensor]:
    return {name: value[which] for name, value in batch.items()}


def own_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    half = len(LENGTHS) // dist.get_world_size()
    return rows(batch, slice(dist.get_rank() * half, (dist.get_rank() + 1) * half))


def num_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of which each rank may hold a part, gathered in plain sight.

    `DTensor.full_tensor` waits for a collective of another thread, and once in some twenty launches it crashes over
    gloo (PyTorch 2.13: a double free or a segmentation fault in `wait_tensor`).
    """
    if not isinstance(x, DTensor):
        return x
    (placement,) = x.placements
    if placement.is_replicate():
        return x.to_local()
    parts: list[torch.Tensor] = [torch.empty(0)] * x.device_mesh.size()
    dist.all_gather_object(parts, x.to_local(), group=x.device_mesh.get_group())
    if isinstance(placement, Shard):
        return torch.cat(parts, dim=placement.dim)
    if placement.is_partial("sum"):
        return torch.stack(parts).sum(0)
    raise ValueError(f"A tensor is divided in a way that is not expected here: {placement}.")


def plain(name: str) -> str:
    """The name of a parameter without what wrappers put before and into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {plain(name): whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {plain(name): whole(p.detach()).clone() for name, p in model.named_parameters()}


def difference(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, as a share of its largest element."""
    if expected.keys() != got.keys():
        raise ValueError(f"Only one of the two has {sorted(expected.keys() ^ got.keys())}.")
    scale = {name: x.abs().max().clamp(min=1e-4) for name, x in expected.items()}
    # A router that keeps by a budget has no thresholds that learn.
    return max((((expected[name] - x).abs().max() / scale[name]).item() for name, x in got.items()), default=0.0)


def thresholds_only(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in tensors.items() if name.endswith("threshold")}


def one_process(
    model: HAMForCausalLM, batches: Iterable[dict[str, torch.Tensor]], with_gradients: bool = True
) -> dict[str, Any]:
    """The loss and gradients of whole batches, each in one call."""
    batches = list(batches)
    items = sum(num_labels(batch) for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        part = model(**batch, num_items_in_batch=items).loss
        part.backward()
        loss += part.detach()
    return {"loss": loss.item(), "gradients": gradients(model) if with_gradients else {}}


def two_processes(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    with_gradients: bool = True,
) -> dict[str, Any]:
    """The same of a prepared model, of which each process sees half of the rows; gradients accumulate over batches.

    DDP and FSDP average over processes, so each loss is scaled up, as Transformers' Trainer does it.
    """
    batches = list(batches)
    items = sum(num_labels(batch) for batch in batches)
    loss = torch.zeros(())
    for n, batch in enumerate(batches):
        accelerator.gradient_state._set_sync_gradients(n == len(batches) - 1)
        with accelerator.no_sync(model) if n < len(batches) - 1 else torch.enable_grad():
            part = model(**own_rows(batch), num_items_in_batch=items).loss
            accelerator.backward(part * accelerator.num_processes)
        loss += part.detach().float()
    if not with_gradients:
        return {"loss": loss.item()}
    dist.all_reduce(loss)
    return {"loss": loss.item(), "gradients": gradients(model)}


def compare(expected: dict[str, Any], got: dict[str, Any]) -> dict[str, float]:
    found, wanted = got["gradients"], expected["gradients"]
    return {
        "loss": abs(expected["loss"] - got["loss"]),
        "gradients": difference(wanted, found),
        "thresholds": difference(thresholds_only(wanted), thresholds_only(found)),
    }


def make_accelerator(
    plugin: FullyShardedDataParallelPlugin | None = None, mixed_precision: str | None = None
) -> Accelerator:
    """An accelerator on CPUs; with a plugin, for FSDP, which accelerate itself offers on accelerators only."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if plugin is not None:
        if mixed_precision is not None:
            plugin.set_mixed_precision(mixed_precision)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def fsdp_plugin(**settings: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **settings)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """With an epsilon above the rounding of gradients, which steps of constant size would magnify."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def data_parallel() -> dict[str, Any]:
    """DDP: every router in one call of rows of unequal lengths, then accumulated over two."""
    found: dict[str, Any] = {}
    for router in ROUTERS:
        accelerator = make_accelerator()
        model = make_model(router=router)
        with UsageMeter(model) as meter:
            expected = one_process(model, [make_batch()])
        usage = meter.read()["usage"]
        prepared = accelerator.prepare(make_model(router=router))
        with UsageMeter(accelerator.unwrap_model(prepared)) as meter:
            got = two_processes(accelerator, prepared, [make_batch()])
        measured = meter.read()["usage"]
        found[router] = compare(expected, got) | {"usage": usage.flatten().tolist()}
        found[router]["usage over ranks"] = (usage - measured).abs().max().item()
        alone = one_process(make_model(router=router), [own_rows(make_batch())])
        found[router]["one rank alone"] = compare(expected, alone)["thresholds"]
    batches = [make_batch(1), make_batch(2)]
    accelerator = make_accelerator()
    expected = one_process(make_model(tie_word_embeddings=True), batches)
    prepared = accelerator.prepare(make_model(tie_word_embeddings=True))
    found["accumulated"] = compare(expected, two_processes(accelerator, prepared, batches))
    return found


def sharded(folder: Path) -> dict[str, Any]:
    """FSDP2 through accelerate, in float32."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "tied": ({"tie_word_embeddings": True, "router": "learned_error"}, {}),
        "checkpointed by accelerate": ({"router": "learned"}, {"activation_checkpointing": True}),
        "checkpointed by Transformers": ({"router": "residual"}, {}),
    }
    for name, (settings, plugin) in cases.items():
        accelerator = make_accelerator(fsdp_plugin(**plugin))
        expected = one_process(make_model(**settings), [make_batch(1), make_batch(2)])
        model = make_model(**settings)
        if name == "checkpointed by Transformers":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model, _ = accelerator.prepare(model, optimizer_of(model))
        found[name] = compare(expected, two_processes(accelerator, model, [make_batch(1), make_batch(2)]))
        found[name]["sharded"] = all(isinstance(p.data, DTensor) for p in model.parameters())
    return found


def sharded_steps(folder: Path) -> dict[str, Any]:
    """Several optimizer steps under FSDP2, then saved in both ways and loaded again."""
    alone = make_model(router="learned_error")
    alone_optimizer = optimizer_of(alone)
    accelerator = make_accelerator(fsdp_plugin())
    model = make_model(router="learned_error")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    for step in range(3):
        one_process(alone, [make_batch(step)])
        two_processes(accelerator, model, [make_batch(step)])
        for each in (alone_optimizer, optimizer):
            each.step()
            each.zero_grad()
    trained = weights(model)
    found: dict[str, Any] = {"steps": difference(weights(alone), trained)}

    accelerator.save_state(str(folder / "state"))
    two_processes(accelerator, model, [make_batch(9)])
    optimizer.step()
    found["moved"] = difference(trained, weights(model))
    accelerator.load_state(str(folder / "state"))
    found["loaded"] = all(torch.equal(trained[name], x) for name, x in weights(model).items())

    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "fsdp", state_dict=state)
    dist.barrier()
    ordinary = HAMForCausalLM.from_pretrained(folder / "fsdp")
    found["saved"] = all(torch.equal(trained[name], x) for name, x in weights(ordinary).items())
    return found


def in_bfloat16(mesh: DeviceMesh) -> dict[str, Any]:
    """FSDP2 in bfloat16 through accelerate, against float32 and against one process of the same precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    batches = [make_batch()]
    exact = one_process(make_model(), [make_batch()])
    alone = make_model()
    for module in [*alone.model.layers, alone]:
        fully_shard(module, mesh=mesh["self"], mp_policy=policy)
    expected = one_process(alone, [make_batch()])
    accelerator = make_accelerator(fsdp_plugin(mixed_precision_policy=policy), "bf16")
    model = make_model()
    model, _ = accelerator.prepare(model, optimizer_of(model))
    got = two_processes(accelerator, model, batches)
    return {
        "masters": sorted({str(p.dtype) for p in model.parameters()}),
        "against one process": compare(expected, got),
        "against float32": compare(exact, got),
        "one process against float32": compare(exact, expected),
    }


def sharded_by_transformers(folder: Path) -> dict[str, Any]:
    """FSDP2 through Transformers' own plan, from a checkpoint and back, in float32 and with bfloat16 weights."""
    path = save_once(make_model(router="learned"), folder / "source")
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        alone = HAMForCausalLM.from_pretrained(path, dtype=dtype, use_cache=False).train()
        config = DistributedConfig(fsdp_size=dist.get_world_size())
        model = HAMForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=config, use_cache=False).train()
        expected = one_process(alone, [make_batch()])
        part = model(**own_rows(make_batch()), num_items_in_batch=num_labels(make_batch())).loss
        (part * dist.get_world_size()).backward()
        loss = part.detach().clone()
        dist.all_reduce(loss)
        name = str(dtype).removeprefix("torch.")
        found[name] = compare(expected, {"loss": loss.item(), "gradients": gradients(model)})
        found[name]["float32"] = sorted(
            {n.rpartition(".")[2] for n, p in model.named_parameters() if p.dtype == torch.float32}
        )
        model.save_pretrained(folder / name)
        dist.barrier()
        ordinary = HAMForCausalLM.from_pretrained(folder / name, dtype=dtype)
        found[name]["saved"] = all(torch.equal(x, weights(alone)[n]) for n, x in weights(ordinary).items())
    return found


class Messages(TorchDispatchMode):
    """Adds up the bytes of what collectives put out (reduce-scatters: take in), by their kind."""

    kinds = {"all_?reduce": "all_reduce", "all_?gather": "all_gather", "reduce_?scatter": "reduce_scatter"}

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(self.kinds.values(), 0)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, DTensor) for x in tree_leaves((args, kwargs))):
            return NotImplemented
        out = op(*args, **(kwargs or {}))
        for pattern, kind in self.kinds.items():
            if op.namespace in ("c10d", "_c10d_functional") and re.search(pattern, op._opname):
                tensors = [x.nbytes for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
                self.bytes[kind] += max(tensors)
        return out


def messages(folder: Path) -> dict[str, Any]:
    """Bytes that a step really sends, and those that `model_cards.benchmarks.cost` computes."""
    found: dict[str, Any] = {}
    for tied in (False, True):
        settings = {"layer_types": None, "num_hidden_layers": 3, "tie_word_embeddings": tied}
        head = " tied" if tied else ""
        found[f"DDP{head}"] = data_parallel_messages(make_model(**settings))
        found[f"FSDP2{head}"] = sharded_messages(make_model(**settings))
        path = save_once(make_model(**VOCABULARY | settings), folder / f"messages{head}")
        model = HAMForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2)).train()
        if not shares_embedding(model):
            continue
        expected = cost.tensor_parallel_traffic(model.config, make_batch()["input_ids"].numel(), width=4)
        found[f"TP{head}"] = counted(lambda model=model: one_process(model, [make_batch()], False), expected)
    return found


def data_parallel_messages(model: HAMForCausalLM) -> dict[str, list[float]]:
    sent = torch.zeros((), dtype=torch.int64)

    def count(sent: torch.Tensor, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    accelerator = make_accelerator()
    prepared = accelerator.prepare(model)
    prepared.register_comm_hook(sent, count)
    two_processes(accelerator, prepared, [make_batch()], False)
    return {"all_reduce": [int(sent), cost.data_parallel_traffic(model.config).all_reduce]}


def sharded_messages(model: HAMForCausalLM) -> dict[str, list[float]]:
    accelerator = make_accelerator(fsdp_plugin())
    model, _ = accelerator.prepare(model, optimizer_of(model))
    expected = cost.sharded_traffic(model.config, width=4)
    return counted(lambda: two_processes(accelerator, model, [make_batch()], False), expected)


def counted(step: Callable[[], Any], expected: cost.Traffic) -> dict[str, list[float]]:
    with Messages() as sent:
        step()
    return {kind: [number, getattr(expected, kind)] for kind, number in sent.bytes.items()}


def save_once(model: PreTrainedModel, path: Path) -> Path:
    if dist.get_rank() == 0:
        model.save_pretrained(path)
    dist.barrier()
    return path


def equal_on_all_ranks(model: torch.nn.Module) -> bool:
    """True if each parameter that every rank holds whole has the same gradient everywhere, bit for bit."""
    equal = torch.ones(())
    for parameter in model.parameters():
        if not isinstance(parameter.data, DTensor):
            first = parameter.grad.clone()
            dist.broadcast(first, 0)
            equal *= torch.equal(first, parameter.grad)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """TP through Transformers' plan, for models whose heads and widths two ranks share evenly, and for others."""
    odd = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "value_head_dim": 7}
    cases: dict[str, dict[str, Any]] = {
        "cosine": {},
        "learned, tied": {"router": "learned", "tie_word_embeddings": True},
        "odd": odd | {"router": "learned_error", "hidden_size": 33, "intermediate_size": 47, "attention_bias": True},
        "no output gate": {"output_gate": False, "qk_norm": "projection", "mlp_bias": True, "router": "l2"},
    }
    found: dict[str, Any] = {"warnings": []}
    logging.getLogger("transformers.distributed.mixin").addHandler(Warnings(found["warnings"]))
    if not SHARES_UNEVENLY:
        del cases["odd"]
    for name, settings in cases.items():
        path = save_once(make_model(**VOCABULARY | settings), folder / f"source of {name}")
        torch.manual_seed(dist.get_rank())
        alone = HAMForCausalLM.from_pretrained(path, use_cache=False)
        # The first as users of older releases ask for it.
        how = {"tp_plan": "auto"} if name == "cosine" else {"distributed_config": DistributedConfig(tp_size=2)}
        model = HAMForCausalLM.from_pretrained(path, use_cache=False, **how)
        found[name] = compare_tensor_parallel(alone, model, folder / f"tp {name}")
    return found


class Warnings(logging.Handler):
    """Appends the texts of warnings to a list."""

    def __init__(self, texts: list[str]):
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def shares_embedding(model: HAMForCausalLM) -> bool:
    """True if ranks share the embedding, as Transformers has it if it is tied, and in newer releases always."""
    return isinstance(model.get_input_embeddings().weight.data, DTensor)


def compare_tensor_parallel(alone: HAMForCausalLM, model: HAMForCausalLM, folder: Path) -> dict[str, Any]:
    prompt = make_batch()["input_ids"][:2, :12]
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    texts = [m.eval().generate(prompt, **options) for m in (alone, model)]
    expected = one_process(alone.train(), [make_batch()])
    found: dict[str, Any] = compare(expected, one_process(model.train(), [make_batch()]))
    found["text"] = torch.equal(*texts)
    found["equal on all ranks"] = equal_on_all_ranks(model)
    sharded = {name for name, p in model.named_parameters() if isinstance(p.data, DTensor)}
    found["sharded"] = sorted({name.split(".")[-2] for name in sharded})
    counted = {n for n, _ in alone.named_parameters() if shares_embedding(model) or "embed_tokens" not in n}
    held = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    whole_size = sum(p.numel() for n, p in alone.named_parameters() if n in counted)
    found["share held"] = sum(held[n].numel() for n in counted) / whole_size
    model.save_pretrained(folder)
    dist.barrier()
    ordinary = HAMForCausalLM.from_pretrained(folder)
    found["saved"] = all(torch.equal(x, weights(alone)[name]) for name, x in weights(ordinary).items())
    for each in (alone, model):
        optimizer_of(each).step()
    found["steps"] = difference(weights(alone), weights(model))
    return found


def main() -> None:
    """Writes what every topic found to the file that the first argument names."""
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    make_accelerator()
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("others", "self"))
    found = {
        "data_parallel": data_parallel(),
        "sharded": sharded(output.parent),
        "sharded_steps": sharded_steps(output.parent),
        "in_bfloat16": in_bfloat16(mesh),
        "sharded_by_transformers": sharded_by_transformers(output.parent),
        "tensor_parallel": tensor_parallel(output.parent),
        "messages": messages(output.parent),
    }
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
