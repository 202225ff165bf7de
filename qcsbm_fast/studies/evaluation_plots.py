"""The pictures of evaluations and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from qcsbm_fast.train import plots

_COLOURS = ("#1f5fa8", "#d1661b", "#3a8f4d", "#8a4fa3", "#8a8a8a", "#b8a013")


def asymmetry_by_sigma(path: Path, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Asym and NAsym against the noise level with their standard errors, a line per run."""
    figure = Figure(figsize=(10.0, 4.0), dpi=130, layout="constrained")
    panels = (
        ("asym", r"Asym, $\Vert J - J^T\Vert^2 / 2$"),
        ("nasym", "NAsym, the antisymmetric share of $J$"),
    )
    for index, (name, label) in enumerate(panels):
        axes = figure.add_subplot(1, 2, index + 1)
        for number, (run, levels) in enumerate(runs.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            mean, error = (torch.tensor(levels[key]) for key in (name, f"{name}_error"))
            mean = mean.clamp(min=1e-16)  # a conservative score's may be 0
            axes.plot(levels["sigma"], mean, color=colour, marker="o", markersize=3.5, label=run)
            low = torch.maximum(mean - error, 1e-3 * mean)  # above 0 too
            axes.fill_between(levels["sigma"], low, mean + error, color=colour, alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$", title=label)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else NullFormatter())
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0 and len(runs) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def training_curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Held-out denoising loss and NAsym against the step, a line per run, from the rows of stats.jsonl."""
    figure = Figure(figsize=(10.0, 4.0), dpi=130, layout="constrained")
    panels = (("test_dsm", "held-out denoising loss"), ("test_nasym", "held-out NAsym"))
    for index, (name, label) in enumerate(panels):
        axes = figure.add_subplot(1, 2, index + 1)
        for number, (run, rows) in enumerate(runs.items()):
            marks = [row for row in rows if name in row]
            axes.errorbar(
                [row["step"] for row in marks], [row[name] for row in marks],
                yerr=[row.get(f"{name}_error", 0.0) for row in marks], color=_COLOURS[number % len(_COLOURS)],
                marker="o", markersize=3.5, capsize=2, label=run,
            )  # fmt: skip
        axes.set(xlabel="step", title=label)
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def nearest_neighbours(path: Path, samples: Tensor, train: Tensor, neighbours: int = 5) -> None:
    """A row per image of `samples (N, C, H, W)`: it, then its nearest of `train (M, C, H, W)`, a gap between."""
    distances = torch.cdist(samples.flatten(1), train.to(samples).flatten(1))
    nearest = distances.topk(min(neighbours, len(train)), largest=False).indices
    rows = torch.cat((samples[:, None], torch.ones_like(samples)[:, None], train.to(samples)[nearest]), 1)
    figure_rows = rows.flatten(0, 1)
    plots.image_grid(path, figure_rows, columns=rows.shape[1])
