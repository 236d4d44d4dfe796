# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Compiles the kernels' cases, for GPUs that need not be present, and prints registers, stack and memory as JSON.

    python aot_compile.py [OP ...] [--quick] [--arch 80 90] [--cases FILE] [--table NAME]

It runs in a process of its own, because a process that has decorated kernels for the interpreter cannot compile. FILE
(`aot_cases.py` beside this file) has a dictionary NAME (`CASES`) with a list of cases for each op:

    {"kernel": <jit function>, "signature": {"x": "*bf16", "T": "i32"}, "constexprs": {"BT": 64, "state": None},
     "num_warps": 4, "num_stages": 2}

where the two dictionaries together name all of the kernel's arguments. Without OP it compiles the cases of all ops,
with `--quick` only the first of each kernel.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

SHIPPED_CASES = pathlib.Path(__file__).with_name("aot_cases.py")


def load_cases(file: pathlib.Path, table: str) -> dict[str, list[dict[str, Any]]]:
    """The cases of each op in a file's table."""
    spec = importlib.util.spec_from_file_location("loaded_cases", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, table)


def compile_case(case: dict[str, Any], arch: int) -> dict[str, Any]:
    """Compiles one case and measures the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case["kernel"]
    while not isinstance(kernel, triton.JITFunction):  # tuned kernels wrap the function
        kernel = kernel.fn
    missing = set(kernel.arg_names) ^ (set(case["signature"]) | set(case["constexprs"]))
    if missing:
        raise ValueError(f"case of {kernel.__name__}: argument {sorted(missing)} is missing or unknown")
    signature, aligned = {}, {}
    for i, parameter in enumerate(kernel.params):
        signature[parameter.name] = case["signature"].get(parameter.name, "constexpr")
        # PyTorch aligns tensors; integers are multiples of 16 in the shipped shapes, unless the kernel does not
        # specialise on them.
        kind = signature[parameter.name]
        if kind[0] == "*" or (kind[0] in "iu" and not parameter.do_not_specialize):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, case["constexprs"], aligned)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    with contextlib.redirect_stdout(sys.stderr):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "shared": compiled.metadata.shared,
        "transposed_product": transposes_product(compiled.asm["ttir"]),
        "race": unguarded_stores(compiled.asm["ttir"]),
        "never_written": reads_before_writes(run_tool(compiled.asm["cubin"], "nvdisasm", "-c")),
        **resource_usage(compiled.asm["cubin"]),
    }


def run_tool(cubin: bytes, tool: str, *options: str) -> str:
    """Output of one of Triton's bundled tools for a compiled kernel."""
    import triton

    program = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *options, file.name], check=True, capture_output=True, text=True).stdout


def unguarded_stores(ttir: str) -> list[str]:
    """Finds stores to a number that was loaded before, without a barrier between load and store.

    Every thread of a block loads a single number; one that is late would load what another has stored already.
    """
    base: dict[str, str] = {}  # of a pointer: the argument that it was computed from
    loaded: set[str] = set()
    found = []
    for line in ttir.splitlines():
        if "barrier" in line:
            loaded.clear()
        elif match := re.search(r"(%\w+) = tt\.addptr (%\w+),", line):
            base[match[1]] = base.get(match[2], match[2])
        elif match := re.search(r"= tt\.load (%\w+).*: !tt\.ptr<", line):
            loaded.add(base.get(match[1], match[1]))
        elif (match := re.search(r"tt\.store (%\w+),.*: !tt\.ptr<", line)) and base.get(match[1], match[1]) in loaded:
            found.append(line.strip())
    return found


