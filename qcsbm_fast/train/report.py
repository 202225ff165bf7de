"""How a run ends: its pictures, and in words what was learned and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score
from qcsbm_fast.train.build import Setup
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.draw import draw
from qcsbm_fast.train.folder import RunFolder

_IMAGE_HINT = "samples.png should look like the data; where it is noisy, train longer with --steps."


def draw_pictures(
    config: Config,
    folder: RunFolder,
    setup: Setup,
    score: Score,
    rows: Sequence[Mapping[str, Any]],
    stream: NoiseStream,
) -> None:
    """Write samples.png and curves.png, and field.png for points of the plane."""
    from qcsbm_fast.train import plots

    title = f"{config.data.name}, {config.model.kind}"
    plots.curves(folder.path / "curves.png", rows, title, averaged=config.optim.ema > 0.0)
    samples = draw(score, setup.shape, config.sampling, stream)
    if setup.image:
        plots.image_grid(folder.path / "samples.png", samples)
    else:
        plots.scatter(folder.path / "samples.png", samples, setup.test)
        plot_field(config, folder, score, setup.device)


def plot_field(config: Config, folder: RunFolder, score: Score, device: torch.device) -> None:
    """Write field.png, the score on a 40 x 40 grid of [-10, 10]^2 at the smallest time."""
    from qcsbm_fast.train import plots

    axis = torch.linspace(-plots.EXTENT, plots.EXTENT, 40, device=device)
    points = torch.cartesian_prod(axis, axis)
    t = torch.full((len(points),), config.objective.t_min, device=device)
    with torch.no_grad():
        field = score(points, t)
    sigma = score.sde.marginal(t)[1][0].item()
    title = f"{config.data.name}, {config.model.kind}: score at $\\sigma$ = {sigma:.2g}"
    plots.vector_field(folder.path / "field.png", points, field, title)


def print_summary(
    config: Config, folder: RunFolder, row: Mapping[str, float], *, image: bool, seen: int, seconds: float
) -> None:
    """Print what the run learned, in words, and the commands to try next.

    `row` holds the last evaluation; `image` tells pictures from points; the training saw `seen` samples in
    `seconds`.
    """
    run = shlex.quote(str(folder.path))
    other = "unconstrained" if config.model.kind == "quasi-conservative" else "quasi-conservative"
    pictures = "samples.png, curves.png" + ("" if image else ", field.png")
    commands = {
        f"qcsbm sample {run} --count {25 if image else 1000}": "new samples, as a picture and as numbers",
        f"tensorboard --logdir {run}": "the curves in a browser",
        f"qcsbm train --config {run}/config.yaml --kind {other}": "the same run, to compare Asym and NAsym",
    }
    learned = (
        (
            "DSM loss",
            "test_dsm",
            "denoising score matching: how well noise is told from data; lower is better",
        ),
        (
            "Asym",
            "test_asym",
            "1/2 ||J - J^T||^2 for the score's Jacobian J: 0 for the gradient of a density",
        ),
        ("NAsym", "test_nasym", _meaning(config, row["test_nasym"])),
    )
    width = max(map(len, commands))
    print(
        f"\nTrained a {config.model.kind} model of {config.data.name}: {config.optim.steps} steps, "
        f"{seen:,} samples seen, {_duration(seconds)}.",
        "\nOn held-out data, with standard errors:",
        *(f"  {name:9} {_value(row, key):20} {meaning}" for name, key, meaning in learned),
        f"\nIn {folder.path}: {pictures}, stats.jsonl, checkpoints.",
        *([_IMAGE_HINT] if image else []),
        "\nNext:",
        *(f"  {command:{width}}  # {comment}" for command, comment in commands.items()),
        sep="\n",
    )


def one_line(values: Mapping[str, float]) -> str:
    """An evaluation in a few words."""
    return (
        f"DSM loss {_value(values, 'test_dsm')}, Asym {_value(values, 'test_asym')}, "
        f"NAsym {_value(values, 'test_nasym')}"
    )


def _meaning(config: Config, nasym: float) -> str:
    if config.model.kind == "conservative":
        return "zero up to rounding, by construction: the score is a gradient"
    return f"the same as a share: {nasym:.2%} of ||J||^2 is rotation, which no density's score has"


def _value(row: Mapping[str, float], name: str) -> str:
    """The value with its standard error, to two digits of the error."""
    value, error = row[name], row[f"{name}_error"]
    if not error > 0.0 or abs(value) < 1e-4:
        return f"{value:.2g} ± {error:.1g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
