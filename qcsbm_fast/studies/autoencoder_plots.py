"""The picture of the autoencoder study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLOURS = ("#1f5fa8", "#d1661b", "#3a8f4d", "#8a4fa3", "#8a8a8a", "#b8a013")


def curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Penalty, asymmetry of the weights and their distance from tied ones against the iteration, a line per seed."""
    figure = Figure(figsize=(11.0, 3.6), dpi=130, layout="constrained")
    panels = {
        "penalty": "penalty",
        "symmetry": r"$|r_0 \cdot w_1 - r_1 \cdot w_0|$",
        "distance": r"$\Vert R - W\Vert_F$",
    }
    for ax, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, row in enumerate(rows):
            iterations = [point["iteration"] for point in row["curve"]]
            values = [max(point[name], 1e-16) for point in row["curve"]]
            colour = _COLOURS[number % len(_COLOURS)]
            ax.plot(iterations, values, color=colour, linewidth=1.5, label=f"seed {row['seed']}")
        if name == "distance":
            ax.set_ylim(bottom=0)
        else:
            ax.set_yscale("log")
        ax.set(xlabel="iteration", title=title)
        ax.grid(True, color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)
