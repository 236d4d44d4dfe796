# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`make gpu-check`: everything that needs an NVIDIA GPU, in one command and a bounded time, with a dated report.

It runs the kernels' tests on the GPU, compares a whole model with the CPU, and runs every benchmark, each in a process
of its own with a share of the time. If a stage fails or runs out of time, the report says so, the other stages still
run, and the exit status is 1. A benchmark that misses its target is a result, not a failure. Without an NVIDIA GPU it
prints that and exits with 0.

It needs Python with PyTorch, Triton, Transformers and pytest, nothing installed, and no network. Without pytest the
tests do not run and count as not passed; without flash-linear-attention the benchmarks compare with this repository's
own Gated DeltaNet. It is enough to unpack the missing wheels into a folder that PYTHONPATH names.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import timing
import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS, PARITY = "tests", "parity"
# Largest shares of the time for the tests and the comparison; the benchmarks divide the rest.
TEST_SHARE, PARITY_SHARE = 0.3, 0.1
# Seconds that a stage has to write its results when its time is up.
GRACE = 5
# Expected seconds of each benchmark's quick form, by which they divide the rest. With an H200 and 16 cores the tests
# took 120, the comparison 40, the start of a process 8, and each tile shape of a kernel about 1 to compile and
# measure: the delta rule has 26 forward and 34 backward, fla some 70. Compiling FlexAttention and its mask takes a
# minute. With less time all get less, and keep the rows that they finished.
SECONDS = {
    "bench_compact_kept": 10,
    "bench_decode_step": 70,
    "bench_gated_delta_rule": 110,
    "bench_mixer": 110,
    "bench_ragged_decode_attention": 10,
    "bench_sparse_prefix_attention": 130,
}
USUAL_SECONDS = 30
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention")
# Modules that the tests and comparisons need, and the wheels that bring them. With xdist the tests run in parallel.
WHEELS = {
    "pytest": "pytest, pluggy, iniconfig, packaging, pygments, pytest-xdist and execnet",
    "fla": "flash-linear-attention, fla-core and einops",
}


