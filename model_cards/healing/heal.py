# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Converts a small Llama that was trained for this, heals it in several ways, and measures what comes back.

Usage::

    python -m model_cards.healing.heal run --corpus CORPUS --output MODELS --seeds 0 1 2
    python -m model_cards.healing.heal report

Healing follows recipes of `ham-hf train`, which are written beside the models. Run again to resume: a model that is
there is not trained again, and a row that is there is not measured again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.files import append_row, read_rows, write_whole
from ham_hf.training.data import PackedRows
from ham_hf.training.documents import SPLIT_FILES, Document, write_documents
from ham_hf.training.progress import LOG
from ham_hf.training.recipe import DataRecipe, read_recipe
from ham_hf.training.sampling import TokenSampler, held_out_windows
from ham_hf.training.train import train

from ..rows import Row, current_commit
from .measure import measure
from .report import in_words, plot, to_markdown
from .settings import ARMS, Arm, Settings

ROOM = Path(__file__).parent
ROOT = ROOM.parents[1]
RESULTS = ROOM / "results.jsonl"
CONVERT = ROOT / "conversion_scripts" / "convert_transformer_to_ham.py"
# As in the paper; the arms change it.
CONVERSION = ("--window", "0", "--sinks", "0", "--router", "cosine")
HAM_TINY = ROOT / "ham_hf" / "checkpoints" / "ham-tiny"
# First numbers of windows: of the source's training, times the seed; of healing; and of calibration.
SEEDS_APART, HEALING, CALIBRATION = 1_000_003, 5 * 10**8, 10**9


class Windows(Dataset):
    """Windows of training text, each a function of its index alone."""

    def __init__(self, sampler: TokenSampler, settings: Settings, first: int, count: int, context: int):
        self.sampler, self.settings = sampler, settings
        self.first, self.count, self.context = first, count, context

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        repeats, names = self.settings.repeats, self.settings.names
        tokens = self.sampler.batch(self.first + index, 1, self.context, repeats, names)[0]
        return {"input_ids": tokens, "labels": tokens}


