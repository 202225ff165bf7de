"""The pictures of the two-dimensional study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.score import Score

_EXTENT = 10.0


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
    ax.scatter(points[:, 0], points[:, 1], s=1.2, color="#1f5fa8", linewidths=0)


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
    """What the penalty costs and buys: loss, NLL, Asym and NAsym against the balancing factor.

    The unconstrained model's values are the dashed lines; bands span the seeds.
    """
    density = rows[0]["density"]
    panels = {"loss": "DSM loss", "nll": "NLL (nats)", "asym": "Asym", "nasym": "NAsym"}
    figure = Figure(figsize=(3.3 * len(panels), 3.2), dpi=130, layout="constrained")
    figure.suptitle(f"{density}: quasi-conservative model against the balancing factor", fontsize=10)
    ours = [r for r in rows if r["kind"] == "quasi-conservative" and r["density"] == density]
    free = [r for r in rows if r["kind"] == "unconstrained" and r["density"] == density]
    factors = sorted({r["factor"] for r in ours})
    for ax, (column, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        values = [[r[column] for r in ours if r["factor"] == factor] for factor in factors]
        ax.plot(factors, [np.mean(v) for v in values], marker="o", markersize=4, color="#1f5fa8")
        ax.fill_between(
            factors, [min(v) for v in values], [max(v) for v in values], color="#1f5fa8", alpha=0.2
        )
        if free:
            ax.axhline(
                float(np.mean([r[column] for r in free])), color="0.5", linestyle="--", label="unconstrained"
            )
        ax.set(xscale="log", xlabel="balancing factor", title=label)
        if column in ("asym", "nasym"):
            ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