def environment(commit: str | None = None) -> dict[str, str]:
    """GPU, driver, commit and versions on which the results depend; without `commit`, git's for this folder."""
    found = {"gpu": torch.cuda.get_device_name(), "driver": "unknown", "commit": "unknown"}
    commands = {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
    }
    for name, command in commands.items():
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            continue  # the machine may have no git, and the folder no history
    found["commit"] = commit or found["commit"]
    found |= {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def run_stage(name: str, command: list[str], seconds: float, **variables: str) -> dict[str, Any]:
    """Runs one command with this repository's packages importable; stops it and its children when its time is up."""
    print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(HERE), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"} | variables
    env.pop("TRITON_INTERPRET", None)
    begin = time.monotonic()
    # A command that a shell runs in the background inherits an ignored SIGINT.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, preexec_fn=heeding)
    try:
        status = process.wait(max(seconds, 1))
        outcome = "passed" if status == 0 else f"failed, exit status {status}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # on SIGINT pytest reports the tests that it has run
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        outcome = f"stopped after {seconds:.0f} s"
    took = time.monotonic() - begin
    print(f"== {name}: {outcome}, {took:.0f} s", flush=True)
    return {"stage": name, "outcome": outcome, "seconds": round(took, 1)}


def missing_wheels(module: str) -> str | None:
    """Names the wheels to bring to this machine for a missing module; `None` if it is installed."""
    if importlib.util.find_spec(module):
        return None
    return f"{module} is missing; carry the wheels of {WHEELS[module]}"


def run_tests(seconds: float, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the kernels' tests, untuned: measuring tile shapes for every test's shape would take minutes."""
    if missing := missing_wheels("pytest"):
        return {"stage": "tests on the GPU", "outcome": f"not run: {missing}", "seconds": 0.0}
    report = folder / "tests.xml"
    # Without the settings in pyproject.toml, which need a newer pytest than a bare machine may have.
    command = [sys.executable, "-m", "pytest", "tests/ham_kernels", "-q", "-c", os.devnull, "--rootdir", str(ROOT)]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Tests that are slow under the interpreter are fast on a GPU, except compiling every case, which needs no GPU.
    command += ["-k", "not test_every_case_fits_the_chips"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    # One thread per process: with as many threads as cores, parallel tests took 190 s on 16 cores.
    stage = run_stage("tests on the GPU", command, seconds, HAM_KERNELS_TUNING="0", OMP_NUM_THREADS="1")
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        stage["outcome"] += " (" + ", ".join(f"{count} {name}" for name, count in counts.items()) + ")"
        stage["failed"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    return stage


def run_parity(seconds: float, folder: pathlib.Path) -> dict[str, Any]:
    """Compares a whole model with the CPU, untuned like the tests."""
    output = folder / "parity.json"
    command = [sys.executable, str(HERE / "parity.py"), "--json", str(output)]
    stage = run_stage("model, CPU against GPU", command, seconds, HAM_KERNELS_TUNING="0")
    stage["rows"] = json.loads(output.read_text()) if output.exists() else []
    return stage


def write_rows(rows: Iterator[dict[str, Any]], file: str) -> None:
    """Writes each row as soon as it is measured."""
    with open(file, "w") as output:
        for row in rows:
            output.write(json.dumps(row) + "\n")
            output.flush()


def run_benchmark(name: str, seconds: float, quick: bool, folder: pathlib.Path) -> dict[str, Any]:
    """Runs one benchmark; keeps the rows that it finished before it failed or was stopped."""
    output = folder / f"{name}.jsonl"
    program = f"import {name}, gpu_check; gpu_check.write_rows({name}.run({quick}), {str(output)!r})"
    stage = run_stage(name, [sys.executable, "-c", program], seconds)
    stage["rows"] = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    print(timing.markdown(stage["rows"]), flush=True)
    return stage


def stage_names() -> list[str]:
    """All stages, in order."""
    return [TESTS, PARITY, *sorted(file.stem for file in HERE.glob("bench_*.py"))]


def run_all(budget: float, quick: bool, chosen: list[str]) -> list[dict[str, Any]]:
    """Runs the stages `chosen`, within `budget` seconds."""
    end = time.monotonic() + budget
    names = [name for name in stage_names() if name in chosen and name not in (TESTS, PARITY)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        stages = []
        if TESTS in chosen:
            stages.append(run_tests(TEST_SHARE * budget, folder))
        if PARITY in chosen:
            stages.append(run_parity(PARITY_SHARE * budget, folder))
        if names and (missing := missing_wheels("fla")):
            print(f"\nNo comparison with flash-linear-attention: {missing}", flush=True)
        expected = [SECONDS.get(name, USUAL_SECONDS) for name in names]
        for i, name in enumerate(names):
            share = (end - time.monotonic()) * expected[i] / sum(expected[i:])
            stages.append(run_benchmark(name, share, quick, folder))
    return stages


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# GPU check, {report['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["environment"].items()]
    lines += ["", "| stage | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {s['stage']} | {s['outcome']} | {s['seconds']:.0f} |" for s in report["stages"]]
    for stage in report["stages"]:
        if stage.get("failed"):
            lines += ["", f"## {stage['stage']}: failed", ""] + [f"- `{name}`" for name in stage["failed"]]
        if stage.get("rows"):
            lines += ["", f"## {stage['stage']}", "", timing.markdown(stage["rows"])]
    return "\n".join(lines) + "\n"


def write_report(stages: list[dict[str, Any]], folder: pathlib.Path, commit: str | None) -> pathlib.Path:
    """Writes the report as JSON and as Markdown, named by date and GPU; returns the second."""
    now = datetime.datetime.now(datetime.UTC)
    report = {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "environment": environment(commit), "stages": stages}
    gpu = re.sub(r"[^a-z0-9]+", "-", report["environment"]["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{now:%Y-%m-%d-%H%M}-{gpu}.md"
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    file.write_text(as_markdown(report))
    return file


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=700, help="seconds for everything (default 700)")
    parser.add_argument("--full", action="store_true", help="all shapes of the benchmarks; give a larger budget")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results", help="the folder of the reports")
    parser.add_argument("--commit", help="the commit, where git does not know it (default: what git says)")
    parser.add_argument("--stages", nargs="+", choices=stage_names(), default=stage_names(), help="only these")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("No NVIDIA GPU is visible to PyTorch: there is nothing to check here.")
        return
    stages = run_all(arguments.budget, not arguments.full, arguments.stages)
    print(f"\nWrote {write_report(stages, arguments.out, arguments.commit)}")
    for stage in stages:
        print(f"{stage['stage']}: {stage['outcome']}")
    if not all(stage["outcome"].startswith("passed") for stage in stages):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
