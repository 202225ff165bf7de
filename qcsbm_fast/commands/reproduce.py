"""`qcsbm reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qcsbm_fast.commands.options import FLAT, option
from qcsbm_fast.train.config import Kind
from qcsbm_fast.train.errors import ConfigError

Density = Literal["checkerboard", "eight-gaussians", "spirals"]


@dataclass(frozen=True)
class Toy2D:
    """Section 3.2: unconstrained, conservative and quasi-conservative models of 2-D densities.

    Their denoising loss, negative log-likelihood, score error, Asym, NAsym, precision and recall; samples and
    vector fields; and a sweep of the balancing factor, what the penalty costs and buys.

    - qcsbm reproduce toy2d
    - qcsbm reproduce toy2d --densities checkerboard --seeds 0 --factors 0.1 10
    - qcsbm reproduce toy2d --fast
    """

    densities: tuple[Density, ...] = ("checkerboard", "eight-gaussians", "spirals")
    """Data sets."""
    kinds: tuple[Kind, ...] = ("unconstrained", "conservative", "quasi-conservative")
    """Kinds of models."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training for each; the table shows the spread."""
    factors: tuple[float, ...] = (0.1, 1.0, 10.0)
    """Balancing factors of the quasi-conservative models: the first for the table; all, for the first density and
    seed, for the sweep."""
    steps: Annotated[int | None, option("INT", "(default: the paper's)")] = None
    """Optimiser steps of each training."""
    jobs: Annotated[int | None, option("INT", "(default: the cores)")] = None
    """Models trained at a time, each in a process of its own."""
    fast: bool = False
    """A minute's look: one density, one seed, one factor, 100 steps."""
    out: Path = Path("runs/toy2d")
    """Folder for the runs, table.md, results.json and the pictures."""

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"--jobs should be 1 or more, got {self.jobs}")

    def run(self) -> None:
        import torch

        from qcsbm_fast.studies import toy2d

        toy2d.reproduce(
            self.out,
            densities=self.densities[:1] if self.fast else self.densities,
            kinds=self.kinds,
            seeds=self.seeds[:1] if self.fast else self.seeds,
            factors=self.factors[:1] if self.fast else self.factors,
            steps=self.steps or (100 if self.fast else None),
            workers=self.jobs or torch.get_num_threads(),
        )


@dataclass(frozen=True)
class Trajectories:
    """Section 3.1: how sampling suffers from a rotational error of the score and not from a radial one.

    Steps until Langevin trajectories, with and without Metropolis's rule, reach a Gaussian target; the fields
    with their trajectories; Asym and NAsym.

    - qcsbm reproduce trajectories
    - qcsbm reproduce trajectories --errors 0 0.001 0.00225 --seeds 7
    """

    errors: tuple[float, ...] = (0.0, 0.5e-3, 0.75e-3, 1e-3, 1.5e-3, 1.75e-3, 2.25e-3)
    """Sizes of the error."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of starting points and noise; the table shows the spread."""
    steps: int = 300
    """Steps of a trajectory."""
    count: int = 10
    """Trajectories per seed."""
    points: int = 100
    """Points at which Metropolis's rule takes the score along a step."""
    fast: bool = False
    """A minute's look: three sizes, one seed, 8 points."""
    out: Path = Path("runs/trajectories")
    """Folder for table.md, results.json and the pictures."""

    def run(self) -> None:
        from qcsbm_fast.studies import trajectories

        trajectories.reproduce(
            self.out,
            errors=self.errors[:: max(1, len(self.errors) // 2)] if self.fast else self.errors,
            seeds=self.seeds[:1] if self.fast else self.seeds,
            steps=self.steps,
            count=self.count,
            points=8 if self.fast else self.points,
        )


@dataclass(frozen=True)
class Autoencoder:
    """Section 6: a one-layer autoencoder becomes conservative without tied weights.

    The penalty, the asymmetry of the weights and their distance from tied ones as they are trained.

    - qcsbm reproduce autoencoder
    """

    seeds: tuple[int, ...] = (8, 9, 10)
    """One training for each; the paper's is 8."""
    iterations: int = 10_001
    """Optimiser steps."""
    fast: bool = False
    """A minute's look: one seed."""
    out: Path = Path("runs/autoencoder")
    """Folder for table.md, results.json and the picture."""

    def run(self) -> None:
        from qcsbm_fast.studies import autoencoder

        autoencoder.reproduce(
            self.out, seeds=self.seeds[:1] if self.fast else self.seeds, iterations=self.iterations
        )


@dataclass(frozen=True)
class Images:
    """Section 5, of a size for a CPU: the three kinds on images, from one unconstrained checkpoint as in the paper.

    Denoising loss, bits per dimension, score error, Asym and NAsym, precision and recall; samples. With the
    defaults it takes hours on two cores; the paper's data sets are presets of `qcsbm train`.

    - qcsbm reproduce images --data emoji
    - qcsbm reproduce images --fast
    """

    data: Literal["fashion-mnist", "emoji", "mnist-5k", "digits"] = "fashion-mnist"
    """Data set, with the preset's network."""
    seeds: tuple[int, ...] = (0,)
    """A set of runs for each; with several the table shows the spread."""
    first_steps: int = 4000
    """Optimiser steps of the unconstrained model that two of the three begin with."""
    more_steps: int = 1000
    """Optimiser steps after that."""
    fast: bool = False
    """A look of some minutes: the digits, 60 and 30 steps, few samples."""
    out: Path = Path("runs/images")
    """Folder for the runs, table.md, results.json and the pictures."""

    def run(self) -> None:
        from qcsbm_fast.studies import images
        from qcsbm_fast.studies.evaluation import Settings, settings_for
        from qcsbm_fast.train.presets import PRESETS

        few = Settings(points=50, levels=5, probes=1, oracle_points=10, nll_points=2, repeats=1, samples=9)
        images.reproduce(
            self.out,
            PRESETS["digits" if self.fast else self.data],
            seeds=self.seeds[:1] if self.fast else self.seeds,
            first_steps=60 if self.fast else self.first_steps,
            more_steps=30 if self.fast else self.more_steps,
            settings=few if self.fast else settings_for(image=True),
        )


@dataclass(frozen=True)
class Command:
    """Run an experiment of the paper: its models, a table with mean and spread, its figures.

    Interrupted, the same command goes on where it stopped.

    - qcsbm reproduce trajectories
    - qcsbm reproduce toy2d --help
    """

    experiment: Annotated[
        Annotated[Toy2D, tyro.conf.subcommand("toy2d", prefix_name=False)]
        | Annotated[Trajectories, tyro.conf.subcommand("trajectories", prefix_name=False)]
        | Annotated[Autoencoder, tyro.conf.subcommand("autoencoder", prefix_name=False)]
        | Annotated[Images, tyro.conf.subcommand("images", prefix_name=False)],
        FLAT,
    ]
    """Which experiment."""


def run(command: Command) -> None:
    command.experiment.run()
    print(f"Table, numbers and pictures in {command.experiment.out}")
