# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Held-out loss and cache bytes of a checkpoint against the fraction of tokens that it keeps, as table and plot.

Usage: ``python -m ham_hf.evaluation.usage --model DIR --corpus DIR --output DIR``
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..files import write_whole
from ..modeling_ham import HAMForCausalLM
from ..training.documents import SPLIT_FILES, read_documents
from .markdown import table

USAGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# Part of a window that is repeated at its end to measure recall.
REPEATED = 1 / 8


def held_out_windows(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, context: int, per_document: int
) -> list[torch.Tensor]:
    """`[1, context]` windows of held-out text: the first `per_document` of each document that do not overlap."""
    windows = []
    for document in read_documents(corpus / SPLIT_FILES["held_out"]):
        tokens = [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(document.text).ids]
        starts = range(0, len(tokens) - context + 1, context)
        windows += [torch.tensor([tokens[start : start + context]]) for start in starts[:per_document]]
    if not windows:
        raise ValueError(f"`context` {context} is longer than every held-out document in {corpus}.")
    return windows


def repeated_size(length: int) -> int:
    """Number of tokens at the end of a window of `length` that `with_repeated_end` replaces."""
    return int(length * REPEATED)


def with_repeated_end(tokens: torch.Tensor) -> torch.Tensor:
    """`tokens` `[B, T]` with a copy of the first eighth in place of the last one."""
    size = repeated_size(tokens.shape[1])
    return torch.cat([tokens[:, :-size], tokens[:, :size]], dim=1)


def recall_loss(model: HAMForCausalLM, tokens: torch.Tensor, kv_usage: float | None) -> float:
    """Loss (nats per token) at the end of `tokens` `[1, T]`, after replacing the end by a copy of the first eighth."""
    size, again = repeated_size(tokens.shape[1]), with_repeated_end(tokens)
    # The first token of the second copy cannot be predicted.
    logits = model(input_ids=again, use_cache=False, kv_usage=kv_usage, logits_to_keep=size).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), again[0, 1 - size :]).item()


@torch.no_grad()
def measure_usage(model: HAMForCausalLM, windows: list[torch.Tensor], kv_usage: float | None) -> dict:
    """Losses (nats per token), usage and cache bytes at a wanted usage; `None` uses the learned thresholds."""
    losses, recall_losses, usages, caches = [], [], [], []
    for tokens in tqdm(windows, desc=f"usage {kv_usage}", leave=False):
        recall_losses.append(recall_loss(model, tokens, kv_usage))
        outputs = model(input_ids=tokens, labels=tokens, use_cache=True, kv_usage=kv_usage)
        losses.append(outputs.loss.item())
        usages.append(outputs.cache.kv_usage().mean().item())
        caches.append(outputs.cache)
    return {
        "kv_usage": kv_usage,
        "usage": statistics.mean(usages),
        "loss": statistics.mean(losses),
        "losses": losses,
        "recall_loss": statistics.mean(recall_losses),
        "kv_bytes": round(statistics.mean(cache.memory_bytes() - cache.state_bytes() for cache in caches)),
        "full_kv_bytes": caches[0].full_kv_bytes(),
        "state_bytes": caches[0].state_bytes(),
    }


def to_markdown(results: list[dict], context: int) -> str:
    """A row per usage; the difference is paired window by window with everything kept, with its standard error."""
    everything = next(x for x in results if x["kv_usage"] == 1.0)["losses"]
    columns = [
        "asked for",
        "kept",
        "loss (nats/token)",
        "above everything kept",
        "second time",
        "cache KiB",
        "full cache KiB",
    ]
    rows = []
    for x in results:
        differences = [a - b for a, b in zip(x["losses"], everything, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        rows.append(
            [
                "learned" if x["kv_usage"] is None else f"{x['kv_usage']:.0%}",
                f"{x['usage']:.1%}",
                f"{x['loss']:.4f}",
                f"{statistics.mean(differences):+.4f} ± {error:.4f}",
                f"{x['recall_loss']:.3f}",
                f"{x['kv_bytes'] / 1024:.0f}",
                f"{x['full_kv_bytes'] / 1024:.0f}",
            ]
        )
    state_kib = results[0]["state_bytes"] / 1024
    tail = (
        f"{len(everything)} windows of {context} tokens; the states of fixed size add {state_kib:.0f} KiB. "
        f"Second time: over the last {int(context * REPEATED)} tokens of a window, when they repeat its first ones."
    )
    return f"{table(columns, rows)}\n\n{tail}\n"


def plot(results: list[dict], path: Path) -> None:
    """Losses and bytes against usage as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = sorted((x for x in results if x["kv_usage"] is not None), key=lambda x: x["usage"])
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    usage = [100 * x["usage"] for x in asked]
    left.plot(usage, [x["loss"] for x in asked], "o-", color="#b5432e")
    left.set(xlabel="tokens kept (%)", ylabel="held-out loss (nats/token)", title="Accuracy against memory")
    middle.plot(usage, [x["recall_loss"] for x in asked], "o-", color="#7a3eb5")
    middle.set(xlabel="tokens kept (%)", ylabel="loss, second time (nats/token)", title="A passage seen before")
    right.plot(usage, [x["kv_bytes"] / 1024 for x in asked], "o-", color="#2e6db5", label="HAMCache")
    right.axhline(asked[0]["full_kv_bytes"] / 1024, color="grey", linestyle="--", label="full KV cache")
    right.set(xlabel="tokens kept (%)", ylabel="KiB held", title="Bytes of kept tokens", ylim=(0, None))
    right.legend()
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures a checkpoint and writes `usage.json`, `usage.md` and `usage.png`."""
    parser = argparse.ArgumentParser(description="Held-out loss and cache bytes against the fraction of tokens kept.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a calibrated HAM checkpoint")
    help_text = "folder with held-out documents, see ham_hf.training.documents"
    parser.add_argument("--corpus", type=Path, required=True, help=help_text)
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the plot")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window (default %(default)s)")
    parser.add_argument("--per-document", type=int, default=12, help="windows per document (default %(default)s)")
    arguments = parser.parse_args()
    model = HAMForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = held_out_windows(arguments.corpus, tokenizer, arguments.context, arguments.per_document)
    results = [measure_usage(model, windows, usage) for usage in (*USAGES, None)]
    report = to_markdown(results, arguments.context)
    print(report)
    arguments.output.mkdir(parents=True, exist_ok=True)
    payload = json.dumps({"context": arguments.context, "results": results}, indent=1) + "\n"
    write_whole(arguments.output / "usage.json", payload)
    write_whole(arguments.output / "usage.md", report)
    plot(results, arguments.output / "usage.png")


if __name__ == "__main__":
    main()
