"""The pictures of evaluations and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from qcsbm_fast.train import plots

_PANELS = {
    "dsm": "held-out denoising loss",
    "asym": r"Asym, $\Vert J - J^T\Vert^2 / 2$",
    "nasym": "NAsym, the antisymmetric share",
}
_ROUNDING = 1e-9  # NAsym of a gradient field in float32
_COLOURS = ("#1f5fa8", "#d1661b", "#3a8f4d", "#8a4fa3", "#8a8a8a", "#b8a013")


Levels = Mapping[str, Sequence[float]]
"""What an evaluation says of the noise levels: sigma, and by name a mean and its standard error at each."""


def asymmetry_by_sigma(path: Path, levels: Levels) -> None:
    """Asym and NAsym of one run against the noise level, with their standard errors."""
    figure = Figure(figsize=(10.0, 4.0), dpi=130, layout="constrained")
    for index, name in enumerate(("asym", "nasym")):
        _by_sigma(figure.add_subplot(1, 2, index + 1), {"": levels}, name)
    figure.savefig(path)


def side_by_side(path: Path, runs: Mapping[str, Levels], samples: Mapping[str, Path]) -> None:
    """Runs beside each other: pictures of their samples, and under them denoising loss, Asym and NAsym by noise level.

    `samples` are PNG files by the same names. A model whose field is a gradient but for rounding has no line in Asym
    and NAsym, which would hide the others' differences.
    """
    width = max(10.5, 3.6 * len(runs))
    pictures = {run: imread(path) for run, path in samples.items()}
    heights = (max(p.shape[0] / p.shape[1] for p in pictures.values()) * width / len(runs) + 0.4, 3.8)
    figure = Figure(figsize=(width, sum(heights)), dpi=130, layout="constrained")
    cells = figure.add_gridspec(2, 1, height_ratios=heights)
    top, bottom = figure.add_subfigure(cells[0]), figure.add_subfigure(cells[1])
    for index, (run, picture) in enumerate(pictures.items()):
        axes = top.add_subplot(1, len(pictures), index + 1)
        axes.imshow(picture, interpolation="antialiased")
        axes.set_title(run, color=_COLOURS[index % len(_COLOURS)], fontsize=10)
        axes.set_axis_off()
    for index, name in enumerate(_PANELS):
        axes = bottom.add_subplot(1, len(_PANELS), index + 1)
        _by_sigma(axes, {run: levels for run, levels in runs.items() if name in levels}, name)
        if index == 0:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _by_sigma(axes: Axes, runs: Mapping[str, Levels], name: str) -> None:
    tiny = {run: name != "dsm" and max(levels["nasym"]) < _ROUNDING for run, levels in runs.items()}
    for number, (run, levels) in enumerate(runs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        if tiny[run] and not all(tiny.values()):
            axes.plot([], [], color=colour, marker="o", markersize=3.5, label=run)
            continue
        mean, error = (torch.tensor(levels[key]) for key in (name, f"{name}_error"))
        mean = mean.clamp(min=1e-16)  # a conservative score's may be 0
        axes.plot(levels["sigma"], mean, color=colour, marker="o", markersize=3.5, label=run)
        low = torch.maximum(mean - error, 1e-3 * mean)  # above 0 too
        axes.fill_between(levels["sigma"], low, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$", title=_PANELS[name])
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        few = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else few))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    hidden = [run for run, small in tiny.items() if small]
    if hidden and len(hidden) < len(runs):
        axes.text(
            0.02,
            0.02,
            f"{', '.join(hidden)}: 0 but for rounding",
            transform=axes.transAxes,
            fontsize=8,
            color="0.4",
        )
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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
    """A row per image of `samples (N, C, H, W)`: it, and its nearest of `train (M, C, H, W)`."""
    distances = torch.cdist(samples.flatten(1), train.to(samples).flatten(1))
    nearest = distances.topk(min(neighbours, len(train)), largest=False).indices
    rows = torch.cat((samples[:, None], torch.ones_like(samples)[:, None], train.to(samples)[nearest]), 1)
    count, columns = rows.shape[:2]
    picture = BytesIO()
    plots.image_grid(picture, rows.flatten(0, 1), columns=columns)
    picture.seek(0)
    pixels = imread(picture)
    figure = Figure(figsize=(0.8 * columns, 0.8 * count + 0.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(pixels)
    for text, column in (("sample", 0.5), ("nearest training images", 2 + (columns - 2) / 2)):
        axes.text(
            column / columns, 1.0, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=10
        )
    axes.set_axis_off()
    figure.savefig(path)
