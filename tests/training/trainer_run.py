# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Trains with Transformers' Trainer, interrupts and resumes, for `test_scale_out_trainer.py`: by one process or two.

Usage: ``trainer_run.py WAY SOURCE OUTPUT``; writes curves as JSON and the final weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from ham_hf import HAMForCausalLM
from ham_hf.training.control import ThresholdCallback, UsageSchedule

STEPS, ROWS = 6, 8
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "HAMDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def pass_for_accelerators() -> None:
    """Lets accelerate take CPUs for accelerators, without which it has neither FSDP nor tensor parallelism."""
    initialise = PartialState.__init__

    def disguised(self: PartialState, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = disguised


class Rows(torch.utils.data.Dataset):
    """Rows of unequal lengths, the same for everybody."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, 97, (20 + index % 5 * 8,), generator=generator)


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pads; the second half of each row is learned, so that every process has as many labels as half of its tokens."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = row, 1
        labels[n, len(row) // 2 : len(row)] = row[len(row) // 2 :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Stop(TrainerCallback):
    """Interrupts after half of the steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == STEPS // 2


def train(way: str, source: Path, output: Path, stop: bool, resume: bool) -> Trainer:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    sharding = {"FSDP2 of Transformers": "fsdp_size", "TP": "tp_size"}.get(way)
    config = None if sharding is None else DistributedConfig(**{sharding: ranks})
    model = HAMForCausalLM.from_pretrained(source, distributed_config=config)
    # Ranks that share a model by tensor parallelism see the same rows. Accumulated over two parts of a step for DDP.
    rows, parts = ROWS if way == "TP" else ROWS // ranks, 2 if way == "DDP" else 1
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        # Transformers cannot resume what it sharded itself.
        save_only_model=sharding is not None,
        logging_steps=1,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        weight_decay=0.1,
        max_grad_norm=5.0,
        use_cpu=True,
        seed=3,
        report_to=[],
        disable_tqdm=True,
    )
    callbacks = [] if model.config.threshold is not None else [ThresholdCallback(UsageSchedule(((0, 0.3),)))]
    callbacks += [Stop()] if stop else []
    trainer = Trainer(model, arguments, collate, Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{STEPS // 2}") if resume else None)
    return trainer


def main() -> None:
    """Trains through, or in two parts where that can be, and saves."""
    way, source, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if way != "DDP":
        pass_for_accelerators()
    if way == "FSDP2":
        os.environ.update(FSDP2)
    in_parts = way in ("DDP", "FSDP2")
    trainer = train(way, source, output, stop=in_parts, resume=False)
    if in_parts:
        trainer = train(way, source, output, stop=False, resume=True)
    trainer.save_model(str(output / "final"))
    if trainer.args.process_index == 0:
        logs = [line for line in trainer.state.log_history if "loss" in line]
        print(json.dumps({name: [line[name] for line in logs] for name in ("loss", "grad_norm")}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