def reads_before_writes(sass: str) -> list[str]:
    """Finds instructions that read a uniform register which no earlier instruction in the text has written.

    ptxas 12.8 emits them for some products on Hopper with a factor in shared memory, whose address they hold.
    """
    written: set[int] = set()
    found = []
    for line in sass.splitlines():
        match = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if not match:
            continue
        op, operands = match[1], [x.strip() for x in match[2].split(",")]
        wide = 2 if ".64" in op or ".WIDE" in op else 1
        # Uniform operations, and moves into uniform registers, name their target first.
        target = None
        if op.startswith(("U", "S2UR", "R2UR", "VOTEU", "REDUX")) and (first := re.fullmatch(r"UR(\d+)", operands[0])):
            target = int(first[1])
            operands = operands[1:]
        read: set[int] = set()
        for i, operand in enumerate(operands):
            if descriptor := re.search(r"gdesc\[UR(\d+)\]", operand):
                # Two registers for each factor in memory; the second pair is the right factor's.
                left_in_registers = any(re.fullmatch(r"R\d+(\.reuse)?", x) for x in operands[1:i])
                read |= {int(descriptor[1]) + k for k in range(2 * left_in_registers, 4)}
                continue
            # Wide multiplications take single registers and add a pair.
            pair = op.startswith("U") and (".64" in op or (".WIDE" in op and i == 2))
            pair = pair or "desc[" in operand or ".64" in operand
            for number in re.findall(r"\bUR(\d+)\b", operand):
                read |= {int(number) + k for k in range(1 + pair)}
        if read - written:
            found.append(line.strip())
        if target is not None:
            written |= set(range(target, target + wide))
    return found


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of a thread; spilled registers go to the latter two."""
    text = run_tool(cubin, "cuobjdump", "--dump-resource-usage")
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["reg"], "stack": found["stack"], "local": found["local"]}


def transposes_product(ttir: str) -> bool:
    """True if a product's left factor is the transpose of another product's result in registers.

    Triton 3.4.0 to 3.7.0 miscompile that for Hopper: see `BAD_PAIRS` in `tuning.py`.
    """
    sources: dict[str, list[str]] = {}  # values from which each value is computed, elementwise
    products, transposed, left_factors = set(), {}, []
    loops: list[str | None] = []  # results of the blocks that enclose a line
    for line in ttir.splitlines():
        match = re.match(r"\s*(?:(%[\w.-]+)(?::\d+)? = )?\"?([\w.]+)\"?(.*)", line)
        if not match:
            continue
        name, op, rest = match.groups()
        operands = [x.split("#")[0] for x in re.findall(r"%[\w.#-]+", rest.split(" : ")[0])]
        if op == "tt.dot":
            left_factors.append(operands[0])
            products.add(name)
        elif op == "tt.trans":
            transposed[name] = operands[0]
        elif op in ("scf.yield",) and loops and loops[-1]:
            sources.setdefault(loops[-1], []).extend(operands)
        elif op.startswith(("arith.", "math.", "ttg.convert_layout")) and name:
            sources[name] = operands
        if line.rstrip().endswith("{") and "} else" not in line:
            loops.append(name)
        elif line.strip().startswith("}") and "} else" not in line and loops:
            loops.pop()

    def is_product(value: str, seen: set[str]) -> bool:
        if value in products:
            return True
        seen.add(value)
        return any(is_product(x, seen) for x in sources.get(value, []) if x not in seen)

    def reaches(value: str, seen: set[str]) -> bool:
        """True if `value` is computed from a transposed product."""
        if value in transposed:
            return is_product(transposed[value], set())
        seen.add(value)
        return any(reaches(x, seen) for x in sources.get(value, []) if x not in seen)

    return any(reaches(x, set()) for x in left_factors)


def first_of_each_kernel(cases: list[dict[str, Any]]) -> list[int]:
    """Numbers of the cases that are the first of their kernel."""
    kernels = [id(case["kernel"]) for case in cases]
    return [kernels.index(kernel) for kernel in dict.fromkeys(kernels)]


def measure(cases: dict[str, list[dict[str, Any]]], architectures: list[int], quick: bool) -> list[dict[str, Any]]:
    """One measurement for each case and architecture; a case that does not compile has an `error`."""
    results = []
    for op, listed in cases.items():
        for number in first_of_each_kernel(listed) if quick else range(len(listed)):
            for arch in architectures:
                try:
                    result = compile_case(listed[number], arch)
                except Exception as error:  # reported for this case; the others are still compiled
                    result = {"kernel": str(listed[number]["kernel"]), "arch": arch, "error": f"{error!r}"[-2000:]}
                results.append({"op": op, "case": number, **result})
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--cases", type=pathlib.Path, default=SHIPPED_CASES)
    parser.add_argument("--table", default="CASES")
    arguments = parser.parse_args()
    cases = load_cases(arguments.cases, arguments.table)
    chosen = {op: cases[op] for op in arguments.ops or cases}
    print(json.dumps(measure(chosen, arguments.arch, arguments.quick)))
