# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The tables of serving: their numbers are those of the rows, and the rows are compared at equal bytes and shape."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ham_hf import HAMForCausalLM
from ham_hf.files import read_rows
from model_cards.serving import arms, report

ROOM = Path(report.__file__).parent


def capacity_row(arm, running, **more):
    row = {"arm": arm, "kv_usage": None, "pool": 2**20, "prompt": 10, "answer": 5, "requests": 9, "chunk": 4}
    return row | {"running": running, "held": 1.0, "reserved": 2, "preemptions": 0} | more


def throughput_row(arm, clients, round_number, cpu_seconds):
    row = {"arm": arm, "clients": clients, "round": round_number, "tokens": 100, "seconds": 2.0}
    return row | {"cpu_seconds": cpu_seconds, "prompt": 10, "answer": 5, "kv_usage": 0.25}


def test_requests_at_once_are_compared_with_the_llama():
    rows = [capacity_row("llama", 4.0), capacity_row("ham", 11.0, kv_usage=0.25, held=0.26, preemptions=3)]
    lines = report.capacity_table(rows).splitlines()
    assert lines[2] == "| Llama |  | 100% | 4.0 | 1.00 | 2 | 0 of 9 |"
    assert lines[3] == "| HAM | 25% | 26% | 11.0 | 2.75 | 2 | 3 of 9 |"


def test_ratios_are_those_of_rounds():
    seconds = {report.OURS: (1.0, 2.0, 4.0), report.THEIRS: (3.0, 4.0, 4.0), report.LLAMA: (0.5, 0.5, 0.5)}
    rows = [throughput_row(arm, 8, i, x) for arm, own in seconds.items() for i, x in reversed(list(enumerate(own)))]
    line = report.throughput_table(rows).splitlines()[2]
    assert line == "| 8 | 50 | 25 | 200 | 2.00 (1.00 to 3.00) | 0.25 (0.12 to 0.50) | 50 | 50 | 50 |"


def test_the_llama_has_the_shape_of_the_ham(tmp_path):
    ham = HAMForCausalLM.from_pretrained(arms.HAM, dtype=torch.float32)
    llama = AutoModelForCausalLM.from_pretrained(arms.save_llama(tmp_path))
    assert llama.config.model_type == "llama"
    for i in range(ham.config.num_hidden_layers):
        attention, mixer = llama.model.layers[i].self_attn, ham.model.layers[i].mixer
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(attention, name).weight.shape == getattr(mixer, name).weight.shape
        assert llama.model.layers[i].mlp.up_proj.weight.shape == ham.model.layers[i].mlp.up_proj.weight.shape


def test_prompts_differ_and_have_the_length():
    made = arms.prompts(8, 40)
    assert {len(x) for x in made} == {40}
    assert len({tuple(x) for x in made}) == 8
    with pytest.raises(ValueError, match="`length` must be from 1 to 1024, got 2000"):
        arms.prompts(1, 2000)


def test_the_page_is_what_its_rows_say():
    capacity, throughput = read_rows(ROOM / "capacity.jsonl"), read_rows(ROOM / "throughput.jsonl")
    assert (ROOM / "serving.md").read_text() == report.to_markdown(capacity, throughput)
    commits = {row["commit"] for row in capacity + throughput}
    assert all(len(commit) == 40 for commit in commits), "measured with changed code"


def test_the_guide_tells_the_measured_ratios():
    guide = " ".join((ROOM.parents[1] / "ham_hf/serving/README.md").read_text().split())
    running = {(x["arm"], x["kv_usage"]): x["running"] for x in read_rows(ROOM / "capacity.jsonl")}
    assert "four times as many as vLLM runs of a Llama when `kv_usage` is 0.25" in guide
    assert round(running["ham", 0.25] / running["llama", None]) == 4
    lines = report.throughput_table(read_rows(ROOM / "throughput.jsonl")).splitlines()[2:]
    median = {cells[1].strip(): float(cells[5].split()[0]) for cells in (line.split("|") for line in lines)}
    many, one = re.search(r"makes ([\d.]+) times the tokens .* at one client ([\d.]+) times", guide).groups()
    assert (many, one) == (f"{median['8']:.1f}", f"{median['1']:.1f}")


def test_the_targets_are_met():
    """At 25% held 2.5 times the requests of the Llama; at 8 clients twice the tokens of `transformers serve`."""
    running = {(x["arm"], x["kv_usage"]): x["running"] for x in read_rows(ROOM / "capacity.jsonl")}
    assert running["ham", 0.25] >= 2.5 * running["llama", None]
    rates = {
        (x["arm"], x["round"]): x["tokens"] / x["cpu_seconds"]
        for x in read_rows(ROOM / "throughput.jsonl")
        if x["clients"] == 8
    }
    assert all(rate >= 2 * rates[report.THEIRS, n] for (arm, n), rate in rates.items() if arm == report.OURS)
