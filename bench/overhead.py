"""What a call costs before it computes anything: each op on the smallest size, beside an eager product; and the import.

python bench/overhead.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import harness
from qcsbm_fast.ops.registry import OPS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import TABLE, arguments

CALLS = 200
IMPORT = "import time, torch; s = time.perf_counter(); import qcsbm_fast; print(time.perf_counter() - s)"


def repeated(function, *arguments):
    def run() -> None:
        for _ in range(CALLS):
            function(*arguments)

    return run


def main() -> None:
    x = torch.ones(1, 8)
    functions = {"eager multiplication": repeated(torch.mul, x, x)}
    for name, entry in TABLE.items():
        call = arguments(entry, next(iter(entry.variants)), entry.sizes["one"], torch.float32)
        functions[f"{name}, op"] = repeated(OPS[name], *call)
        if entry.public is not None:
            functions[f"{name}, checked function"] = repeated(entry.public, *call)
    print(f"{'':<40}{'us per call':>12}")
    for row in harness.interleaved(functions, repeats=9):
        print(f"{row.name:<40}{row.median / CALLS * 1e6:>12.2f}")
    seconds = [float(subprocess.check_output([sys.executable, "-c", IMPORT])) for _ in range(5)]
    print(f"import qcsbm_fast, beyond torch: {sorted(seconds)[2]:.3f} s")


if __name__ == "__main__":
    main()
