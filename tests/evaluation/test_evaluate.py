# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""An interrupted evaluation goes on as if nothing had happened, and its tables tell what was measured."""

import pytest
import torch

from ham_hf import HAMForCausalLM
from ham_hf.evaluation import calibrate, evaluate
from ham_hf.evaluation.evaluate import Evaluation, setting
from ham_hf.evaluation.record import fingerprint
from ham_hf.evaluation.report import parts_to_markdown, plot, setting_name, to_markdown
from ham_hf.files import read_rows

MEMORIES = [{"kv_usage": 1.0}, {"kv_usage": 0.25}, {"threshold": 0.5}, {"threshold": 0.0, "kv_budget": 9}, {}]


@pytest.fixture(scope="module")
def windows():
    return torch.randint(1, 97, (3, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(tiny_config, windows):
    torch.manual_seed(0)
    model = HAMForCausalLM(tiny_config()).eval()
    calibrate(model, [windows])
    return model


def test_an_interrupted_evaluation_goes_on(model, windows, tmp_path, monkeypatch):
    unbroken = Evaluation(model, windows, tmp_path / "a.jsonl").results(MEMORIES)
    measure, calls = evaluate.window_figures, []

    def interrupted(*arguments, **memory):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(memory)
        return measure(*arguments, **memory)

    monkeypatch.setattr(evaluate, "window_figures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(model, windows, tmp_path / "b.jsonl").results(MEMORIES)
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(b'{"memory": {"kv_us')  # a row that was being written
    monkeypatch.setattr(evaluate, "window_figures", measure)
    assert len(read_rows(tmp_path / "b.jsonl")) == 1 + 4
    again = Evaluation(model, windows, tmp_path / "b.jsonl")
    assert again.missing(MEMORIES[1]) == [1, 2]
    assert again.results(MEMORIES) == unbroken
    rows = read_rows(tmp_path / "b.jsonl")[1:]
    assert len(rows) == len(MEMORIES) * len(windows), "nothing was measured twice"
    monkeypatch.setattr(evaluate, "window_figures", None)
    assert Evaluation(model, windows, tmp_path / "b.jsonl").results(MEMORIES) == unbroken


def test_batches_of_any_size_give_the_same_results(model, windows, tmp_path):
    one, two = (Evaluation(model, windows, tmp_path / str(size), size).results(MEMORIES[:2]) for size in (1, 2))
    for x, y in zip(one, two, strict=True):
        assert x["losses"] == pytest.approx(y["losses"], rel=1e-5)
        assert x["usage"] == y["usage"]


def test_a_record_of_something_else_is_refused(model, windows, tmp_path, tiny_config):
    record = tmp_path / "x.jsonl"
    Evaluation(model, windows, record).measure({})
    with pytest.raises(ValueError, match="evaluation of another text: give a new folder"):
        Evaluation(model, windows + 1, record)
    with pytest.raises(ValueError, match="another text, windows"):
        Evaluation(model, windows[:2], record)
    other = HAMForCausalLM(tiny_config()).eval()
    with pytest.raises(ValueError, match="another model"):
        Evaluation(other, windows, record)


def test_a_fingerprint_sees_weights_buffers_and_configuration(model):
    first = fingerprint(model)
    assert fingerprint(model) == first
    model.model.layers[1].mixer.score_quantiles[0, 0] += 1
    second = fingerprint(model)
    model.config.attention_window = 3
    third = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert len({first, second, third, fingerprint(model)}) == 4


def test_tables_tell_what_was_measured(model, windows, tmp_path):
    results = Evaluation(model, windows, tmp_path / "x").results(MEMORIES)
    assert [setting_name(x) for x in results] == ["100%", "25%", "threshold 0.5", "threshold 0, budget 9", "learned"]
    text = to_markdown(results, 64)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][:4] == ["asked for", "kept", "loss (nats/token)", "perplexity"]
    assert rows[1][4] == "+0.0000 ± 0.0000", "everything kept is compared with itself"
    quarter, base = results[1], results[0]
    differences = torch.tensor(quarter["losses"]) - torch.tensor(base["losses"])
    assert rows[2][1:4] == [
        f"{quarter['usage']:.1%}",
        f"{quarter['loss']:.4f}",
        f"{torch.tensor(quarter['loss']).exp():.2f}",
    ]
    assert rows[2][4] == f"{differences.mean():+.4f} ± {differences.std() / 3**0.5:.4f}"
    assert "3 windows of 64 tokens" in text
    parts = parts_to_markdown(results).splitlines()
    assert parts[0].startswith("| asked for | first | repeated | 1/8 |")
    assert f"| {quarter['losses_by_part'][-1]:.3f} |" in parts[3]
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_every_setting_has_a_name_of_its_own():
    names = [setting_name(setting({"kv_usage": x}) | {"usage": x}) for x in (1.0, 0.25, 0.4531, 0.4532, 0.0)]
    assert names == ["100%", "25%", "45.31%", "45.32%", "0%"]


def test_a_window_is_held_beyond_what_is_kept(tiny_config, windows, tmp_path):
    model = HAMForCausalLM(tiny_config(attention_window=8)).eval()
    results = Evaluation(model, windows, tmp_path / "x").results([{"threshold": 0.0}, {"threshold": 1.01}])
    assert "| asked for | kept | held |" in to_markdown(results, 64)
    assert "| threshold 1.01 | 0.0% | 10.9% |" in to_markdown(results, 64)


def test_a_model_without_routers_has_fewer_columns():
    figures = {"usage": None, "held": None, "loss": 1.0, "losses": [1.0], "recall_loss": 2.0, "first_loss": 1.0}
    figures |= {"repeated_loss": None, "losses_by_part": [1.0] * 8, "kv_bytes": 2048, "full_kv_bytes": None}
    text = to_markdown([setting({}) | figures | {"state_bytes": 0}], 64)
    assert "| asked for | loss (nats/token) | perplexity | second time | cache KiB |" in text
    assert "| the model | 1.0000 | 2.72 | 2.000 | 2 |" in text
    without = to_markdown([setting({}) | figures | {"kv_bytes": None, "state_bytes": None}], 64)
    assert "| 2.000 |  |" in without
    assert "states" not in without
