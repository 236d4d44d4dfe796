# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Healing of SmolLM2, and what it gives at a quarter of the tokens: loss, passages read before, needles.

Usage:

    python -m model_cards.smollm2.transfer run --steps 120 --distillation 60
    python -m model_cards.smollm2.transfer run --steps 500 --distillation 2000 --rows 32 --text CORPUS  # on a GPU
    python -m model_cards.smollm2.transfer report

Layer-wise transfer comes first, and distillation of the source end to end after it. `run` goes on where it was
interrupted, and appends a row to transfer.jsonl for each window of text and each prompt; transfer_log.jsonl has the
errors and gates on the way.
"""

import argparse
import itertools
import json
import statistics
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm
from transformers import AutoTokenizer

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import calibrate
from ham_hf.evaluation.importance import needle_examples
from ham_hf.evaluation.losses import window_figures
from ham_hf.evaluation.markdown import table
from ham_hf.evaluation.report import mean_and_error
from ham_hf.files import append_row, read_rows, write_whole
from ham_hf.training.progress import LOG
from ham_hf.training.recipe import read_recipe
from ham_hf.training.train import train

from ..rows import Row, current_commit
from .checkpoint import CACHE, checkpoint, llama
from .needles import SEED, THINGS, needle_figures
from .texts import CONTEXT, calibration_windows, halves, judged_windows

ROOM = Path(__file__).parent
RESULTS, LOGS = ROOM / "transfer.jsonl", ROOM / "transfer_log.jsonl"
LOGGED = ("transfer_step", "transfer_error", "transfer_error_worst", "kv_usage", "rnn_gate")
USAGE = 0.25
# Tokens that the arm which keeps by age alone holds: 29% of a judged text, as the others do with their windows.
RECENT = 300
# Settings of the converted model, and the usage that its layers are asked for.
EVERYTHING = "everything"
ARMS: dict[str, tuple[Row, float]] = {
    EVERYTHING: ({"router": "l2"}, 1.0),
    "l2": ({"router": "l2"}, USAGE),
    "random": ({"router": "random"}, USAGE),
    "recency": ({"router": "random", "attention_window": RECENT}, 0.0),
}
# Measured with an RNN whose read began as large as 1, and drowned attention's; the rows name the commit.
FORMER_ARMS = ("l2, RNN at 1",)
WINDOWS, PROMPTS = 6, 20
# Tokens of a row of training.
ROW = 512


class Healing(NamedTuple):
    """How much a model is trained, and on what.

    Attributes:
        steps: of layer-wise transfer.
        distillation: steps after it.
        rows: rows of `ROW` tokens in a step.
        text: files that `data.files` of a recipe takes; `None` for the text of the calibration.
    """

    steps: int
    distillation: int = 0
    rows: int = 1
    text: str | None = None

    def folder(self, room: Path) -> Path:
        """The folder of the transfer in an arm's room."""
        name = f"steps-{self.steps}" if self.rows == 1 else f"steps-{self.steps}-rows-{self.rows}"
        return room / (name if self.text is None else f"{name}-{zlib.crc32(self.text.encode()):08x}")

    def labels(self) -> Row:
        """What tells the rows of this healing from those of others; only where it is not as the first ones were."""
        more: Row = {"rows": self.rows} if self.rows > 1 else {}
        return more if self.text is None else more | {"trained_on": self.text}

    def recipe(self, room: Path) -> Row:
        """The sections that both stages share. A GPU that is there is used, in bfloat16."""
        text = self.text
        if text is None:
            text = str(room / "text.txt")
            write_whole(room / "text.txt", halves()[0])
        on_gpu = torch.cuda.is_available()
        rows = {"per_device_train_batch_size": self.rows, "per_device_eval_batch_size": min(self.rows, 4)}
        return {
            "data": {"files": text},
            "context": ROW,
            "evaluation": {"rows": 4, "usages": []},
            "trainer": {**rows, "bf16": on_gpu, "use_cpu": not on_gpu, "logging_steps": 10},
        }


def converted(arm: str, cache: Path) -> Path:
    """The folder of the converted model at an arm."""
    folder = cache / f"transfer-{arm}" / "before"
    if not folder.exists():
        source, partial = checkpoint(cache), folder.with_suffix(".partial")
        settings: Row = {"usage_division": "even"} | ARMS[arm][0]
        HAMForCausalLM.from_pretrained(source, dtype=torch.float32, **settings).save_pretrained(partial)
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        partial.rename(folder)
    return folder


