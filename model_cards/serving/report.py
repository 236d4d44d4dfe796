# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Writes serving.md from the rows of `capacity` and `throughput`: ``python -m model_cards.serving.report``."""

import statistics
from pathlib import Path

from ham_hf.evaluation.markdown import table
from ham_hf.files import read_rows, write_whole

from ..rows import Row

ROOM = Path(__file__).parent
OURS, THEIRS, LLAMA = "ham-hf serve", "transformers serve", "vLLM, Llama"


def capacity_table(rows: list[Row]) -> str:
    """A row for each model and usage, the Llama first."""
    (llama,) = [row for row in rows if row["arm"] == "llama"]
    columns = [
        "model",
        "asked",
        "held",
        "running at once",
        "against Llama",
        "if each reserved a full cache",
        "preempted",
    ]
    lines = [
        [
            "Llama" if row is llama else "HAM",
            "" if row is llama else f"{row['kv_usage']:.0%}",
            f"{row['held']:.0%}",
            f"{row['running']:.1f}",
            f"{row['running'] / llama['running']:.2f}",
            row["reserved"],
            f"{row['preemptions']} of {row['requests']}",
        ]
        for row in rows
    ]
    return table(columns, lines)


def throughput_table(rows: list[Row]) -> str:
    """A row for each number of clients: medians over rounds, and ratios of each round."""
    columns = ["clients", *(f"{name}, tokens per CPU second" for name in (OURS, THEIRS, LLAMA))]
    columns += [
        f"against {THEIRS}",
        "against Llama",
        *(f"{name}, tokens per second" for name in (OURS, THEIRS, LLAMA)),
    ]
    lines = []
    for clients in sorted({row["clients"] for row in rows}):
        by_arm = {
            name: sorted((x for x in rows if (x["clients"], x["arm"]) == (clients, name)), key=lambda x: x["round"])
            for name in (OURS, THEIRS, LLAMA)
        }
        per_cpu = {name: [x["tokens"] / x["cpu_seconds"] for x in own] for name, own in by_arm.items()}
        per_second = {name: [x["tokens"] / x["seconds"] for x in own] for name, own in by_arm.items()}
        cells = [f"{statistics.median(values):.0f}" for values in per_cpu.values()]
        cells += [ratio_cell(per_cpu[OURS], per_cpu[name]) for name in (THEIRS, LLAMA)]
        lines.append([clients, *cells, *(f"{statistics.median(values):.0f}" for values in per_second.values())])
    return table(columns, lines)


def ratio_cell(ours: list[float], theirs: list[float]) -> str:
    """The median ratio of rounds, with the smallest and the largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def to_markdown(capacity: list[Row], throughput: list[Row]) -> str:
    """Both tables, and what they show."""
    first, asked = capacity[0], throughput[0]
    rounds = len({row["round"] for row in throughput})
    parts = [
        "# Serving, measured",
        "`ham-hf serve` on two cores of a CPU, one thread a server. `capacity.py` and `throughput.py` make the rows, "
        "in the environment of `make test-vllm`, and `report.py` writes this page from them. How to serve: "
        "[ham_hf/serving](../../ham_hf/serving/README.md).",
        "## Requests at once",
        capacity_table(capacity),
        f"Of {first['requests']} requests with prompts of {first['prompt']} tokens and answers of {first['answer']}, "
        f"all queued at the start, in a pool of {first['pool'] / 2**20:.0f} MiB: the mean number that ran while "
        "others waited, from the end of the first answer on. HAM is `ham-tiny` asked for a `kv_usage`; Llama has its "
        "shape and random weights, and vLLM's own pages; both in float32, without a prefix cache, "
        f'{first["chunk"]} tokens a step. "Held" counts the tokens that running requests hold, over those that they '
        "have seen. The states of the RNN, pages that are not full and what is reserved for a step are part of the "
        "pool. Preempted requests start again.",
        "## Tokens per second of CPU",
        throughput_table(throughput),
        f"Prompts of {asked['prompt']} tokens, answers of {asked['answer']}; HAM is `ham-tiny` at `kv_usage` "
        f"{asked['kv_usage']}, Llama has its shape. All servers run at once, on one thread each, and are asked in "
        "turn; CPU time is that of all processes of a server, where vLLM's worker is in the process of its engine "
        f"(`VLLM_ENABLE_V1_MULTIPROCESSING=0`). Medians of {rounds} rounds; in brackets the smallest "
        "and the largest ratio of a round. `transformers serve` handles one request after another. The model is "
        "small, so what a server does besides the model weighs more than with a large one. The HAM computes in "
        "PyTorch's operations, vLLM's Llama in kernels of its own. Other work ran on the machine meanwhile: tokens "
        "per second show it, CPU time hardly.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes serving.md, and prints it."""
    report = to_markdown(read_rows(ROOM / "capacity.jsonl"), read_rows(ROOM / "throughput.jsonl"))
    print(report)
    write_whole(ROOM / "serving.md", report)


if __name__ == "__main__":
    main()
