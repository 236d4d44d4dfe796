# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Shows that a converted Transformer heals: trains one, converts it, lowers its usage, and measures the loss.

Usage: ``python -m model_cards.healing.heal --corpus DIR --output DIR``

Healing follows recipes of `ham-hf train`, which are written to the output. Every stage writes its result whole; run
again to resume after the last complete stage, or, while healing, after the last checkpoint.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import sort_checkpoints

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.files import write_whole
from ham_hf.training.data import PackedRows
from ham_hf.training.distillation import open_gates
from ham_hf.training.documents import SPLIT_FILES
from ham_hf.training.recipe import DataRecipe, read_recipe
from ham_hf.training.sampling import TokenSampler, held_out_windows
from ham_hf.training.train import train

from .report import before_healing, plot, to_markdown
from .results import write_results
from .settings import RUNS, Settings

ROOT = Path(__file__).parents[2]
CONVERT = ROOT / "conversion_scripts" / "convert_transformer_to_ham.py"
# As in the paper: neither a window nor sinks, and the error in direction alone.
CONVERSION = ("--window", "0", "--sinks", "0", "--router", "cosine")
HAM_TINY = ROOT / "ham_hf" / "checkpoints" / "ham-tiny"
# First numbers of windows: of the source's training, times the seed, and of calibration.
SEEDS_APART, CALIBRATION = 1_000_003, 10**9


class Windows(Dataset):
    """Windows of training text, each a function of its index alone."""

    def __init__(self, sampler: TokenSampler, first: int, count: int, context: int):
        self.sampler, self.first, self.count, self.context = sampler, first, count, context

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.sampler.batch(self.first + index, 1, self.context)[0]
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
    """Options of Trainer for the source and for healing: warm-up, decay to a tenth, precision."""
    return {
        "learning_rate": lr,
        "per_device_train_batch_size": settings.rows,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 50 if steps > 500 else 20,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 10,
        "report_to": "none",
    }


@torch.no_grad()
def measure(model: PreTrainedModel, windows: torch.Tensor, **arguments: Any) -> dict[str, Any]:
    """Held-out losses (nats per token) of every window `[N, T]`, their mean, and the fraction of tokens kept."""
    training = model.training
    model.eval()
    losses: list[float] = []
    kept: list[float] = []
    for rows in windows.split(8):
        is_ham = isinstance(model, HAMForCausalLM)
        outputs = model(input_ids=rows, use_cache=is_ham, **arguments)
        by_token = F.cross_entropy(outputs.logits[:, :-1].float().mT, rows[:, 1:], reduction="none")
        losses += by_token.mean(1).tolist()
        kept += outputs.cache.kv_usage().mean((0, 2)).tolist() if is_ham else [1.0] * len(rows)
    model.train(training)
    return {"loss": statistics.mean(losses), "kept": statistics.mean(kept), "losses": losses}


