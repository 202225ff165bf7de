"""The pictures of a run folder. Each function writes one PNG file; nothing here needs a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def image_grid(path: Path, images: Tensor) -> None:
    """`images (N, C, H, W)`, C = 1 or 3, values in [0, 1], side by side in a nearly square grid."""
    pixels = images.detach().cpu().clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count))
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


def scatter(path: Path, samples: Tensor, data: Tensor | None = None) -> None:
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
    figure = Figure(figsize=(6.6, 5.8), dpi=_DPI, layout="constrained")
    (axes,) = _row(figure, 1)
    low, high = np.quantile(length, [0.02, 1.0])
    arrows = axes.quiver(
        x, y, u / length, v / length, length, cmap="viridis", norm=LogNorm(low, high), angles="xy",
        scale_units="xy", scale=2.2, width=0.0028, headwidth=4.0, pivot="mid",
    )  # fmt: skip
    axes.set_title(title)
    _set_plane(axes)
    figure.colorbar(arrows, ax=axes, label="magnitude of the score", shrink=0.9)
    figure.savefig(path)


def curves(path: Path, rows: Rows, title: str) -> None:
    """Loss and asymmetry against the step, from the rows of stats.jsonl; held-out values as marks."""
    figure = Figure(figsize=(11.0, 4.6), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    loss, asymmetry = _row(figure, 2)

    steps, values = _series(rows, "dsm")
    loss.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=1.0)
    loss.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8, label="training")
    _marks(loss, rows, "test_dsm", _ORANGE, "o", "held-out")
    _set_limits_without_start(loss, rows)
    loss.set(xlabel="step", ylabel="denoising score matching loss")

    steps, values = _series(rows, "asym")
    positive = values > 0
    if positive.any():
        asymmetry.plot(steps[positive], values[positive], color=_BLUE, alpha=0.25, linewidth=1.0)
        smoothed = np.exp(_smooth(np.log(values[positive])))
        asymmetry.plot(steps[positive], smoothed, color=_BLUE, linewidth=1.8, label="Asym, training")
    _marks(asymmetry, rows, "test_asym", _ORANGE, "o", "Asym, held-out")
    _marks(asymmetry, rows, "test_nasym", _GREY, "D", "NAsym, held-out")
    asymmetry.set(xlabel="step", ylabel="asymmetry of the score's Jacobian")
    if any(row.get(name, 0.0) > 0.0 for row in rows for name in ("asym", "test_asym")):
        asymmetry.set_yscale("log")
        asymmetry.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        asymmetry.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        asymmetry.yaxis.set_minor_formatter(NullFormatter())
    for axes in (loss, asymmetry):
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, columnspacing=1.2
            )
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


def _marks(axes: Axes, rows: Rows, name: str, colour: str, marker: str, label: str) -> None:
    steps, values = _series(rows, name)
    _, errors = _series(rows, f"{name}_error")
    if len(steps):
        axes.errorbar(
            steps, values, yerr=errors, color=colour, marker=marker, markersize=5, linestyle="none",
            elinewidth=1.0, capsize=2.5, label=label, zorder=3,
        )  # fmt: skip


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over about a twentieth of the values, shrinking at both ends."""
    half = len(values) // 40
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _set_limits_without_start(axes: Axes, rows: Rows) -> None:
    """Fit the vertical axis to all but the first tenth, which would otherwise dwarf the rest."""
    _, values = _series(rows, "dsm")
    _, marks = _series(rows, "test_dsm")
    shown = np.concatenate((values[len(values) // 10 :], marks))
    if len(shown):
        low, high = shown.min(), shown.max()
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + 3 * margin)
