# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compares a model on a GPU, where it runs on the kernels, with the same model on the CPU, where it runs on PyTorch.

The model is ham-tiny, the checkpoint in the package: it is trained, so its scores spread and its text has a meaning.
"""

import argparse
import itertools
import json
import pathlib
from typing import Any

import timing
import torch
from transformers import AutoTokenizer

import ham_hf
from ham_hf import HAMForCausalLM, attention_ham, delta_rule_ham, ops_ham, prefix_attention_ham

CHECKPOINT = pathlib.Path(ham_hf.__file__).parent / "checkpoints" / "ham-tiny"
OPS = (
    "gated_delta_rule_with_prediction",
    "compact_kept",
    "sparse_prefix_attention",
    "ragged_decode_attention",
    "decode_update",
    "decode_mix_append",
)
# Thresholds and numbers of rows. Two rows are padded; one has no mask, as the kernels for a single token require.
CASES = ((0.0, 1), (0.4, 2), (0.5, 1), (0.6, 2), (2.0, 2))
# Absolute, in float32. On a CPU, of logits up to 19, float32 is 1.4e-5 from float64.
LOGITS = 1e-4
# Devices round differently, so a score nearer to the threshold than this may fall on either side: on a CPU float32 is
# 8e-6 from float64.
MARGIN = 2e-5
TEXTS = (
    "Once upon a time there was a small house at the edge of the wood. In it lived a girl who kept three keys: a red "
    "key, a blue key and a green key. The red key opened the door, the blue key opened the box, and nobody knew what "
    "the green key opened. One day the girl lost the blue key and asked the fox, the owl and the old man about it.",
    "The code of the garden gate is 4817.",
)


def tokenized(length: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """One or two rows of at most `length` tokens, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    return dict(tokenizer(list(TEXTS[:rows]), return_tensors="pt", padding=True, truncation=True, max_length=length))


def turns(model: HAMForCausalLM, rows: dict[str, torch.Tensor], threshold: float) -> dict[str, Any]:
    """Logits `[n, V]` of real tokens, scores and each layer's kept tokens, after two long and three short calls."""
    ids, mask = (rows[name].to(model.device) for name in ("input_ids", "attention_mask"))
    length = ids.shape[1]
    cache, logits, scores = None, [], []
    with torch.no_grad():
        for begin, end in itertools.pairwise((0, length // 2, length - 7, length - 2, length - 1, length)):
            out = model(
                ids[:, begin:end],
                attention_mask=None if len(ids) == 1 else mask[:, :end],
                cache=cache,
                use_cache=True,
                threshold=threshold,
                output_routing_scores=True,
            )
            cache = out.cache
            logits.append(out.logits)
            scores.append(torch.stack(out.routing_scores))
    stored = [layer.store.tokens() for layer in cache.layers]
    return {
        "logits": torch.cat(logits, 1)[mask.bool()].float().cpu(),
        "scores": torch.cat(scores, 2)[:, mask.bool()].flatten().cpu(),
        "kept": [torch.stack([x.streams, x.positions.long()], 1).tolist() for x in stored],
    }


def clear_of_scores(model: HAMForCausalLM, rows: dict[str, torch.Tensor], threshold: float) -> tuple[float, dict]:
    """Finds a threshold near the given one, far from every score; returns it and the turns with it."""
    result = turns(model, rows, threshold)
    for _ in range(8):
        scores = result["scores"]
        if (scores - threshold).abs().min() > MARGIN:
            break
        # The middle of the widest gap nearby. A new threshold moves the scores of later layers, hence the loop.
        near = scores[(scores - threshold).abs() < 0.02].sort().values
        widest = near.diff().argmax()
        threshold = ((near[widest] + near[widest + 1]) / 2).item()
        result = turns(model, rows, threshold)
    return threshold, result


def row(what: str, error: float, allowed: float) -> dict[str, Any]:
    """One line of the table."""
    return {"what": what, "error": error, "allowed": allowed, "meets": error <= allowed}


def exact_rows(device: str, length: int, new_tokens: int) -> list[dict[str, Any]]:
    """Rows for logits, kept sets and text in float32, and the number of calls of each kernel."""
    cpu, other = (HAMForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval() for _ in range(2))
    other.to(device)
    table = []
    choose, calls = ops_ham.kernel_for, dict.fromkeys(OPS, 0)

    def counted(op: str, *tensors: torch.Tensor) -> Any:
        kernel = choose(op, *tensors)
        calls[op] = calls.get(op, 0) + (kernel is not None)
        return kernel

    for module in (ops_ham, delta_rule_ham, attention_ham, prefix_attention_ham):
        module.kernel_for = counted
    try:
        for wanted, number in CASES:
            rows = tokenized(length, number)
            threshold, expected = clear_of_scores(cpu, rows, wanted)
            actual = turns(other, rows, threshold)
            error = (actual["logits"] - expected["logits"]).abs().max().item()
            table.append(row(f"logits, threshold {threshold:.4f}", error, LOGITS))
            pairs = zip(actual["kept"], expected["kept"], strict=True)
            wrong = sum(len(set(map(tuple, a)) ^ set(map(tuple, b))) for a, b in pairs)
            kept = sum(map(len, expected["kept"]))
            table.append(row(f"kept tokens that differ, of {kept}, threshold {threshold:.4f}", wrong, 0))
            texts = [
                model.generate(
                    **{name: x.to(model.device) for name, x in rows.items()},
                    threshold=threshold,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                ).cpu()
                for model in (cpu, other)
            ]
            wrong = int((texts[0] != texts[1]).sum()) if texts[0].shape == texts[1].shape else texts[0].numel()
            table.append(row(f"tokens of the text that differ, threshold {threshold:.4f}", wrong, 0))
    finally:
        for module in (ops_ham, delta_rule_ham, attention_ham, prefix_attention_ham):
            module.kernel_for = choose
    if device != "cpu":
        table += [row(f"calls of PyTorch instead of {op}", float(not count), 0) for op, count in calls.items()]
    return table


def rounded_rows(device: str, length: int) -> list[dict[str, Any]]:
    """Row for the error of the device's bfloat16 logits against float32, beside that of the CPU's bfloat16."""
    rows, table = tokenized(length), []
    models = [
        HAMForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype).eval().to(where)
        for dtype, where in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.bfloat16, device))
    ]
    for threshold in (0.0, 2.0):  # where rounding cannot change what is kept
        exact, baseline, actual = (turns(model, rows, threshold)["logits"] for model in models)
        allowed = 2 * (baseline - exact).abs().max().item()
        error = (actual - exact).abs().max().item()
        table.append(row(f"bfloat16 logits, threshold {threshold}", error, allowed))
    return table


def run(device: str = "cuda", length: int = 160, new_tokens: int = 32) -> list[dict[str, Any]]:
    """The whole table."""
    return exact_rows(device, length, new_tokens) + rounded_rows(device, length)


def main() -> None:
    """Prints the table; exits with 1 if a row is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No NVIDIA GPU: nothing to compare.")
        return
    table = run()
    print(timing.markdown(table))
    if arguments.json:
        arguments.json.write_text(json.dumps(table))
    if not all(r["meets"] for r in table):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
