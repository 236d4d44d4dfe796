# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Checks, without a GPU, that `make gpu-check` finds and reports faults."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from ham_hf.routing_ham import Retention

FOLDER = pathlib.Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the benchmarks importable, as it is for a script in it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def gpu_check(benchmarks):
    import gpu_check

    return gpu_check


@pytest.fixture
def timing(benchmarks):
    import timing

    return timing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No NVIDIA GPU" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_stage_passes_fails_or_is_stopped(gpu_check):
    def outcome(program, seconds=30):
        return gpu_check.run_stage("sample", [sys.executable, "-c", program], seconds)["outcome"]

    assert (
        outcome("import importlib.util as i; assert all(map(i.find_spec, ('ham_hf', 'ham_kernels', 'timing')))")
        == "passed"
    )  # importable from anywhere
    assert outcome("raise SystemExit(3)") == "failed, exit status 3"
    assert outcome("import time; time.sleep(60)", seconds=1).startswith("stopped")


def test_every_stage_runs_and_a_failure_makes_the_exit_status(gpu_check, monkeypatch, tmp_path, capsys):
    row = {"what": "forward", "against": "all", "target": 0.5, "ours_ms": 1.0, "other_ms": 4.0, "ratio": 0.25}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--commit", "carried"])
    monkeypatch.setenv("PATH", "")  # no git, no nvidia-smi

    def stage(name, failed=(), **more):
        outcome = "failed, exit status 1" if failed else "passed"
        return {"stage": name, "outcome": outcome, "seconds": 1.0, "failed": list(failed), **more}

    monkeypatch.setattr(gpu_check, "run_tests", lambda seconds, folder: stage("tests", ["test_ops::test_sum"]))
    parity = [{"what": "logits", "error": 1e-5, "allowed": 1e-4, "meets": True}]
    monkeypatch.setattr(gpu_check, "run_parity", lambda seconds, folder: stage("parity", rows=parity))
    seen = []

    def run_benchmark(name, seconds, quick, folder):
        seen.append(name)
        return stage(name, rows=[row | {"meets": False}])

    monkeypatch.setattr(gpu_check, "run_benchmark", run_benchmark)
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main()
    assert seen == sorted(file.stem for file in FOLDER.glob("bench_*.py"))
    report = json.loads(next(tmp_path.glob("*-nvidia-h100-80gb-hbm3.json")).read_text())
    assert report["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"gpu", "driver", "triton"} <= report["environment"].keys()
    assert report["environment"]["commit"] == "carried"
    text = next(tmp_path.glob("*.md")).read_text()
    assert "test_ops::test_sum" in text
    assert "| logits | 1e-05 | 0.0001 | yes |" in text
    monkeypatch.setattr(gpu_check, "run_tests", lambda seconds, folder: stage("tests"))
    gpu_check.main()  # a target that is missed is no failure
    assert "parity: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        ("raise RuntimeError", "failed, exit status 1"),
        ("os._exit(3)", "failed, exit status 3"),
        pytest.param("time.sleep(60)", "stopped after 20 s", marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_keeps_the_rows_it_had(ending, outcome, gpu_check, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = ("import os, time", "def run(quick):", "    yield {'what': 'first', 'quick': quick}", f"    {ending}")
    (tmp_path / "sample.py").write_text("\n".join(lines))
    stage = gpu_check.run_benchmark("sample", 20, True, tmp_path)
    assert stage["outcome"] == outcome
    assert stage["rows"] == [{"what": "first", "quick": True}]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_stage_that_is_stopped_may_write_down_what_it_has(gpu_check, tmp_path, handler):
    """Also in the background, where a shell makes the check ignore SIGINT."""
    program = f"import time\ntry: time.sleep(60)\nfinally: open({str(tmp_path / 'written')!r}, 'w').write('all')"
    before = signal.signal(signal.SIGINT, handler)
    try:
        stage = gpu_check.run_stage("sample", [sys.executable, "-c", program], 5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stage["outcome"] == "stopped after 5 s"
    assert (tmp_path / "written").read_text() == "all"


def test_what_is_missing_is_named(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        gpu_check, "run_parity", lambda *args: {"stage": "parity", "outcome": "passed", "seconds": 1.0}
    )
    monkeypatch.setattr(gpu_check, "run_benchmark", lambda *args: {"outcome": "passed", "seconds": args[1]})
    tests, _, *benchmarks = gpu_check.run_all(400, True, gpu_check.stage_names())
    assert tests["outcome"] == "not run: pytest is missing; carry the wheels of " + gpu_check.WHEELS["pytest"]
    assert "carry the wheels of flash-linear-attention" in capsys.readouterr().out
    # None of them took any time here, so the last gets all that is left.
    assert benchmarks[-1]["seconds"] == pytest.approx(400, abs=5)
    (only,) = gpu_check.run_all(400, True, ["bench_mixer"])
    assert only["seconds"] == pytest.approx(400, abs=5)


def test_every_benchmark_has_a_share_of_the_time(gpu_check):
    assert gpu_check.SECONDS.keys() == {file.stem for file in FOLDER.glob("bench_*.py")}


def test_the_table_of_attention_has_a_report_s_ratios(benchmarks):
    import summary

    rows = [
        {"what": f"{stage}, T=8192 u={usage} {pattern}", "ratio": ratio, "meets": ratio < 0.5}
        for stage, usage, pattern, ratio in (
            ("forward", "0.05", "uniform", 0.0991),
            ("forward", "1.00", "uniform", 0.6446),
            ("forward", "0.25", "clustered", 0.2),
            ("backward with compaction", "1.00", "uniform", 1.113),
        )
    ]
    report = {"stages": [{"stage": "tests"}, {"stage": "attention", "rows": rows}]}
    assert summary.attention_table(report).splitlines() == [
        "| tokens | pass | 5% kept | 100% kept |",
        "| --- | --- | --- | --- |",
        "| 8,192 | forward | 0.10 | **0.64** |",
        "| 8,192 | backward with compaction |  | **1.11** |",
    ]
    with pytest.raises(ValueError, match="no times of attention"):
        summary.attention_table({"stages": []})


def test_a_row_says_whether_the_target_is_met(timing):
    assert timing.row("a", "b", 0.5, 1.0, 2.0)["meets"]
    missed = timing.row("a", "b", 0.5, 1.01, 2.0)
    assert not missed["meets"]
    assert timing.markdown([missed]).endswith("| a | b | 0.5 | 1.01 | 2 | 0.505 | **no** |")


@pytest.mark.slow
def test_the_comparison_of_models_finds_a_wrong_kernel(benchmarks, monkeypatch):
    import parity

    assert all(r["meets"] for r in parity.run("cpu", length=48, new_tokens=3))

    # The second model of each comparison attends with a wrong scale.
    from ham_hf import attention_ham

    right = attention_ham.sparse_prefix_attention
    models = []

    def turns(model, *arguments, original=parity.turns):
        if model not in models:
            models.append(model)
        wrong = models.index(model) == 1
        kernel = (lambda *x, **options: right(*x, **options | {"scale": 0.1})) if wrong else right
        monkeypatch.setattr(attention_ham, "sparse_prefix_attention", kernel)
        return original(model, *arguments)

    monkeypatch.setattr(parity, "turns", turns)
    monkeypatch.setattr(parity, "CASES", ((0.0, 2),))
    failed = [r["what"] for r in parity.exact_rows("cpu", length=48, new_tokens=1) if not r["meets"]]
    assert failed[0].startswith("logits")


def test_the_benchmark_of_the_compaction_compares_the_same(device, benchmarks, monkeypatch):
    import bench_compact_kept as bench

    monkeypatch.setattr(bench, "DEVICE", device)
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "HEAD_DIM", 16)
    monkeypatch.setattr(bench, "LENGTHS", (8, 40))
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)

    def compared(functions):
        results = {name: function() for name, function in functions.items()}
        ours, other = results["ours"], results["pytorch"]
        if isinstance(other, list):  # forward: past a head's own count PyTorch's columns are other tokens
            (ours, before), kept = ours, results["ours"][1][:, -1].amax(1)
            assert [x.shape for x in ours] == [x.shape for x in other]
            least = int(before[:, -1].min())
            ours, other = ([x[:, :, :least] for x in side] for side in (ours, other))
            assert kept.max() > 0
            assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(bench, "median_ms", compared)
    rows = list(bench.run(True))
    assert len(rows) == 2 * 2 * 2
    keep = torch.ones(1, 10, 2, dtype=torch.bool)
    assert bench.bytes_moved(keep, 16) == (28 * 20 + 8 * 16 * 20, 18 * 20 + 4 * 16 * 40)


@pytest.mark.parametrize("there", [False, True])
def test_the_benchmark_of_the_delta_rule_compares_the_same(
    there, device, benchmarks, monkeypatch, arithmetic_as_on_a_gpu
):
    """With fla, which may refuse its backward, and without."""
    import bench_gated_delta_rule as bench

    monkeypatch.setattr(bench, "DEVICE", device)
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "HEAD_DIM", 16)
    monkeypatch.setattr(bench, "LENGTHS", (40,))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: there or None)

    def refusing(*inputs):
        if torch.is_grad_enabled():
            raise RuntimeError("refused")
        return bench.without_prediction(*inputs)

    def compared(functions):
        results = [function() for function in functions.values()]
        for x in results:
            torch.testing.assert_close(x, results[0], rtol=0.02, atol=0.01)
        return {name: 1.0 + i for i, name in enumerate(functions)}

    monkeypatch.setattr(bench, "fla", refusing)
    monkeypatch.setattr(bench, "median_ms", compared)
    rows = [(r["what"].split()[-1], r["against"].split("'")[0].split()[0], r["ours_ms"]) for r in bench.run(True)]
    ours = [("score", "our", 1.0), ("prediction", "our", 2.0)]
    assert rows == ([("score", "fla", 1.0), ("prediction", "fla", 2.0)] if there else []) + ours


