# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Makes one small table, for a README, of the attention times in a report of `gpu_check.py`.

Usage: ``python kernels/benchmarks/summary.py results/REPORT.json > results/attention.md``
"""

import argparse
import json
import pathlib
import re
from typing import Any

ROW = re.compile(r"(?P<stage>[a-z ]+), T=(?P<length>\d+) u=(?P<usage>[\d.]+) uniform")


def attention_table(report: dict[str, Any]) -> str:
    """Markdown table of our time over that of full attention, by length, pass and usage; misses are bold."""
    ratios: dict[tuple[int, str], dict[str, str]] = {}
    for stage in report["stages"]:
        for row in stage.get("rows", []):
            match = ROW.fullmatch(row["what"])
            if match:
                ratio = f"{row['ratio']:.2f}"
                line = ratios.setdefault((int(match["length"]), match["stage"]), {})
                line[match["usage"]] = ratio if row["meets"] else f"**{ratio}**"
    if not ratios:
        raise ValueError("The report has no times of attention over tokens kept evenly.")
    usages = sorted({usage for line in ratios.values() for usage in line}, key=float)
    lines = [["tokens", "pass", *(f"{float(usage):.0%} kept" for usage in usages)], ["---"] * (len(usages) + 2)]
    lines += [[f"{length:,}", name, *(line.get(u, "") for u in usages)] for (length, name), line in ratios.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path, help="JSON that gpu_check.py wrote")
    print(attention_table(json.loads(parser.parse_args().report.read_text())))


if __name__ == "__main__":
    main()
