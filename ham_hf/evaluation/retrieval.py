# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Measures how well a model retrieves, by the tasks of RULER, at several settings of its memory."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .evaluate import Memory, setting
from .losses import cache_of, usage_of
from .markdown import table
from .record import Record
from .report import held_share, mean_and_error, setting_name
from .ruler import TASKS, Sample, make_samples, score


class Retrieval:
    """Scores of a model on samples of RULER's tasks, which a file remembers.

    Args:
        model: a causal language model, in evaluation mode and on its device.
        tokenizer: its tokenizer.
        tasks: names of `TASKS`.
        length: tokens of prompt and answer together.
        count: samples of each task.
        record: the file, see `Record`; what is in it is not measured again.
        seed, haystack: see `make_samples`.
        batch_size: samples in one call of `generate`.

    Raises:
        ValueError: if the file holds a measurement of something else, and as `make_samples` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        length: int,
        count: int,
        record: Path,
        seed: int = 0,
        haystack: str | None = None,
        batch_size: int = 1,
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # what pads is masked, and may be any token
        self.pad = next(token for token in ends if token is not None)
        self.samples = {task: make_samples(task, tokenizer, length, count, seed, haystack) for task in tasks}
        texts = json.dumps([sorted(tokenizer.get_vocab().items()), haystack])
        inputs = {"length": length, "seed": seed, "text": hashlib.sha256(texts.encode()).hexdigest()}
        self.record = Record(record, model, inputs)

    def missing(self, memory: Memory, task: str) -> list[int]:
        """The samples of a task that are not yet measured at a setting."""
        return [i for i in range(len(self.samples[task])) if key_of(memory, task, i) not in self.record]

    def measure(self, memory: Memory, progress: Any = None) -> dict[str, Any]:
        """The scores at a setting of the memory.

        Args:
            memory: arguments of `generate`: `threshold`, `kv_usage` and `kv_budget` of a HAM.
            progress: a tqdm bar that counts samples.

        Returns:
            The arguments; `usage` and `held`, the fractions that were kept and held, and `score`, 0 to 1, as means
            over tasks; and `tasks`, of each its mean `score` and the standard `error` of that.
        """
        rows, tasks = [], {}
        for task, samples in self.samples.items():
            missing = self.missing(memory, task)
            for start in range(0, len(missing), self.batch_size):
                indices = missing[start : start + self.batch_size]
                answers = self._answer(memory, task, [samples[i] for i in indices])
                for i, figures in zip(indices, answers, strict=True):
                    self.record[key_of(memory, task, i)] = figures
                if progress is not None:
                    progress.update(len(indices))
            of_task = [self.record[key_of(memory, task, i)] for i in range(len(samples))]
            mean, error = mean_and_error([x["score"] for x in of_task])
            tasks[task] = {"score": mean, "error": 0.0 if math.isnan(error) else error}
            rows += of_task
        kept, held, of_all = (mean_or_none([x[name] for x in rows]) for name in ("kept", "held", "score"))
        return setting(memory) | {"usage": kept, "held": held, "score": of_all, "tasks": tasks}

    def results(self, memories: Iterable[Memory]) -> list[dict[str, Any]]:
        """The scores at each setting, with a progress bar on a terminal that tells the time left."""
        memories = list(memories)
        total = sum(len(self.missing(memory, task)) for memory in memories for task in self.samples)
        with tqdm(total=total, desc="retrieval", unit="sample", disable=None) as progress:
            return [self.measure(memory, progress) for memory in memories]

    @torch.no_grad()
    def _answer(self, memory: Memory, task: str, batch: list[Sample]) -> list[dict[str, Any]]:
        """Continues the prompts greedily; for each the score, what the cache holds in the end, and the text."""
        inputs = left_padded([self.tokenizer(sample.prompt)["input_ids"] for sample in batch], self.pad)
        generate: Any = self.model.generate  # of GenerationMixin, which PreTrainedModel does not name
        outputs = generate(
            **inputs.to(self.model.device),
            max_new_tokens=TASKS[task].max_new_tokens,
            do_sample=False,
            pad_token_id=self.pad,
            return_dict_in_generate=True,
            **memory,
        )
        new = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            {"score": score(task, text, sample.answers), "kept": x["kept"], "held": x["held"], "text": text}
            for text, sample, x in zip(texts, batch, usage_of(cache_of(outputs), len(batch)), strict=True)
        ]


def key_of(memory: Memory, task: str, index: int) -> dict[str, Any]:
    """The key of a sample's row."""
    return {"memory": memory, "task": task, "sample": index}


def left_padded(prompts: list[list[int]], pad: int) -> BatchEncoding:
    """`input_ids` and `attention_mask` `[B, T]` int64, with the padding on the left."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in padding]
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def mean_or_none(values: list[float | None]) -> float | None:
    """The mean of the values that there are."""
    known = [x for x in values if x is not None]
    return statistics.mean(known) if known else None


def to_markdown(results: list[dict[str, Any]], length: int, count: int) -> str:
    """A row for each setting, a column for each task."""
    tasks = list(results[0]["tasks"])
    has_routers = results[0]["usage"] is not None
    rows = []
    for x in results:
        usage = [f"{x['usage']:.1%}", f"{x['held']:.1%}"] if has_routers else []
        scores = [f"{100 * x['tasks'][task]['score']:.0f} ± {100 * x['tasks'][task]['error']:.0f}" for task in tasks]
        rows.append([setting_name(x), *usage, f"{100 * x['score']:.1f}", *scores])
    columns = ["asked for", *(["kept", "held"] if has_routers else []), "mean", *tasks]
    tail = (
        f"Percent of the answers found, as RULER scores them, over {count} samples of a task, with standard errors; "
        f"{length} tokens of prompt and answer."
    )
    return f"{table(columns, rows)}\n\n{tail}\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the score of each task against the tokens held."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted(results, key=held_share)
    held = [100 * held_share(x) for x in points]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for task in points[0]["tasks"]:
        axis.plot(held, [100 * x["tasks"][task]["score"] for x in points], "o-", markersize=3, label=task)
    axis.plot(held, [100 * x["score"] for x in points], "k--", label="mean")
    axis.set(xlabel="tokens held (%)", ylabel="answers found (%)", title="Retrieval against memory", ylim=(-3, 103))
    axis.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
