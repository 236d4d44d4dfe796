# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Finds numbers told once, far back, with a converted SmolLM2 whose heads keep what their importance says.

Usage, with FOLDER from convert_transformer_to_ham.py:

    python -m model_cards.smollm2.needles text calibration.txt
    ham-hf calibrate FOLDER --text calibration.txt --router l2 --output CALIBRATED
    python -m model_cards.smollm2.needles run CALIBRATED --prompts 100
    python -m model_cards.smollm2.needles run FOLDER --prompts 20 --length 2048
    python -m model_cards.smollm2.needles report

`run` appends a row to needles.jsonl for each prompt, or window of text, and arm; run again, it goes on.
"""

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer

from ham_hf import HAMForCausalLM
from ham_hf.evaluation.calibration import spread_windows
from ham_hf.evaluation.importance import Example, needle_examples
from ham_hf.evaluation.markdown import table
from ham_hf.evaluation.report import mean_and_error
from ham_hf.files import append_row, read_rows, write_whole

from ..rows import Row, current_commit
from .texts import halves

ROOM = Path(__file__).parent
RESULTS = ROOM / "needles.jsonl"
LENGTH = 1024
WINDOWS = 6
SEED = 7
# None of them is among those of the calibration.
THINGS = ("the combination of the lock", "the winning number", "the flight's tail number", "the account's last digits")
# What the router is asked for, so that at most 40% of the tokens are held, those of window and sinks included.
KV_USAGE = 0.34
EVERYTHING = "everything"


class Arm(NamedTuple):
    """One setting of the memory.

    Attributes:
        router: source of the scores.
        heads: what the usage is divided by: `"importance"`, `"even"` or `"random"`.
        seed: of a random division.
        kv_usage: fraction of tokens that the router is asked for.
    """

    router: str = "l2"
    heads: str = "importance"
    seed: int = 0
    kv_usage: float = KV_USAGE


# In the order of the table.
ARMS = {
    EVERYTHING: Arm(heads="even", kv_usage=1.0),
    "by importance": Arm(),
    "all heads alike": Arm(heads="even"),
    "all heads alike, random router": Arm("random", "even"),
    "random heads, first draw": Arm(heads="random"),
    "random heads, second draw": Arm(heads="random", seed=1),
    "by importance, random router": Arm("random"),
    "by importance, a quarter asked for": Arm(kv_usage=0.25),
}
# Measured with an importance that later code no longer computes; the rows name the commit.
FORMER_ARMS = {"by importance, measured at full attention": Arm()}


class Models:
    """The calibrated checkpoint at every arm, one model for each router.

    Args:
        folder: a checkpoint of `ham-hf calibrate`, with the importance of its heads.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._models: dict[str, HAMForCausalLM] = {}

    def at(self, arm: Arm) -> HAMForCausalLM:
        """The model, with its heads and its router as an arm says."""
        model = self._models.get(arm.router) or self._load(arm.router)
        importance = self._importance
        if arm.heads == "random":
            generator = torch.Generator().manual_seed(arm.seed)
            importance = torch.rand(len(importance), len(importance[0]), generator=generator).tolist()
        model.config.head_importance = importance
        model.config.usage_division = "even" if arm.heads == "even" else "importance"
        return model

    def _load(self, router: str) -> HAMForCausalLM:
        choice: dict[str, Any] = {"router": router}
        model = HAMForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **choice).eval()
        if model.config.head_importance is None:
            raise ValueError(f"`folder` must hold a checkpoint with `head_importance`, got {self.folder}.")
        self._importance = model.config.head_importance
        for layer in model.model.layers:
            if router == "random":  # its scores are uniform
                layer.mixer.score_quantiles.copy_(torch.linspace(0, 1, layer.mixer.score_quantiles.shape[1]))
        self._models[router] = model
        return model


@torch.no_grad()
def needle_figures(model: HAMForCausalLM, x: Example, kv_usage: float) -> dict[str, Any]:
    """Whether the answer is the likeliest continuation, token by token; its loss (nats a token), and what is held."""
    ids = torch.cat(x)[None]
    outputs = model(ids, kv_usage=kv_usage, use_cache=True, logits_to_keep=len(x.answer) + 1)
    logits = outputs.logits[0, :-1]
    return {
        "found": bool((logits.argmax(-1) == x.answer).all()),
        "loss": F.cross_entropy(logits, x.answer).item(),
        "held": outputs.cache.kv_usage().mean().item(),
    }


@torch.no_grad()
def text_figures(model: HAMForCausalLM, ids: torch.Tensor, kv_usage: float) -> dict[str, Any]:
    """The loss (nats a token) of a window of text `[1, T]`, and what is held at its end."""
    outputs = model(ids, labels=ids, kv_usage=kv_usage, use_cache=True)
    return {"loss": outputs.loss.item(), "held": outputs.cache.kv_usage().mean().item()}


def figures_at(models: Models, arm: Arm, x: Example | torch.Tensor) -> dict[str, Any]:
    """The figures of a needle prompt, or of a window of text, at one arm."""
    if isinstance(x, Example):
        return needle_figures(models.at(arm), x, arm.kv_usage)
    return text_figures(models.at(arm), x, arm.kv_usage)


