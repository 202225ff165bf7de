"""The pictures of the sampling trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from qcsbm_fast.studies.trajectories import DIRECTIONS, Field, steps_to_converge

_EXTENT = 4.0
_COLOURS = {"rotational": "#d1661b", "radial": "#1f5fa8"}


def fields(path: Path, paths: Mapping[tuple[Any, float], Tensor]) -> None:
    """A row per direction, a column per size: the field and the deterministic paths until they converge."""
    errors = list(dict.fromkeys(e for _, e in paths))
    figure = Figure(figsize=(2.5 * len(errors), 5.4), dpi=130, layout="constrained")
    axes = figure.subplots(len(DIRECTIONS), len(errors), squeeze=False)
    axis = torch.linspace(-_EXTENT, _EXTENT, 20, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    for (direction, e), taken in paths.items():
        ax = axes[DIRECTIONS.index(direction)][errors.index(e)]
        field = Field(direction, e)(points).numpy()
        unit = field / np.maximum(np.linalg.norm(field, axis=1, keepdims=True), 1e-12)
        ax.quiver(*points.numpy().T, *unit.T, color="0.7", angles="xy", scale_units="xy", scale=3.2, width=0.004,
                  pivot="mid")  # fmt: skip
        arrived = steps_to_converge(taken)
        alpha = min(
            0.7, 25.0 / arrived.double().mean().item()
        )  # hundreds of crossing lines would be one blot
        for route, last in zip(taken.transpose(0, 1).numpy(), arrived.tolist(), strict=True):
            ax.plot(*route[: last + 1].T, color=_COLOURS[direction], linewidth=0.6, alpha=alpha)
            ax.plot(*route[0], color="k", marker="o", markersize=2.5, zorder=3)
        ax.set(xlim=(-_EXTENT, _EXTENT), ylim=(-_EXTENT, _EXTENT), aspect="equal", xticks=(), yticks=())
        ax.set_title(f"{direction}, e = {e:g}", fontsize=9)
    figure.savefig(path)


def steps(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Steps to converge against the size of the error, and NAsym; bands span the seeds."""
    figure = Figure(figsize=(11.0, 3.6), dpi=130, layout="constrained")
    panels = {
        "steps": "steps to converge",
        "metropolis_steps": "steps to converge, Metropolis",
        "nasym": "NAsym, weighted by the density",
    }
    for ax, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for direction in DIRECTIONS:
            ours = [row for row in rows if row["direction"] == direction]
            errors = sorted({row["e"] for row in ours})
            values = [[row[name] for row in ours if row["e"] == e] for e in errors]
            colour, scaled = _COLOURS[direction], [1e3 * e for e in errors]
            ax.plot(
                scaled, [np.mean(v) for v in values], color=colour, marker="o", markersize=4, label=direction
            )
            ax.fill_between(
                scaled, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2
            )
        ax.set(xlabel="size of the error, $10^3 e$", title=title)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)
