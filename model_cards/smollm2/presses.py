# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares SmolLM2 as a HAM, before any training, with presses of kvpress that hold as many bytes.

Usage, after ``make demo-smollm2``:

    python -m model_cards.smollm2.presses run
    python -m model_cards.smollm2.presses report

`run` measures the HAM, makes an environment of its own for kvpress, which asks for an older Transformers, and has
`press_arms.py` measure the presses there. Each row of presses.jsonl is a prompt, or a window of text, at one arm and
level; run again, it goes on.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ham_hf import HAMForCausalLM
from ham_hf.evaluation.importance import needle_examples
from ham_hf.evaluation.losses import repeated_size, with_repeated_end
from ham_hf.evaluation.markdown import table
from ham_hf.evaluation.report import mean_and_error
from ham_hf.files import append_row, read_rows, write_whole

from ..rows import Row, current_commit
from .checkpoint import CACHE, checkpoint, llama
from .needles import SEED, THINGS, interval
from .texts import CONTEXT, halves, judged_windows

ROOM = Path(__file__).parent
RESULTS = ROOM / "presses.jsonl"
# Versions of the environment; PyTorch is that of this one.
KVPRESS = ("kvpress==0.5.5", "transformers==5.2.0")
# What the HAM's routers are asked for; presses hold as many bytes as it then does.
LEVELS = (0.25, 0.1)
HAM, EVERYTHING = "HAM, heads by importance", "everything"
# The one press that reads the question before it drops tokens.
SEES = "SnapKV, sees the question"
# Bars of one colour each beside grey ones; colours that colour-blind people tell apart (doi 10.1038/nmeth.1618).
COLOURS = {HAM: "#0072b2", "DuoAttention, our importance": "#e69f00"}
PROMPTS, WINDOWS = 20, 6
# Tokens at the end of a window that are read after the press.
REST = 256
QUESTION = "\n\nQuestion:"
KINDS = {"needle": "needles found", "text": "loss of text", "again": "second time"}


