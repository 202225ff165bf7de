"""Sampling with a score that errs by a rotation or by a gradient (Chao et al. 2023, section 3.1).

The target is N(0, 0.1^2 I) in the plane; its score -x / 0.1^2 is given an error u of one size and two directions,
u = (-x2, x1) c ("rotational": no longer a gradient) or u = (x1, x2) c ("radial": still one), with

    c = sqrt(2 (e + d) mu(x) / (p(x) (||x||^2 + e + d) + 1e-8)),    d = 1e-6,

p the target's density and mu the equal mixture of ten unit-variance Gaussians on the circle of radius 3: the error is
large where there is little data. Measured are the steps until the negative log-density is below 0.001, on the
way there of deterministic Langevin trajectories x' = x + h s(x) and of chains with noise and Metropolis's
rule, and Asym and NAsym weighted by p on a 20 x 20 grid of [-3, 3]^2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from qcsbm_fast.penalty import asymmetry
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.mcmc import metropolis_langevin
from qcsbm_fast.studies.table import markdown, mean_and_spread, write_json

Direction = Literal["rotational", "radial"]
DIRECTIONS: tuple[Direction, ...] = ("rotational", "radial")
ERRORS = (0.0, 0.5e-3, 0.75e-3, 1e-3, 1.5e-3, 1.75e-3, 2.25e-3)
_VARIANCE, _RADIUS, _CENTRES, _FLOOR = 0.1**2, 3.0, 10, 1e-6
_CONVERGED = 0.001


@dataclass(frozen=True)
class Field:
    """The score with an error of size `e` and one direction, `(B, 2) -> (B, 2)`."""

    direction: Direction
    e: float

    def __call__(self, x: Tensor) -> Tensor:
        return -x / _VARIANCE + self.error(x)

    def error(self, x: Tensor) -> Tensor:
        """u `(B, 2)`."""
        angles = torch.arange(_CENTRES, dtype=x.dtype) * (2 * math.pi / _CENTRES)
        centres = _RADIUS * torch.stack((angles.cos(), angles.sin()), 1)
        gaps = (x[:, None] - centres).square().sum(2)
        mu = (-0.5 * gaps).exp().mean(1) / (2 * math.pi)
        size = self.e + _FLOOR
        c = (2 * size * mu / (density(x) * (x.square().sum(1) + size) + 1e-8)).sqrt()
        along = torch.stack((-x[:, 1], x[:, 0]), 1) if self.direction == "rotational" else x
        return along * c[:, None]


def density(x: Tensor) -> Tensor:
    """p `(B,)` at `x (B, 2)`."""
    return (-x.square().sum(1) / (2 * _VARIANCE)).exp() / (2 * math.pi * _VARIANCE)


def negative_log_density(x: Tensor) -> Tensor:
    """-log p `(*,)` at `x (*, 2)`."""
    return x.square().sum(-1) / (2 * _VARIANCE) + math.log(2 * math.pi * _VARIANCE)


def trajectories(
    field: Callable[[Tensor], Tensor], start: Tensor, steps: int, size: float, decay: float = 1000.0
) -> Tensor:
    """The paths `(steps + 1, B, 2)` of x' = x + h_i s(x) from `start (B, 2)`, h_i = size / exp(i / decay)."""
    path = [start]
    for i in range(steps):
        path.append(path[-1] + size / math.exp(i / decay) * field(path[-1]))
    return torch.stack(path)


def metropolis_trajectories(
    field: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    size: float,
    points: int,
    stream: NoiseStream,
) -> tuple[Tensor, Tensor]:
    """The same with noise and Metropolis's rule, the score taken at `points` points; the accepted shares `(B,)`."""
    path, accepted = [start], torch.zeros_like(start[:, 0])
    for i in range(steps):
        step = 2.0 * size / math.exp(i / 1000.0)  # a step of this size drifts by half of it
        result = metropolis_langevin(field, path[-1], [step], stream=stream, points=points)
        path.append(result.x)
        accepted += result.accepted
    return torch.stack(path), accepted / steps


def steps_to_converge(path: Tensor) -> Tensor:
    """Steps `(B,)` that each of the paths `(S + 1, B, 2)` takes until -log p < 0.001; S where it never is."""
    there = negative_log_density(path) < _CONVERGED
    first = there.int().argmax(0)
    return torch.where(there.any(0), first, len(path) - 1)


def weighted_asymmetry(field: Field) -> tuple[float, float]:
    """Asym and NAsym, weighted by the density on the grid."""
    axis = torch.linspace(-3.0, 3.0, 20, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        found = asymmetry(field, points, exact=True)
    weights = density(points)
    weights = weights / weights.sum()
    return (weights * found.penalty).sum().item(), (weights * found.nasym).sum().item()


def reproduce(
    out: Path, *, errors: Sequence[float], seeds: Sequence[int], steps: int, count: int, points: int
) -> list[dict[str, Any]]:
    """Runs both directions and all sizes `errors`; writes table.md, results.json, fields.png and steps.png to `out`.

    Args:
        errors: sizes e of the error.
        seeds: of the `count` starting points from N(-2, 0.5^2) each, and of the chains' noise.
        steps: steps of every path.
        points: points of the line integrals in Metropolis's rule.
    """
    from qcsbm_fast.studies import trajectories_plots

    rows, paths = [], {}
    combinations = list(itertools.product(DIRECTIONS, errors))
    for direction, e in tqdm(combinations, desc="trajectories", unit="field"):
        field, size = Field(direction, e), 0.0125 if e else 0.01
        asym, nasym = weighted_asymmetry(field)
        # all seeds in one batch, each with starting points of its own
        starts = [-2.0 + 0.5 * NoiseStream(seed).normal((count, 2)).double() for seed in seeds]
        path = trajectories(field, torch.cat(starts), steps, size)
        stream = NoiseStream(seeds[0] + (1 << 40))
        chain, accepted = metropolis_trajectories(field, torch.cat(starts), steps, size, points, stream)
        taken = zip(
            seeds, *(v.split(count) for v in (steps_to_converge(path), steps_to_converge(chain), accepted)),
            strict=True,
        )  # fmt: skip
        for seed, *values in taken:
            names = ("steps", "metropolis_steps", "accepted")
            means = {name: v.double().mean().item() for name, v in zip(names, values, strict=True)}
            rows.append({"direction": direction, "e": e, "seed": seed, "asym": asym, "nasym": nasym, **means})
        paths[direction, e] = path[:, :count]
    out.mkdir(parents=True, exist_ok=True)
    table = format_table(rows)
    (out / "table.md").write_text(table)
    write_json(out / "results.json", rows)
    trajectories_plots.fields(out / "fields.png", paths)
    trajectories_plots.steps(out / "steps.png", rows)
    print(f"\n{table}")
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per direction and size: Asym, NAsym, and the mean steps with their spread over the seeds."""
    lines = []
    for key in dict.fromkeys((row["direction"], row["e"]) for row in rows):
        group = [row for row in rows if (row["direction"], row["e"]) == key]
        columns = ("steps", "metropolis_steps", "accepted")
        cells = [mean_and_spread([row[name] for row in group]) for name in columns]
        asym, nasym = f"{group[0]['asym']:.3g}", f"{group[0]['nasym']:.3g}"
        lines.append([key[0], f"{key[1]:g}", asym, nasym, *cells])
    header = ["error", "e", "Asym", "NAsym", "steps", "steps (Metropolis)", "accepted"]
    return markdown(header, lines)