def source_model(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> LlamaForCausalLM:
    """The Llama to convert, of 2.4 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=2 * settings.context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def trainer_options(steps: int, lr: float, settings: Settings) -> dict[str, Any]:
    """Options of Trainer for the source and for healing: warm-up, decay to a tenth, in float32."""
    return {
        "learning_rate": lr,
        "per_device_train_batch_size": settings.rows,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 50 if steps > 500 else 20,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "logging_steps": 10,
        "report_to": "none",
    }


class Study:
    """One seed: models, each a folder of `output` that is made when it is first asked for, and their rows."""

    def __init__(self, corpus: Path, tokenizer: Path, output: Path, results: Path, settings: Settings, seed: int):
        self.corpus, self.results, self.settings, self.seed = corpus, results, settings, seed
        self.output = output / f"seed-{seed}"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.sampler = TokenSampler(corpus, "train", self.tokenizer)
        windows = held_out_windows(corpus, self.tokenizer, settings.context, settings.windows_per_document)
        self.windows = torch.cat(windows)

    def check_settings(self) -> None:
        """Raises `ValueError` if `output` holds models of other settings."""
        path, settings = self.output / "settings.json", json.loads(json.dumps(asdict(self.settings)))
        self.output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, json.dumps(settings))
        if (before := json.loads(path.read_text())) != settings:
            raise ValueError(f"`output` {self.output} holds models of other settings, {before}: give another folder.")

    def save(self, model: PreTrainedModel, folder: Path) -> Path:
        """Writes a model and the tokenizer, whole or not at all."""
        unfinished = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        return unfinished.rename(folder)

    def train_llama(self, model: LlamaForCausalLM, data: Dataset, steps: int, lr: float, folder: Path) -> Path:
        """Trains a Llama on its next-token loss."""
        options = trainer_options(steps, lr, self.settings)
        arguments = TrainingArguments(
            str(self.output),
            max_steps=steps,
            seed=self.seed,
            save_strategy="no",
            remove_unused_columns=False,
            **options,
        )
        Trainer(model, arguments, train_dataset=data).train()
        return self.save(model, folder)

    def source(self) -> Path:
        """The Llama, trained from scratch."""
        folder, settings = self.output / "source", self.settings
        if folder.exists():
            return folder
        set_seed(self.seed)
        first, count = SEEDS_APART * self.seed, settings.source_steps * settings.rows
        data = Windows(self.sampler, settings, first, count, settings.context)
        model = source_model(self.tokenizer, settings)
        return self.train_llama(model, data, settings.source_steps, settings.source_lr, folder)

    def trained_on(self) -> Path:
        """The source after as many steps of healing's text, to show what these do alone."""
        folder, settings = self.output / "trained-on", self.settings
        if folder.exists():
            return folder
        set_seed(self.seed)
        model = LlamaForCausalLM.from_pretrained(self.source())
        rows = PackedRows(DataRecipe(**self.data()), self.tokenizer, settings.context, self.seed)
        return self.train_llama(model, rows, settings.steps, settings.lr, folder)

    def converted(self, arm: Arm) -> Path:
        """The source as a HAM with the memory of an arm."""
        first, folder = self.output / "converted", self.output / f"converted-{arm.memory}"
        if not first.exists():
            subprocess.run([sys.executable, str(CONVERT), str(self.source()), str(first), *CONVERSION], check=True)
        if folder.exists():
            return folder
        memory: dict[str, Any] = {"router": arm.router, "attention_window": arm.window, "attention_sinks": arm.sinks}
        return self.save(HAMForCausalLM.from_pretrained(first, **memory), folder)

    def transferred(self, arm: Arm) -> Path:
        """The converted model after layer-wise transfer."""
        settings = self.settings
        transfer = {
            "steps": settings.transfer_steps,
            "usage": arm.usage(settings),
            "learning_rate": settings.transfer_lr,
            "open_gates": settings.open_gates,
        }
        return self.trained(f"transferred-{arm.memory}", self.converted(arm), {"steps": 0, "transfer": transfer})

    def healed(self, name: str) -> Path:
        """The model of an arm after all of its training."""
        settings, arm = self.settings, ARMS[name]
        start = self.transferred(arm) if arm.transfer else self.converted(arm)
        # Who has not learned yet to live with few tokens begins with all of them.
        points = [1.0, arm.usage(settings)] if not arm.transfer else [arm.usage(settings)]
        sections = {
            "steps": settings.steps,
            "usage": {"schedule": [[n * settings.steps // 2, usage] for n, usage in enumerate(points)]},
            "distillation": {
                "teacher": str(self.source()),
                "weight": arm.weight,
                "open_gates": settings.open_gates if arm.opened and not arm.transfer else None,
                "added_learning_rate": settings.added_lr,
            },
        }
        return self.trained(f"healed-{name}", start, sections)

    def trained(self, name: str, start: Path, sections: dict[str, Any]) -> Path:
        """The model of a recipe with these sections."""
        settings, output = self.settings, self.output / name
        content = {
            "output": str(output),
            "model": {"from": str(start)},
            "data": self.data(),
            "context": settings.context,
            "seed": self.seed,
            **sections,
            "evaluation": {
                "every": settings.steps,
                "data": {"files": str(self.corpus / SPLIT_FILES["held_out"])},
                "usages": [],
            },
            "trainer": {
                **trainer_options(settings.steps, settings.lr, settings),
                "save_steps": settings.steps // 2,
                "save_total_limit": 1,
            },
        }
        write_whole(output.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False))
        folder = train(read_recipe(output.with_suffix(".yaml")))
        if folder is None:
            raise KeyboardInterrupt
        return folder

    def data(self) -> dict[str, Any]:
        """The recipes' section `data`: text like that of the source's training, which it has not seen."""
        path, settings = self.output / "text.jsonl", self.settings
        if not path.exists():
            # One token is left for the end of the document.
            count, context = (settings.steps + 20) * settings.rows, settings.context - 1
            windows = Windows(self.sampler, settings, HEALING, count, context)
            rows = torch.stack([windows[i]["input_ids"] for i in range(count)])
            texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            write_documents(path, (Document("healing", str(i), text) for i, text in enumerate(texts)))
        return {"files": str(path), "shuffle_rows": 100_000}

    def measured(self, folder: Path, usage: float) -> Row:
        """The figures of a model, and of a HAM how far its RNN's gates are open; quantiles decide what it keeps."""
        settings, model = self.settings, AutoModelForCausalLM.from_pretrained(folder)
        if not isinstance(model, HAMForCausalLM):
            return measure(model, self.windows, usage)
        calibrate(model, (self.sampler.batch(CALIBRATION + i, settings.rows, settings.context) for i in range(4)))
        gates = [row["rnn_gate"] for row in read_rows(folder / LOG) if "rnn_gate" in row]
        return measure(model, self.windows, usage) | ({"rnn_gate": gates[-1]} if gates else {})

    def add_row(self, arm: str, stage: str, make: Callable[[], Path], usage: float = 1.0) -> None:
        """Measures a model, unless its row is there."""
        key = {"seed": self.seed, "arm": arm, "stage": stage}
        if any(row.items() >= key.items() for row in read_rows(self.results)):
            return
        print(f"Seed {self.seed}: {arm}, {stage}", flush=True)
        row = key | self.measured(make(), usage) | {"commit": current_commit()}
        append_row(self.results, row)
        print(f"Seed {self.seed}: {arm}, {stage}: {in_words(row)}", flush=True)

    def run(self, arms: Iterable[str]) -> None:
        """Makes and measures what is missing."""
        self.check_settings()
        self.add_row("source", "trained", self.source)
        self.add_row("source", "trained on", self.trained_on)
        for name in arms:
            arm = ARMS[name]
            usage, convert = arm.usage(self.settings), partial(self.converted, arm)
            if name == "cosine":
                self.add_row("everything", "converted", convert)
            self.add_row(name, "converted", convert, usage)
            if arm.transfer:
                self.add_row(name, "transferred", partial(self.transferred, arm), usage)
            self.add_row(name, "healed", partial(self.healed, name), usage)


def main() -> None:
    """Makes the missing models and rows, or writes results.md and healing.png from the rows."""
    parser = argparse.ArgumentParser(description="Trains, converts and heals a small Llama; run again to resume.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the rows (default: in this folder)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="make and measure what has no row yet")
    command.add_argument("--corpus", type=Path, required=True, help="folder written by model_cards.ham_tiny.corpus")
    command.add_argument("--output", type=Path, required=True, help="folder for the models")
    command.add_argument("--tokenizer", type=Path, default=HAM_TINY, help="default: that of ham-tiny")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to heal (default: all)")
    commands.add_parser("report", help="write results.md and healing.png")
    arguments = parser.parse_args()
    if arguments.command == "run":
        for seed in arguments.seeds:
            paths = arguments.corpus, arguments.tokenizer, arguments.output, arguments.results
            Study(*paths, Settings(), seed).run(arguments.arms)
    rows = read_rows(arguments.results)
    report = to_markdown(rows, Settings())
    print(report)
    write_whole(arguments.results.with_suffix(".md"), report)
    plot(rows, arguments.results.with_name("healing.png"))


if __name__ == "__main__":
    main()
