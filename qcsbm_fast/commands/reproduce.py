"""`qcsbm reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qcsbm_fast.commands.options import option
from qcsbm_fast.train.config import Kind

Density = Literal["checkerboard", "eight-gaussians", "spirals"]


@dataclass(frozen=True)
class Command:
    """Run an experiment of the paper: train its models, print their table, draw its figures.

    toy2d, Section 3.2: unconstrained, conservative and quasi-conservative models of 2-D densities, with
    negative log-likelihood, score error, Asym, NAsym, precision and recall. Interrupted, the same command
    goes on where it stopped.

    - qcsbm reproduce toy2d
    - qcsbm reproduce toy2d --densities checkerboard --seeds 0 1 2 --factors 0.1 1 10
    - qcsbm reproduce toy2d --steps 500 --out runs/quick-look
    """

    experiment: tyro.conf.Positional[Literal["toy2d"]]
    """Which experiment."""
    densities: tuple[Density, ...] = ("checkerboard", "eight-gaussians", "spirals")
    """Data sets."""
    kinds: tuple[Kind, ...] = ("unconstrained", "conservative", "quasi-conservative")
    """Kinds of models."""
    seeds: tuple[int, ...] = (0,)
    """One training for each; with several the table shows the spread."""
    factors: tuple[float, ...] = (0.1,)
    """Balancing factors of the quasi-conservative models: the first for the table, all for the curve."""
    steps: Annotated[int | None, option("INT", "(default: the paper's)")] = None
    """Optimiser steps of each training."""
    out: Path = Path("runs/toy2d")
    """Folder for the runs, table.md, results.json and the pictures."""


def run(command: Command) -> None:
    from qcsbm_fast.studies import toy2d

    rows = toy2d.reproduce(
        command.out,
        densities=command.densities,
        kinds=command.kinds,
        seeds=command.seeds,
        factors=command.factors,
        steps=command.steps,
    )
    print(f"{len(rows)} models; table, numbers and pictures in {command.out}")
