# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Healing of SmolLM2, and what it gives at a quarter of the tokens: loss, passages read before, needles.

Usage:

    python -m model_cards.smollm2.transfer run --steps 120 --distillation 60
    python -m model_cards.smollm2.transfer report

Layer-wise transfer comes first, and distillation of the source end to end after it. `run` goes on where it was
interrupted, and appends a row to transfer.jsonl for each window of text and each prompt; transfer_log.jsonl has the
errors and gates on the way.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

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


def transferred(arm: str, before: Path, steps: int) -> Path:
    """The folder of a converted model after so many steps of transfer."""
    room = before.parent
    write_whole(room / "text.txt", halves()[0])
    recipe = {
        "output": str(room / f"steps-{steps}"),
        "model": {"from": str(before)},
        "data": {"files": str(room / "text.txt")},
        "steps": 0,
        "context": 512,
        "transfer": {"steps": steps, "usage": ARMS[arm][1], "learning_rate": 3e-3},
        "evaluation": {"rows": 4, "usages": []},
        "trainer": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "logging_steps": 10},
    }
    write_whole(room / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    train(read_recipe(room / "recipe.yaml"))
    return room / f"steps-{steps}" / "model"


def distilled(arm: str, start: Path, source: Path, steps: int) -> Path:
    """The folder of a transferred model after so many steps of distillation, all of its weights in training."""
    output = start.parents[1] / f"{start.parent.name}-distilled-{steps}"
    recipe = {
        "output": str(output),
        "model": {"from": str(start)},
        "data": {"files": str(start.parents[1] / "text.txt")},
        "steps": steps,
        "context": 512,
        "seed": 1,  # rows in another order than those of the transfer
        "usage": {"schedule": [[0, ARMS[arm][1]]]},
        "distillation": {"teacher": str(source), "open_gates": None, "added_learning_rate": 1e-3},
        "evaluation": {"every": steps, "rows": 4, "usages": []},
        "trainer": {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "learning_rate": 5e-5,
            "warmup_steps": 5,
            "logging_steps": 5,
            "save_steps": steps,
            "save_total_limit": 1,
            "use_cpu": True,
        },
    }
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
            own = [row for row in rows if stage_of(row) == (arm, *stage)]
            texts, needles = ([row for row in own if row["kind"] == kind] for kind in ("text", "needle"))
            if not texts or not needles:
                continue
            lines.append(
                [
                    arm,
                    *stage,
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
        f"prompts of {CONTEXT} tokens; losses in nats/token. Transfer and distillation: steps of 512 tokens each."
    )
    return f"{table(columns, lines)}\n\n{tail}\n{differences(rows)}"


def stage_of(row: Row) -> tuple[str, int, int]:
    """The arm of a row, and the steps of transfer and of distillation that its model had."""
    return row["arm"], row["steps"], row.get("distillation", 0)


def differences(rows: list[Row]) -> str:
    """A row for each pair of arms that were measured: how they differ, window by window; empty if there is none."""
    lines = []
    texts = [row for row in rows if row["kind"] == "text"]
    last = {arm: max((stage_of(row) for row in texts if row["arm"] == arm), default=(arm, 0, 0)) for arm in ARMS}
    stages = {arm: sorted({stage_of(row) for row in texts if row["arm"] == arm}) for arm in ARMS}
    pairs = [(stage, before) for arm in ARMS for before, stage in itertools.pairwise(stages[arm])]
    pairs += [(last["l2"], last["random"]), (last["l2"], last["recency"])]
    for first, second in pairs:
        cells = [" - ".join(f"{arm}, {steps} + {more}" for arm, steps, more in (first, second))]
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
        "--steps", type=int, default=150, help="steps of transfer, of 512 tokens (default %(default)s)"
    )
    command.add_argument("--distillation", type=int, default=0, help="steps after it (default: none)")
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to measure (default: all)")
    command.add_argument("--cache", type=Path, default=CACHE, help="folder of the HAM (default: %(default)s)")
    commands.add_parser("report", help="write transfer.md")
    arguments = parser.parse_args()
    if arguments.command == "run":
        for arm in arguments.arms:
            before, usage = converted(arm, arguments.cache), ARMS[arm][1]
            measure(before, {"arm": arm, "steps": 0}, usage, read_rows(RESULTS))
            if arm != EVERYTHING:
                after = transferred(arm, before, arguments.steps)
                save_log(arm, after.parent)
                labels = {"arm": arm, "steps": arguments.steps}
                measure(after, labels, usage, read_rows(RESULTS))
                if arguments.distillation:
                    healed = distilled(arm, after, llama(arguments.cache), arguments.distillation)
                    labels |= {"distillation": arguments.distillation}
                    measure(healed, labels, usage, read_rows(RESULTS))
    report = to_markdown(read_rows(RESULTS))
    print(report)
    write_whole(ROOM / "transfer.md", report)


if __name__ == "__main__":
    main()
