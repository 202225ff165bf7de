"""The pictures of a run folder. Each function writes one PNG file; nothing here needs a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

Rows = Sequence[Mapping[str, Any]]

EXTENT = 10.0
"""The 2-D pictures show [-EXTENT, EXTENT]^2, as those of the paper do."""

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1661b", "#8a8a8a"
_DPI = 150


def image_grid(path: Path | IO[bytes], images: Tensor, columns: int | None = None) -> None:
    """`images (N, C, H, W)`, C = 1 or 3, values in [0, 1], side by side, by default in a nearly square grid."""
    pixels = images.detach().cpu().clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = max(1, height // 8)
    canvas = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, channels))
    for index, image in enumerate(pixels):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    scale = max(1, round(900 / max(canvas.shape)))
    canvas = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    figure = Figure(figsize=(canvas.shape[1] / _DPI, canvas.shape[0] / _DPI), dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(canvas.squeeze(-1) if channels == 1 else canvas, cmap="gray", vmin=0.0, vmax=1.0)
    axes.set_axis_off()
    figure.savefig(path)


def scatter(path: Path | IO[bytes], samples: Tensor, data: Tensor | None = None) -> None:
    """Points `samples (N, 2)`, beside as many of the points `data (M, 2)` if given."""
    panels = [(f"{len(samples)} samples", samples, _BLUE)]
    if data is not None:
        panels.insert(0, ("held-out data", data[: len(samples)], _GREY))
    figure = Figure(figsize=(4.4 * len(panels), 4.6), dpi=_DPI, layout="constrained")
    for axes, (title, points, colour) in zip(_row(figure, len(panels)), panels, strict=True):
        x, y = points.detach().cpu().numpy().T
        axes.scatter(x, y, s=2.0, color=colour, alpha=0.6, linewidths=0.0)
        axes.set_title(title)
        _set_plane(axes)
    figure.savefig(path)


def vector_field(path: Path, points: Tensor, field: Tensor, title: str) -> None:
    """`field (N, 2)` at the grid `points (N, 2)`: arrows of one length, their colour the magnitude."""
    x, y = points.detach().cpu().numpy().T
    u, v = field.detach().cpu().numpy().T
    magnitude = np.hypot(u, v)
    length = np.maximum(magnitude, np.finfo(magnitude.dtype).tiny)
    figure = Figure(figsize=(7.2, 5.8), dpi=_DPI, layout="constrained")
    (axes,) = _row(figure, 1)
    low, high = np.quantile(length, [0.02, 1.0])
    arrows = axes.quiver(
        x, y, u / length, v / length, length, cmap="viridis", norm=LogNorm(low, high), angles="xy",
        scale_units="xy", scale=2.2, width=0.0028, headwidth=4.0, pivot="mid",
    )  # fmt: skip
    axes.set_title(title)
    _set_plane(axes)
    bar = figure.colorbar(arrows, ax=axes, label="magnitude of the score")
    _label_decades(bar.ax, low, high)
    figure.savefig(path)


def curves(path: Path, rows: Rows, title: str, *, averaged: bool) -> None:
    """Loss, Asym and NAsym against the step, from the rows of stats.jsonl; held-out values as marks.

    `averaged` tells whether these are of averaged weights, unlike the training's own.
    """
    figure = Figure(figsize=(13.0, 4.2), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    panels = (
        ("dsm", "test_dsm", "denoising score matching loss"),
        ("asym", "test_asym", r"Asym, $\Vert J - J^T\Vert^2 / 2$"),
        ("nasym", "test_nasym", "NAsym, the antisymmetric share of $J$"),
    )
    last = max((row["step"] for row in rows), default=1)
    for axes, (training, held_out, label) in zip(_row(figure, len(panels)), panels, strict=True):
        steps, values = _series(rows, training)
        axes.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=1.0)
        axes.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8, label="training")
        marks = _marks(axes, rows, held_out, "held-out, averaged weights" if averaged else "held-out")
        # the first tenth would dwarf the rest
        shown = np.concatenate((values[len(values) // 10 :], marks))
        _set_limits(axes, shown, log=training != "dsm")
        axes.set(xlabel="step", ylabel=label, xlim=(0, last * 1.03))
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if training == "dsm":
            axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def _row(figure: Figure, count: int) -> list[Axes]:
    return [figure.add_subplot(1, count, index + 1) for index in range(count)]


def _set_plane(axes: Axes) -> None:
    axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axes.set(xticks=(-10, -5, 0, 5, 10), yticks=(-10, -5, 0, 5, 10))


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _marks(axes: Axes, rows: Rows, name: str, label: str) -> np.ndarray:
    """Mark the values called `name` with their standard errors, and return them."""
    steps, values = _series(rows, name)
    _, errors = _series(rows, f"{name}_error")
    axes.errorbar(
        steps, values, yerr=errors, color=_ORANGE, marker="o", markersize=5, linestyle="none",
        elinewidth=1.0, capsize=2.5, label=label, zorder=3,
    )  # fmt: skip
    return values


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over about a twentieth of the values, shrinking at both ends."""
    half = len(values) // 40
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _label_decades(axes: Axes, low: float, high: float) -> None:
    """Plain numbers at 1, 2, 5, 10, ... of a logarithmic vertical axis, or at its decades if it is long."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _set_limits(axes: Axes, values: np.ndarray, *, log: bool) -> None:
    """Fit the vertical axis to `values`, on a log scale if wanted and possible."""
    positive = values[values > 0]
    if log and len(positive):
        low, high = positive.min() / 1.6, positive.max() * 1.6  # so far apart that a tick is between
        axes.set(yscale="log", ylim=(low, high))
        _label_decades(axes, low, high)
    elif len(values):
        low, high = values.min(), values.max()
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + 3 * margin)