def run(folder: Path, prompts: int, names: list[str], length: int) -> None:
    """Measures what has no row yet: prompt by prompt and window by window, each at the arms of these names."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(halves()[1], add_special_tokens=False)["input_ids"]
    needles = needle_examples(tokenizer, ids, prompts, length, SEED, THINGS)
    windows = spread_windows(ids, length, WINDOWS)
    models, rows = Models(folder), of_length(read_rows(RESULTS), length)
    done = {(row["kind"], row["index"], row["arm"]): row for row in rows}
    # Windows of text come between prompts, so that an early stop has both.
    pairs = itertools.chain.from_iterable(itertools.zip_longest(enumerate(needles), enumerate(windows)))
    for index, x in tqdm([pair for pair in pairs if pair is not None]):
        kind = "needle" if isinstance(x, Example) else "text"
        for name in dict.fromkeys([EVERYTHING, *names]):
            source = done.get((kind, index, EVERYTHING), {})
            # What the source does not find nobody is asked for.
            if (kind, index, name) in done or not source.get("found", True):
                continue
            row = {"kind": kind, "index": index, "arm": name, **ARMS[name]._asdict(), "length": length}
            row |= {**figures_at(models, ARMS[name], x), "commit": current_commit()}
            append_row(RESULTS, row)
            done[kind, index, name] = row


def of_length(rows: list[Row], length: int) -> list[Row]:
    """The rows of prompts and windows of a length; rows without one are from when there was only `LENGTH`."""
    return [row for row in rows if row.get("length", LENGTH) == length]


def interval(found: int, asked: int) -> tuple[float, float]:
    """The 95% interval of a fraction (Wilson, doi 10.1080/01621459.1927.10502953)."""
    z, share = 1.96, found / asked
    middle = (share + z**2 / (2 * asked)) / (1 + z**2 / asked)
    half = z / (1 + z**2 / asked) * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def arm_cells(name: str, rows: list[Row]) -> list[str]:
    """The cells of an arm: its needles among those that the source finds, and its windows of text."""
    figures = {(row["kind"], row["arm"], row["index"]): row for row in rows}
    needles = [row for row in rows if row["arm"] == name and row.get("found") is not None]
    needles = [row for row in needles if figures["needle", EVERYTHING, row["index"]]["found"]]
    texts = [row for row in rows if row["arm"] == name and row["kind"] == "text"]
    source = [figures["text", EVERYTHING, row["index"]]["loss"] for row in texts]
    above = [100 * (row["loss"] - loss) / statistics.mean(source) for row, loss in zip(texts, source, strict=True)]
    mean, error = mean_and_error(above)
    found, held = sum(row["found"] for row in needles), [row["held"] for row in needles]
    low, high = interval(found, len(needles))
    return [
        name,
        f"{(ARMS | FORMER_ARMS)[name].kv_usage:.0%}",
        f"{statistics.mean(held):.1%} ({max(held):.1%})",
        f"{found} of {len(needles)} ({low:.0%} to {high:.0%})",
        f"{statistics.mean(row['loss'] for row in needles):.3f}",
        f"{statistics.mean(row['loss'] for row in texts):.4f}",
        "" if name == EVERYTHING else f"{mean:+.1f}% ± {error:.1f}%",
        str(len(texts)),
    ]


def to_markdown(rows: list[Row]) -> str:
    """A table for each length."""
    lengths = sorted({row.get("length", LENGTH) for row in rows})
    return "\n".join(table_of(of_length(rows, length), length) for length in lengths)


def table_of(rows: list[Row], length: int) -> str:
    """A row for each arm that has results."""
    kinds = {(row["arm"], row["kind"]) for row in rows}
    lines = [arm_cells(name, rows) for name in ARMS | FORMER_ARMS if {(name, "needle"), (name, "text")} <= kinds]
    columns = ["heads", "asked for", "held (most)", "needles found", "loss of the answer", "loss of text"]
    source = [row["found"] for row in rows if row["arm"] == EVERYTHING and row["kind"] == "needle"]
    tail = (
        f"Prompts of {length} tokens in which the source finds the number, as it does in {sum(source)} of "
        f"{len(source)}, with 95% intervals; windows of text of {length} tokens; losses in nats a token. Held: tokens "
        "in memory at the end of a prompt, those of window and sinks included, as the mean over prompts and the "
        "largest. ± is the standard error over windows, each compared with itself when everything is kept."
    )
    return f"{table([*columns, 'above everything kept', 'windows'], lines)}\n\n{tail}\n"


def main() -> None:
    """Writes the text to calibrate on, measures, or writes needles.md from the rows."""
    parser = argparse.ArgumentParser(
        description="Needles in a converted SmolLM2, by the division of usage over heads."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("text", help="write the text to calibrate on")
    command.add_argument("output", type=Path)
    command = commands.add_parser("run", help="measure what has no row yet")
    command.add_argument("folder", type=Path, help="a checkpoint of ham-hf calibrate")
    command.add_argument("--prompts", type=int, default=100, help="needle prompts (default %(default)s)")
    command.add_argument("--length", type=int, default=LENGTH, help="tokens of a prompt (default %(default)s)")
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to measure (default: all)")
    commands.add_parser("report", help="write needles.md")
    arguments = parser.parse_args()
    if arguments.command == "text":
        write_whole(arguments.output, halves()[0])
    elif arguments.command == "run":
        run(arguments.folder, arguments.prompts, arguments.arms, arguments.length)
    else:
        report = to_markdown(read_rows(RESULTS))
        print(report)
        write_whole(ROOM / "needles.md", report)


if __name__ == "__main__":
    main()
