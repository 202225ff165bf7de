"""The pictures of the two-dimensional study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from qcsbm_fast.metrics import oracle_score
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.train.build import Setup

_EXTENT = 10.0
_COUNT = 5000
_BLUE, _GREY = "#1f5fa8", "#8a8a8a"


def gallery(out: Path, models: Mapping[tuple[str, str], Setup]) -> None:
    """samples.png and fields.png: a row per density; the data, or the score of the noised data, then a column per kind.

    `models` are by density and kind.
    """
    densities = list(dict.fromkeys(density for density, _ in models))
    kinds = ["data", *dict.fromkeys(kind for _, kind in models)]
    for name, draw in (("samples", _samples), ("fields", _field)):
        figure = Figure(figsize=(3.2 * len(kinds), 3.2 * len(densities) + 0.3), dpi=130, layout="constrained")
        axes = figure.subplots(len(densities), len(kinds), squeeze=False)
        for (density, kind), setup in models.items():
            row = axes[densities.index(density)]
            draw(row[kinds.index(kind)], setup, data=False)
            if kind == kinds[1]:
                draw(row[0], setup, data=True)
                row[0].set_ylabel(density)
        for ax, kind in zip(axes[0], kinds, strict=True):
            ax.set_title(
                "score of the noised data" if name == "fields" and kind == "data" else kind, fontsize=10
            )
        for ax in axes.flat:
            ax.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), aspect="equal", xticks=(), yticks=())
        figure.savefig(out / f"{name}.png")


def _samples(ax: Any, setup: Setup, *, data: bool) -> None:
    points = (
        setup.test[:_COUNT] if data else probability_flow(setup.score, (_COUNT, 2), stream=NoiseStream(0))
    )
    ax.scatter(*points.numpy().T, s=1.2, color=_GREY if data else _BLUE, linewidths=0)


def _field(ax: Any, setup: Setup, *, data: bool) -> None:
    """The score at t = 0 on a 40 x 40 grid, arrows of one length, shaded by magnitude."""
    axis = torch.linspace(-_EXTENT, _EXTENT, 40)
    points = torch.cartesian_prod(axis, axis)
    t = torch.zeros(len(points))
    with torch.no_grad():
        field = (
            oracle_score(points, setup.train, *setup.score.sde.marginal(t))
            if data
            else setup.score(points, t)
        )
    size = field.norm(dim=1, keepdim=True)
    unit = field / size.clamp(min=1e-12)
    ax.quiver(*points.numpy().T, *unit.numpy().T, np.log10(size[:, 0].numpy() + 1e-3), cmap="viridis", angles="xy",
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