class Study:
    """The stages, each of which writes a folder or a file to `output`, and is skipped if that exists."""

    def __init__(self, corpus: Path, tokenizer: Path, output: Path, settings: Settings):
        self.corpus, self.output, self.settings = corpus, output, settings
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.sampler = TokenSampler(corpus, "train", self.tokenizer)
        windows = held_out_windows(corpus, self.tokenizer, settings.context, settings.windows_per_document)
        self.windows = torch.cat(windows)
        self.source, self.converted = output / "source", output / "converted"

    def train(self, model: LlamaForCausalLM, data: Dataset, steps: int, lr: float) -> None:
        """Trains the source on its next-token loss."""
        options = trainer_options(steps, lr, self.settings)
        arguments = TrainingArguments(
            str(self.output), max_steps=steps, seed=self.settings.seed, save_strategy="no", **options
        )
        Trainer(model, arguments, train_dataset=data).train()

    def train_source(self) -> None:
        """Trains the Llama from scratch."""
        settings = self.settings
        set_seed(settings.seed)
        model = source_model(self.tokenizer, settings)
        first, rows = SEEDS_APART * settings.seed, settings.source_steps * settings.rows
        windows = Windows(self.sampler, first, rows, settings.context)
        self.train(model, windows, settings.source_steps, settings.source_lr)
        self.save(model, self.source)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes a model and the tokenizer, whole or not at all."""
        unfinished = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)

    def calibrated(self, model: HAMForCausalLM) -> dict[str, Any]:
        """Measurements of a model at several usages, by calibrated thresholds."""
        settings = self.settings
        batches = [self.sampler.batch(CALIBRATION + i, settings.rows, settings.context) for i in range(4)]
        calibrate(model, batches)
        return {f"{usage:.0%}": measure(model, self.windows, kv_usage=usage) for usage in (1.0, 0.5, 0.25, 0.0)}

    def unhealed(self) -> dict[str, Any]:
        """Measurements of the source, and of the converted model before training."""
        source = measure(LlamaForCausalLM.from_pretrained(self.source), self.windows)
        model = HAMForCausalLM.from_pretrained(self.converted)
        figures = self.calibrated(model)
        open_gates(model, self.settings.open_gates)
        return {"source": source, **figures, "opened": measure(model, self.windows)}

    def trained_on(self) -> dict[str, Any]:
        """Measurements of the source after training on the same tokens as healing, to show their effect alone."""
        settings = self.settings
        set_seed(settings.seed)
        model = LlamaForCausalLM.from_pretrained(self.source)
        data = DataRecipe(**self.data())
        rows = PackedRows(data, self.tokenizer, settings.context, settings.seed)
        self.train(model, rows, settings.steps, settings.lr)
        return measure(model, self.windows)

    def data(self) -> dict[str, Any]:
        """The recipes' section `data`; it shuffles all rows of the corpus, not only those of neighbouring books."""
        return {"files": str(self.corpus / SPLIT_FILES["train"]), "shuffle_rows": 100_000}

    def recipe(self, name: str) -> Path:
        """Writes the recipe of a way to heal."""
        run, settings = RUNS[name], self.settings
        start = self.converted
        if run.router != "cosine":
            start = self.output / f"converted-{run.router}"
            if not start.exists():
                self.save(HAMForCausalLM.from_pretrained(self.converted, router=run.router), start)
        content = {
            "output": str(self.output / name),
            "model": {"from": str(start)},
            "data": self.data(),
            "steps": settings.steps,
            "context": settings.context,
            "seed": settings.seed,
            "usage": {"schedule": settings.schedule},
            "distillation": {
                "teacher": str(self.source),
                "weight": run.weight,
                "open_gates": settings.open_gates if run.opened else None,
            },
            "evaluation": {
                "every": settings.steps,
                "data": {"files": str(self.corpus / SPLIT_FILES["held_out"])},
                "usages": [],
            },
            "trainer": {
                **trainer_options(settings.steps, settings.lr, settings),
                "save_steps": settings.measure_every,
                "save_total_limit": settings.steps,
            },
        }
        path = self.output / f"{name}.yaml"
        write_whole(path, yaml.safe_dump(content, sort_keys=False))
        return path

    def heal(self, name: str) -> dict[str, Any]:
        """Heals in one way: measures its checkpoints, and the healed model at several usages."""
        folder = train(read_recipe(self.recipe(name)))
        if folder is None:
            raise KeyboardInterrupt
        curve = []
        for checkpoint in sort_checkpoints(str(self.output / name)):
            step = int(checkpoint.rpartition("-")[2])
            curve.append({"step": step, **measure(HAMForCausalLM.from_pretrained(checkpoint), self.windows)})
        model = HAMForCausalLM.from_pretrained(folder)
        gates = [layer.mixer.rnn_gate_proj.bias.sigmoid().mean().item() for layer in model.model.layers]
        return {"curve": curve, "asked": self.calibrated(model), "rnn_gates": gates}

    def stored(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `make`, stored when it was first called."""
        path = self.output / f"{name}.json"
        if not path.exists():
            print(f"Stage: {name}", flush=True)
            write_whole(path, json.dumps(make()))
        return json.loads(path.read_text())

    def results(self, runs: Iterable[str] = RUNS) -> dict[str, Any]:
        """Runs every stage in order, with the ways to heal in `runs`.

        Raises:
            ValueError: if `output` holds stages of other settings.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        settings = asdict(self.settings)
        if (before := self.stored("settings", lambda: settings)) != settings:
            raise ValueError(f"`output` {self.output} holds stages of other settings, {before}: give another folder.")
        if not self.source.exists():
            self.train_source()
        if not self.converted.exists():
            subprocess.run(
                [sys.executable, str(CONVERT), str(self.source), str(self.converted), *CONVERSION], check=True
            )
        results = {"settings": settings, "windows": len(self.windows)}
        unhealed = results["unhealed"] = self.stored("unhealed", self.unhealed)
        print(before_healing(unhealed), flush=True)
        results["trained_on"] = self.stored("trained_on", self.trained_on)
        return results | {name: self.stored(name, partial(self.heal, name)) for name in runs}


def main() -> None:
    """Runs the missing stages, and writes `results.jsonl`, `results.md` and `healing.png` to `--results`."""
    parser = argparse.ArgumentParser(description="Trains, converts and heals a small Llama; run again to resume.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by model_cards.ham_tiny.corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and the stages' results")
    parser.add_argument("--tokenizer", type=Path, default=HAM_TINY, help="default: that of ham-tiny")
    parser.add_argument("--results", type=Path, help="folder for table and plot (default: --output)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default %(default)s)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="ways to heal (default: all)")
    arguments = parser.parse_args()
    settings = Settings(seed=arguments.seed)
    study = Study(arguments.corpus, arguments.tokenizer, arguments.output, settings)
    results = study.results(arguments.runs)
    target = arguments.results or arguments.output
    target.mkdir(parents=True, exist_ok=True)
    table = to_markdown(results, settings)
    print(table)
    write_results(results, target / "results.jsonl")
    write_whole(target / "results.md", table)
    plot(results, target / "healing.png")


if __name__ == "__main__":
    main()
