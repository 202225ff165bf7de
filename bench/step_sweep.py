"""The cost of a quasi-conservative step of NCSN++ against batch size, probes and width, as a picture.

For each setting the step of the package, in float32 and bfloat16, beside the nested baseline, in units of the package's
own plain denoising step in float32. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from harness import Row, interleaved
from step import Setting, variants

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = {
    "nested": "nested baseline",
    "quasi-conservative": "float32",
    "quasi-conservative split": "float32, products split",
    "quasi-conservative, quarter split": "products split, quarter batch",
    "quasi-conservative bf16": "bfloat16",
    "denoising": "",
}
SWEEPS = {
    "batch": ("images a batch (nf 32, K = 1)", {n: Setting(batch=n) for n in (4, 8, 16, 32)}),
    "probes": ("probes K (nf 32, batch 8)", {k: Setting(batch=8, probes=k) for k in (1, 2, 4, 8)}),
    "nf": ("width nf (batch 8, K = 1)", {w: Setting(batch=8, nf=w) for w in (16, 32, 64, 96)}),
}


def measure(setting: Setting, repeats: int) -> dict[str, Row]:
    functions = variants(setting).functions
    rows = interleaved({name: functions[name] for name in NAMES}, repeats=repeats, warmup=1)
    return {row.name: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("step_cost.png"))
    arguments = parser.parse_args()
    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(12, 3.6), sharey=True, constrained_layout=True)
    for axis, (label, settings) in zip(axes, SWEEPS.values(), strict=True):
        results = {value: measure(setting, arguments.repeats) for value, setting in settings.items()}
        for name, title in NAMES.items():
            costs = [rows[name].median / rows["denoising"].median for rows in results.values()]
            print(
                f"{label}: {name}: {', '.join(f'{v}: {c:.2f}' for v, c in zip(results, costs, strict=True))}"
            )
            if title:
                axis.plot(list(results), costs, marker="o", label=title)
        axis.set(xlabel=label, xscale="log", yscale="log")
        axis.set_xticks(list(results), [str(value) for value in results])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes[0].set_ylabel("plain denoising steps")
    axes[0].legend(fontsize="small")
    figure.suptitle("What one quasi-conservative training step costs (NCSN++, 32 x 32)")
    figure.savefig(arguments.out, dpi=110)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
