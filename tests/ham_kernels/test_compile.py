# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compiles every kernel at its shipped tile shapes for sm_80 and sm_90, without a GPU; none may spill."""

import importlib
import importlib.util
import json
import os
import pathlib
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import ham_kernels

FOLDER = pathlib.Path(__file__).parent
# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def shipped_cases():
    """The module `aot_cases.py`."""
    spec = importlib.util.spec_from_file_location("aot_cases", FOLDER / "aot_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES, HOPPER_CASES = (getattr(shipped_cases(), table) for table in ("CASES", "HOPPER_CASES"))


def compile_cases(*options):
    """The measurements that `aot_compile.py` prints, from a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "aot_compile.py"), *map(str, options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def kernels_of(op, results):
    return {r["kernel"] for r in results if r["op"] == op}


def problems(results):
    """One line per fault, with the op, the case and the kernel."""
    lines = []
    for r in results:
        where = f"{r['op']}, case {r['case']}, {r['kernel']}, sm_{r['arch']}"
        if "error" in r:
            lines.append(f"{where}: {r['error']}")
            continue
        if r["stack"] or r["local"]:
            lines.append(f"{where}: spills, stack {r['stack']}, local memory {r['local']}, {r['registers']} registers")
        if r["shared"] > SHARED_MEMORY[r["arch"]]:
            lines.append(f"{where}: {r['shared']} bytes of shared memory, at most {SHARED_MEMORY[r['arch']]}")
        if r["never_written"]:
            lines.append(
                f"{where}: reads registers that nothing wrote, which ptxas gets wrong: {r['never_written'][0]}"
            )
        if r["race"]:
            lines.append(f"{where}: stores what other threads may not have loaded yet: {r['race'][0]}")
        if r["transposed_product"]:
            lines.append(f"{where}: multiplies a transposed product, which Triton 3.4 to 3.7.0 miscompile on Hopper")
    return "\n".join(lines)


def test_every_kernel_has_a_case():
    modules = [importlib.import_module(x.name) for x in pkgutil.walk_packages(ham_kernels.__path__, "ham_kernels.")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert len(kernels) > 20
    # A kernel that is tuned wraps the function that has its name.
    compiled = [case["kernel"] for cases in CASES.values() for case in cases]
    assert {getattr(kernel, "base_fn", kernel).__name__ for kernel in compiled} == kernels


@pytest.mark.timeout(1200)  # all kernels in one process, a minute or two where nothing is cached
@pytest.mark.slow
def test_the_first_case_of_every_kernel_fits_a_hopper_chip():
    results = compile_cases("--quick", "--arch", 90)
    for op, cases in CASES.items():
        assert len(kernels_of(op, results)) == len({id(case["kernel"]) for case in cases}), op
    assert not problems(results), problems(results)


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_every_case_fits_the_chips(op):
    results = compile_cases(op)
    assert len(results) == 2 * len(CASES[op])
    assert not problems(results), problems(results)


@pytest.mark.slow
@pytest.mark.parametrize("op", HOPPER_CASES)
def test_tiles_for_hopper_fit_it(op):
    results = compile_cases(op, "--table", "HOPPER_CASES", "--arch", 90)
    assert len(results) == len(HOPPER_CASES[op])
    assert not problems(results), problems(results)


TUNED_CASES = """
from aot_cases import CASES as SHIPPED
from ham_kernels.gated_delta_rule.chunks import no_wider_than_a_head

CASES = {"gated_delta_rule": [
    case | {"constexprs": case["constexprs"] | tile.kwargs, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    for case in SHIPPED["gated_delta_rule"]
    if hasattr(case["kernel"], "tiles") and case["constexprs"]["K"] == WIDTH
    for tile in case["kernel"].tiles
    if "BV" not in tile.kwargs or tile in no_wider_than_a_head(case["kernel"].tiles, {}, K=WIDTH, V=WIDTH)
]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_no_tile_that_tuning_may_choose_is_compiled_wrongly(width, tmp_path):
    """All tiles of the gated delta rule; some may spill, which tuning measures. See `SMALLEST_TILE`."""
    (tmp_path / "cases.py").write_text(f"WIDTH = {width}\n{TUNED_CASES}")
    results = compile_cases("--cases", tmp_path / "cases.py", "--arch", 90)
    assert len(results) > 30
    wrong = [r for r in results if "error" in r or r["never_written"] or r["transposed_product"]]
    assert not wrong, wrong[:3]


SAMPLES = """
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def product_kernel(x, y, out, n, SIZE: tl.constexpr, TRANSPOSED: tl.constexpr):
    row = tl.arange(0, SIZE)
    square = row[:, None] * SIZE + row[None, :]
    a, b = tl.load(x + square), tl.load(y + square)
    acc = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    for i in range(0, n):
        acc += tl.dot(a, b)
    ds = (acc * 0.5).to(a.dtype)
    if TRANSPOSED == 1:
        tl.store(out + square, tl.dot(tl.trans(ds), b))
    elif TRANSPOSED == 2:
        tl.store(out + square, tl.dot(tl.trans(a), ds))
    else:
        tl.store(out + square, tl.trans(tl.dot(ds, b)))


def product(num_warps=4, **constexprs):
    return {
        "kernel": product_kernel,
        "signature": {"x": "*bf16", "y": "*bf16", "out": "*fp32", "n": "i32"},
        "constexprs": constexprs,
        "num_warps": num_warps,
        "num_stages": 1,
    }


CASES = {"product": [
    product(SIZE=64, TRANSPOSED=0),
    product(SIZE=64, TRANSPOSED=1),
    product(SIZE=64, TRANSPOSED=2),
    product(SIZE=64, TRANSPOSED=0, num_warps=1),
    product(SIZE=63, TRANSPOSED=0),
    product(SIZE=64),
]}
"""


@pytest.mark.slow
def test_the_harness_sees_spills_errors_and_transposed_products(tmp_path):
    file = tmp_path / "samples.py"
    file.write_text(SAMPLES)
    results = compile_cases("--cases", file)
    assert len(results) == 12
    case = {number: [r for r in results if r["case"] == number] for number in range(6)}
    assert not problems(case[0])
    assert all(r["registers"] > 16 for r in case[0])
    for r in case[1]:
        assert "transposed product" in problems([r])
    assert not problems(case[2])
    assert "spills" in problems(case[3][:1])
    for r in case[4]:
        assert "power of 2" in problems([r])
        assert "product, case 4, " in problems([r])
    for r in case[5]:
        assert "TRANSPOSED" in problems([r])


def test_too_much_shared_memory_is_a_problem():
    fitting = {"op": "x", "case": 0, "kernel": "x", "registers": 32, "stack": 0, "local": 0}
    fitting |= {"transposed_product": False, "never_written": [], "race": []}
    results = [fitting | {"arch": arch, "shared": 170_000} for arch in (80, 90)]
    assert "sm_80: 170000 bytes of shared memory" in problems(results)
    assert "sm_90" not in problems(results)


TTIR = """
    %place = tt.addptr %counts, %stream : !tt.ptr<i64>, i64 loc(#loc1)
    %count = tt.load %place : !tt.ptr<i64> loc(#loc2)
    {between}
    %next = arith.addi %count, %one : i64 loc(#loc3)
    %again = tt.addptr %counts, %stream : !tt.ptr<i64>, i64 loc(#loc4)
    tt.store {target}, %next : !tt.ptr<i64> loc(#loc5)
"""


@pytest.mark.parametrize(
    ("between", "target", "found"),
    [
        ("", "%again", 1),
        ("", "%counts", 1),
        ("gpu.barrier loc(#loc9)", "%again", 0),
        ("", "%other", 0),
        ("%x = tt.load %block : tensor<8x!tt.ptr<i64>> loc(#loc9)", "%other", 0),
    ],
)
def test_a_race_between_threads_is_found(between, target, found):
    spec = importlib.util.spec_from_file_location("aot_compile", FOLDER / "aot_compile.py")
    aot_compile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(aot_compile)
    assert len(aot_compile.unguarded_stores(TTIR.format(between=between, target=target))) == found
