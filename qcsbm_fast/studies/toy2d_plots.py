"""The pictures of the two-dimensional study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.score import Score

_EXTENT = 10.0
_BLUE, _GREY = "#1f5fa8", "#8a8a8a"


def gallery(out: Path, scores: Mapping[tuple[str, str], Score]) -> None:
    """samples.png and fields.png: a row per density, a column per kind, as the paper's figures."""
    densities = list(dict.fromkeys(density for density, _ in scores))
    kinds = list(dict.fromkeys(kind for _, kind in scores))
    for name, draw in (("samples", _samples), ("fields", _field)):
        figure = Figure(figsize=(3.6 * len(kinds), 3.5 * len(densities) + 0.3), dpi=130, layout="constrained")
        axes = figure.subplots(len(densities), len(kinds), squeeze=False)
        for (density, kind), score in scores.items():
            ax = axes[densities.index(density)][kinds.index(kind)]
            draw(ax, score)
            ax.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), aspect="equal", xticks=(), yticks=())
            ax.set_title(f"{density}, {kind}", fontsize=9)
        figure.savefig(out / f"{name}.png")


def _samples(ax: Any, score: Score) -> None:
    points = probability_flow(score, (5000, 2), stream=NoiseStream(0)).numpy()
    ax.scatter(points[:, 0], points[:, 1], s=1.2, color=_BLUE, linewidths=0)


def _field(ax: Any, score: Score) -> None:
    """The score at t = 0 on a 40 x 40 grid, arrows of one length, shaded by magnitude."""
    axis = torch.linspace(-_EXTENT, _EXTENT, 40)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        field = score(points, torch.zeros(len(points))).numpy()
    size = np.linalg.norm(field, axis=1, keepdims=True)
    unit = field / np.maximum(size, 1e-12)
    ax.quiver(*points.numpy().T, *unit.T, np.log10(size[:, 0] + 1e-3), cmap="viridis", angles="xy",
              scale_units="xy", scale=2.2, width=0.003, pivot="mid")  # fmt: skip


def factor_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """What the penalty costs and buys: loss, NLL, score error, Asym and NAsym against the balancing factor.

    `rows` are of one density and seed; the unconstrained model's values are the dashed lines.
    """
    panels = {
        "loss": "DSM loss",
        "nll": "NLL (nats)",
        "score_error": "score error",
        "asym": "Asym",
        "nasym": "NAsym",
    }
    figure = Figure(figsize=(3.0 * len(panels), 3.2), dpi=130, layout="constrained")
    figure.suptitle(f"{rows[0]['density']}: what the weight of the penalty costs and buys", fontsize=11)
    ours = sorted((r for r in rows if r["kind"] == "quasi-conservative"), key=lambda row: row["factor"])
    factors = [row["factor"] for row in ours]
    for ax, (column, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        values = [row[column] for row in ours]
        free = [row[column] for row in rows if row["kind"] == "unconstrained"]
        for value in free:
            ax.axhline(value, color=_GREY, linestyle="--", label="unconstrained")
        ax.plot(factors, values, marker="o", markersize=5, color=_BLUE, label="quasi-conservative")
        ax.set(xscale="log", xlabel="balancing factor", title=label, xticks=factors)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        if column in ("asym", "nasym"):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
        else:  # a hundredth of the value at least, so that noise does not look like a trend
            low, high = min(values + free), max(values + free)
            margin = max(0.15 * (high - low), 0.01 * high)
            ax.set_ylim(low - margin, high + margin)
        ax.grid(True, color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)