def transferred(arm: str, before: Path, healing: Healing) -> Path:
    """The folder of a converted model after its transfer."""
    room = before.parent
    output = healing.folder(room)
    recipe = healing.recipe(room) | {
        "output": str(output),
        "model": {"from": str(before)},
        "steps": 0,
        "transfer": {"steps": healing.steps, "usage": ARMS[arm][1], "learning_rate": 3e-3},
    }
    return trained(recipe, output)


def distilled(arm: str, start: Path, source: Path, healing: Healing) -> Path:
    """The folder of a transferred model after its distillation, with all of its weights in training."""
    room = start.parents[1]
    output = room / f"{start.parent.name}-distilled-{healing.distillation}"
    recipe = healing.recipe(room) | {
        "output": str(output),
        "model": {"from": str(start)},
        "steps": healing.distillation,
        "seed": 1,  # rows in another order than those of the transfer
        "usage": {"schedule": [[0, ARMS[arm][1]]]},
        "distillation": {"teacher": str(source), "open_gates": None, "added_learning_rate": 1e-3},
    }
    recipe["evaluation"] |= {"every": healing.distillation}
    # A step is saved once in a while, as a GPU may be lent for minutes.
    kept = {"save_steps": max(1, healing.distillation // 4), "save_total_limit": 1}
    recipe["trainer"] |= kept | {"learning_rate": 5e-5, "warmup_steps": 5, "logging_steps": 5}
    return trained(recipe, output)


def trained(recipe: Row, output: Path) -> Path:
    """Runs a recipe, or goes on with it; returns the folder of its model."""
    path = output.with_suffix(".yaml")
    write_whole(path, yaml.safe_dump(recipe, sort_keys=False))
    train(read_recipe(path))
    return output / "model"


def save_log(arm: str, output: Path) -> None:
    """Puts the log of an arm's transfer, the mean over layers, in the place of an earlier one."""
    rows = [row for row in read_rows(LOGS) if row["arm"] != arm]
    steps = [row for row in read_rows(output / LOG) if "transfer_step" in row]
    rows += [{"arm": arm} | {name: round(row[name], 4) for name in LOGGED} for row in steps]
    write_whole(LOGS, "".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def measure(folder: Path, labels: Row, usage: float, done: list[Row]) -> None:
    """Appends the rows of a model that are not there yet."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HAMForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibrate(model, calibration_windows(tokenizer))
    filler = tokenizer(halves()[1], add_special_tokens=False)["input_ids"]
    inputs: dict[str, Any] = {
        "text": judged_windows(tokenizer, WINDOWS),
        "needle": needle_examples(tokenizer, filler, PROMPTS, CONTEXT, SEED, THINGS),
    }
    told = {(*stage_of(row), row["kind"], row["index"]) for row in done}
    for kind, x, index in tqdm([(kind, x, i) for kind, xs in inputs.items() for i, x in enumerate(xs)]):
        if (*stage_of(labels), kind, index) in told:
            continue
        if kind == "needle":
            figures = needle_figures(model, x, usage)
        else:
            of_window = window_figures(model, x, kv_usage=usage)[0]
            figures = {"loss": of_window.loss, "second_time": of_window.second_time, "held": of_window.held}
        append_row(RESULTS, labels | {"kind": kind, "index": index} | figures | {"commit": current_commit()})


def to_markdown(rows: list[Row]) -> str:
    """A row for each arm and stage; without a step it is as it was converted."""
    lines = []
    for arm in (*ARMS, *FORMER_ARMS):
        for stage in sorted({stage_of(row)[1:] for row in rows if row["arm"] == arm}):
            transfer, distillation, rows_of_step, _ = stage
            own = [row for row in rows if stage_of(row) == (arm, *stage)]
            texts, needles = ([row for row in own if row["kind"] == kind] for kind in ("text", "needle"))
            if not texts or not needles:
                continue
            lines.append(
                [
                    arm,
                    thousands(transfer * rows_of_step),
                    thousands(distillation * rows_of_step),
                    f"{statistics.mean(x['held'] for x in texts):.1%}",
                    f"{statistics.mean(x['loss'] for x in texts):.4f}",
                    f"{statistics.mean(x['second_time'] for x in texts):.3f}",
                    f"{sum(x['found'] for x in needles)} of {len(needles)}",
                    f"{statistics.mean(x['loss'] for x in needles):.3f}",
                ]
            )
    columns = [
        "kept by",
        "transfer",
        "distillation",
        "held",
        "loss of text",
        "second time",
        "needles",
        "loss of the answer",
    ]
    tail = (
        f"Asked for {USAGE:.0%}; recency keeps the last {RECENT} tokens. {WINDOWS} windows of text and {PROMPTS} "
        f"prompts of {CONTEXT} tokens; losses in nats/token. Transfer and distillation: in thousands of tokens."
    )
    return f"{table(columns, lines)}\n\n{tail}\n{differences(rows)}"


def stage_of(row: Row) -> tuple[str, int, int, int, str]:
    """The arm of a row, the steps of transfer and of distillation that its model had, their rows and their text."""
    return row["arm"], row["steps"], row.get("distillation", 0), row.get("rows", 1), row.get("trained_on", "")


def thousands(rows: int) -> str:
    """The tokens of so many rows of training, in thousands."""
    return f"{rows * ROW / 1000:.0f}"


def differences(rows: list[Row]) -> str:
    """A row for each pair of arms that were measured: how they differ, window by window; empty if there is none."""
    lines = []
    texts = [row for row in rows if row["kind"] == "text"]
    last = {
        arm: max((stage_of(row) for row in texts if row["arm"] == arm), default=(arm, 0, 0, 1, "")) for arm in ARMS
    }
    stages = {arm: sorted({stage_of(row) for row in texts if row["arm"] == arm}) for arm in ARMS}
    pairs = [(stage, before) for arm in ARMS for before, stage in itertools.pairwise(stages[arm])]
    pairs += [(last["l2"], last["random"]), (last["l2"], last["recency"])]
    for first, second in pairs:
        stages_of_both = ((arm, thousands(a * rows), thousands(b * rows)) for arm, a, b, rows, _ in (first, second))
        cells = [" - ".join(f"{arm}, {a} + {b}" for arm, a, b in stages_of_both)]
        for name in ("loss", "second_time"):
            one, other = (
                {row["index"]: row[name] for row in texts if stage_of(row) == stage} for stage in (first, second)
            )
            gaps = [one[index] - other[index] for index in sorted(one.keys() & other.keys())]
            if len(gaps) > 1 and first != second:
                mean, error = mean_and_error(gaps)
                cells.append(f"{mean:+.3f} ± {error:.3f} ({sum(gap < 0 for gap in gaps)} of {len(gaps)})")
        lines += [cells] if len(cells) == 3 else []
    columns = ["difference, by window ± standard error (lower in)", "loss of text", "second time"]
    return f"\n{table(columns, lines)}\n" if lines else ""


def main() -> None:
    """Heals and measures, or writes transfer.md from the rows."""
    parser = argparse.ArgumentParser(description="Healing of SmolLM2, and what it gives.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="heal, and measure what has no row yet")
    command.add_argument(
        "--steps", type=int, default=150, help=f"steps of transfer, of {ROW} tokens a row (default %(default)s)"
    )
    command.add_argument("--distillation", type=int, default=0, help="steps after it (default: none)")
    command.add_argument("--rows", type=int, default=1, help="rows in a step (default %(default)s)")
    command.add_argument("--text", help="a file, folder or glob to train on (default: what the calibration saw)")
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to measure (default: all)")
    command.add_argument("--cache", type=Path, default=CACHE, help="folder of the HAM (default: %(default)s)")
    commands.add_parser("report", help="write transfer.md")
    arguments = parser.parse_args()
    if arguments.command == "run":
        healing = Healing(arguments.steps, arguments.distillation, arguments.rows, arguments.text)
        for arm in arguments.arms:
            before, usage = converted(arm, arguments.cache), ARMS[arm][1]
            measure(before, {"arm": arm, "steps": 0}, usage, read_rows(RESULTS))
            if arm != EVERYTHING:
                after = transferred(arm, before, healing)
                save_log(arm, after.parent)
                labels = {"arm": arm, "steps": healing.steps} | healing.labels()
                measure(after, labels, usage, read_rows(RESULTS))
                if healing.distillation:
                    healed = distilled(arm, after, llama(arguments.cache), healing)
                    labels |= {"distillation": healing.distillation}
                    measure(healed, labels, usage, read_rows(RESULTS))
    report = to_markdown(read_rows(RESULTS))
    print(report)
    write_whole(ROOM / "transfer.md", report)


if __name__ == "__main__":
    main()