def test_the_benchmark_of_the_mixer_compares_the_same(benchmarks, monkeypatch):
    """With everything kept, both sides compute the same; fla may refuse its backward."""
    import bench_mixer as bench

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "HEAD_DIM", 16)
    monkeypatch.setattr(bench, "LENGTH", 40)
    monkeypatch.setattr(bench, "USAGE", 1.0)

    def refusing(*inputs):
        if torch.is_grad_enabled():
            raise RuntimeError("refused")
        return bench.without_prediction(*inputs)

    def compared(functions):
        results = {name: function() for name, function in functions.items()}
        for other in results.values():
            if isinstance(other, torch.Tensor):
                torch.testing.assert_close(other, results["ham"], rtol=0.05, atol=0.02)
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(bench, "fla", refusing)
    monkeypatch.setattr(bench, "median_ms", compared)
    against = [(r["what"].split(",")[1].strip(), r["against"].split("'")[0].split()[0]) for r in bench.run(True)]
    assert against == [("forward", "fla"), ("forward", "our"), ("forward + backward", "our")]


def test_the_benchmark_keeps_the_fraction_it_says(benchmarks, monkeypatch):
    import bench_mixer as bench

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "HEAD_DIM", 16)
    mixer, hidden = bench.make_mixer(), torch.randn(1, 101, 32, dtype=torch.bfloat16)
    threshold = bench.threshold_for(mixer, hidden, 0.5)
    scores = mixer(hidden, None, bench.layout(hidden), Retention())[2]
    assert (scores >= threshold[:, None]).float().mean().item() == pytest.approx(0.5, abs=0.01)