def tasks(tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """What every arm reads: `context`, before the press; `rest`, after it, of which the last `answer` tokens count."""
    filler = tokenizer(halves()[1], add_special_tokens=False)["input_ids"]
    question = torch.tensor(tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    for index, x in enumerate(needle_examples(tokenizer, filler, PROMPTS, CONTEXT, SEED, THINGS)):
        start = int((x.prompt.unfold(0, len(question), 1) == question).all(1).nonzero()[-1])
        rest = torch.cat([x.prompt[start:], x.answer])
        yield task("needle", index, x.prompt[:start], rest, len(x.answer))
    for index, window in enumerate(judged_windows(tokenizer, WINDOWS)):
        # The first token after the press does not count: that of a copy is announced by nothing.
        yield task("text", index, window[0, :-REST], window[0, -REST:], REST - 1)
        size = repeated_size(CONTEXT)
        again = with_repeated_end(window)[0]
        yield task("again", index, again[:-size], again[-size:], size - 1)


def task(kind: str, index: int, context: torch.Tensor, rest: torch.Tensor, answer: int) -> Row:
    """One prompt or window, as JSON has it."""
    return {"kind": kind, "index": index, "context": context.tolist(), "rest": rest.tolist(), "answer": answer}


@torch.no_grad()
def ham_figures(model: HAMForCausalLM, task: Row, kv_usage: float) -> Row:
    """Whether a HAM finds the answer, its loss (nats a token), and the bytes in its cache over those of all tokens."""
    ids, count = torch.tensor([task["context"] + task["rest"]]), task["answer"]
    outputs = model(ids, kv_usage=kv_usage, use_cache=True, logits_to_keep=count + 1)
    logits, answer = outputs.logits[0, :-1], ids[0, -count:]
    return {
        "found": bool((logits.argmax(-1) == answer).all()),
        "loss": F.cross_entropy(logits, answer).item(),
        "bytes": outputs.cache.memory_bytes() / outputs.cache.full_kv_bytes(),
    }


def measure_ham(folder: Path, work: list[Row]) -> None:
    """Appends the HAM's rows that are not there yet."""
    done = {(row["arm"], row["level"], row["kind"], row["index"]) for row in read_rows(RESULTS)}
    model = HAMForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for x in tqdm(work, desc=HAM):
        for arm, level in ((EVERYTHING, 1.0), *((HAM, level) for level in LEVELS)):
            if (arm, level, x["kind"], x["index"]) not in done:
                row = {"arm": arm, "level": level, "kind": x["kind"], "index": x["index"]}
                append_row(RESULTS, row | ham_figures(model, x, level) | {"commit": current_commit()})


def environment(cache: Path) -> Path:
    """The Python of an environment with kvpress, made if it is not there."""
    folder = cache / "kvpress"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        torch_version = torch.__version__.partition("+")[0]
        print(f"Making an environment with {', '.join(KVPRESS)} and PyTorch {torch_version} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", f"torch=={torch_version}"]
        pip += shlex.split(os.environ.get("PIP_FLAGS", ""))
        # PyTorch first: asked for together, another build of it may be taken.
        subprocess.run(pip, check=True)
        subprocess.run([*pip, *KVPRESS], check=True)
        ready.touch()
    return python


def measure_presses(cache: Path, work: list[Row]) -> None:
    """Has `press_arms.py` append the rows of the presses, each with the bytes of the HAM's row."""
    bytes_of = {(x["level"], x["kind"], x["index"]): x["bytes"] for x in read_rows(RESULTS) if x["arm"] == HAM}
    importance = HAMForCausalLM.config_class.from_pretrained(checkpoint(cache)).head_importance
    jobs = [x | {"level": level, "bytes": bytes_of[level, x["kind"], x["index"]]} for x in work for level in LEVELS]
    write_whole(cache / "press_jobs.json", json.dumps({"jobs": jobs, "importance": importance}))
    command = [environment(cache), ROOM / "press_arms.py", llama(cache), cache / "press_jobs.json", RESULTS]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([*map(str, command), str(current_commit())], check=True, env=clean)


def to_markdown(rows: list[Row]) -> str:
    """A table for each level, a row for each arm."""
    everything = {(row["kind"], row["index"]): row for row in rows if row["arm"] == EVERYTHING}
    parts = []
    for level in sorted({row["level"] for row in rows if row["arm"] == HAM}, reverse=True):
        here = of_all_arms([row for row in rows if row["level"] == level])
        arms = dict.fromkeys(row["arm"] for row in here)
        share = statistics.mean(row["bytes"] for row in here if row["arm"] == HAM)
        parts.append(f"{share:.0%} of the bytes, as the HAM holds when asked for {level:.0%}:")
        parts.append(table(["what is held", *KINDS.values()], [line_of(arm, here, everything) for arm in arms]))
    return "\n\n".join([*parts, tail(everything)]) + "\n"


def of_all_arms(rows: list[Row]) -> list[Row]:
    """The rows of prompts and windows that every arm was measured on that has any of their kind."""
    arms: dict[str, set[str]] = {}
    by: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        arms.setdefault(row["kind"], set()).add(row["arm"])
        by.setdefault((row["kind"], row["index"]), set()).add(row["arm"])
    return [row for row in rows if by[row["kind"], row["index"]] == arms[row["kind"]]]


def needles_of(arm: str, rows: list[Row], everything: dict[tuple[str, int], Row]) -> list[bool]:
    """Whether an arm finds each number that is found with everything kept."""
    needles = [row for row in rows if (row["arm"], row["kind"]) == (arm, "needle")]
    return [row["found"] for row in needles if everything["needle", row["index"]]["found"]]


def losses_above(arm: str, kind: str, rows: list[Row], everything: dict[tuple[str, int], Row]) -> list[float]:
    """The losses of an arm above those with everything kept, window by window."""
    own = [row for row in rows if (row["arm"], row["kind"]) == (arm, kind)]
    return [row["loss"] - everything[kind, row["index"]]["loss"] for row in own]


def line_of(arm: str, rows: list[Row], everything: dict[tuple[str, int], Row]) -> list[str]:
    """The cells of an arm; empty where it was not measured."""
    found = needles_of(arm, rows, everything)
    low, high = interval(sum(found), len(found))
    cells = [arm, f"{sum(found)} of {len(found)} ({low:.0%} to {high:.0%})"]
    for kind in ("text", "again"):
        losses = losses_above(arm, kind, rows, everything)
        mean, error = mean_and_error(losses) if losses else (0.0, 0.0)
        cells.append(f"{mean:+.3f} ± {error:.3f}" if losses else "")
    return cells


def tail(everything: dict[tuple[str, int], Row]) -> str:
    """What the tables show."""
    text, again = (
        statistics.mean(row["loss"] for (kind, _), row in everything.items() if kind == x) for x in ("text", "again")
    )
    return (
        f"Prompts and windows of {CONTEXT} tokens, those that all arms of a table were measured on. A press reads a "
        "prompt without its question, or a window without "
        "its end, and drops tokens once; what follows it holds whole. The HAM drops as it reads, to the end, and its "
        "bytes are those of the whole cache, with the states of its RNN. Needles: the number is the likeliest answer, "
        "where it is with everything kept. Losses in nats/token above those with everything kept, which are "
        f"{text:.3f} on the last {REST - 1} tokens of a window and {again:.3f} on a copy of its first eighth at its "
        "end; ± are standard errors over windows."
    )


def draw(rows: list[Row], path: Path) -> None:
    """Draws what the first table says: each arm at the same bytes, as bars with intervals and standard errors."""
    import matplotlib.pyplot as plt

    everything = {(row["kind"], row["index"]): row for row in rows if row["arm"] == EVERYTHING}
    here = of_all_arms([row for row in rows if row["level"] == LEVELS[0] and row["arm"] != SEES])
    arms = list(dict.fromkeys(row["arm"] for row in here))
    colours = [COLOURS.get(arm, "#999999") for arm in arms]
    figure, (left, *others) = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    found = [needles_of(arm, here, everything) for arm in arms]
    shares = [100 * statistics.mean(x) for x in found]
    lows, highs = zip(*(interval(sum(x), len(x)) for x in found), strict=True)
    below = [share - 100 * low for share, low in zip(shares, lows, strict=True)]
    above = [100 * high - share for share, high in zip(shares, highs, strict=True)]
    left.barh(arms, shares, xerr=[below, above], color=colours, error_kw={"elinewidth": 1})
    left.set(xlabel="found (%)", title="Numbers told far back", xlim=(0, 100))
    for axis, kind, title in zip(others, ("again", "text"), ("A passage read before", "Plain text"), strict=True):
        means, deviations = zip(
            *(mean_and_error(losses_above(arm, kind, here, everything)) for arm in arms), strict=True
        )
        axis.barh(arms, means, xerr=deviations, color=colours, error_kw={"elinewidth": 1})
        axis.set(xlabel="loss above a full cache (nats/token)", title=title)
    left.invert_yaxis()
    for axis in (left, *others):
        axis.grid(axis="x", alpha=0.3)
    share = statistics.mean(row["bytes"] for row in here if row["arm"] == HAM)
    figure.suptitle(f"SmolLM2-135M, untrained, with {share:.0%} of the bytes of its cache", fontsize=11)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    plt.close(figure)
    partial.replace(path)


def run(cache: Path) -> None:
    """Measures what has no row yet."""
    folder = checkpoint(cache)
    work = list(tasks(AutoTokenizer.from_pretrained(folder)))
    measure_ham(folder, work)
    measure_presses(cache, work)


def main() -> None:
    """Measures, or writes presses.md from the rows."""
    parser = argparse.ArgumentParser(description="SmolLM2 as a HAM beside kvpress's presses at equal bytes.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure what has no row yet")
    command.add_argument("--cache", type=Path, default=CACHE, help="folder of the HAM (default: %(default)s)")
    commands.add_parser("report", help="write presses.md")
    arguments: Any = parser.parse_args()
    if arguments.command == "run":
        run(arguments.cache)
    rows = read_rows(RESULTS)
    report = to_markdown(rows)
    print(report)
    write_whole(ROOM / "presses.md", report)
    draw(rows, ROOM / "presses.png")


if __name__ == "__main__":
    main()
