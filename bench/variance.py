"""Variance of the penalty's gradient for each estimator, beside its cost: what a sub-batch and a probe are worth.

    python bench/variance.py [RUN]

RUN is a folder of `qcsbm train`; without one, a small image network is trained on the digits for a moment. The
variance is the summed variance over all parameters of the gradient of `mean sigma^2 1/2 ||A||_F^2`, fresh data, times,
noise and probes in each draw; the last column multiplies it by the time of the whole step (denoising loss included).
All are relative to the first row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import harness
from qcsbm_fast import DenoisingObjective, NoiseStream, Score
from qcsbm_fast.nn import ImageMLP
from qcsbm_fast.sde import VE
from qcsbm_fast.train import trained
from qcsbm_fast.train.folder import RunFolder

CASES = {
    "full batch, one-sided": {},
    "full batch, symmetric": {"estimator": "symmetric"},
    "full batch, one-sided, 4 probes": {"probes": 4},
    "quarter, uniform times": {"fraction": 0.25},
    "quarter, inverse-sigma times": {"fraction": 0.25, "time_density": "inverse-sigma"},
    "eighth, inverse-sigma times": {"fraction": 0.125, "time_density": "inverse-sigma"},
}


def penalty_gradient(score: Score, train: Tensor, batch: int, **arguments: object) -> Callable[[], Tensor]:
    """Draws one gradient of the penalty alone, flat, in float64."""
    objective = DenoisingObjective(score, stream=NoiseStream(0), balancing_factor=1.0, **arguments)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in score.parameters() if p.requires_grad]

    def draw() -> Tensor:
        x0 = train[torch.randint(len(train), (batch,), generator=generator)]
        grads = []
        for factor in (
            1.0,
            0.0,
        ):  # the same draw with and without the penalty: their difference is the penalty's
            objective.balancing_factor = factor or 1e-30
            objective.stream.load_state_dict(state)
            gradient = torch.autograd.grad(objective(x0).loss, parameters, allow_unused=True)
            flat = [g.flatten() for g in gradient if g is not None]
            grads.append(torch.cat(flat).double())
        return grads[0] - grads[1]

    def next_draw() -> Tensor:
        nonlocal state
        state = {"state": torch.tensor([int(torch.randint(2**62, (1,), generator=generator)), 0])}
        return draw()

    state: dict[str, Tensor] = {}
    return next_draw


def step(score: Score, train: Tensor, batch: int, **arguments: object) -> Callable[[], None]:
    objective = DenoisingObjective(score, stream=NoiseStream(0), balancing_factor=1.0, **arguments)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        objective.zero_grad()
        objective(train[:batch]).loss.backward()

    return run


def digits() -> tuple[Score, Tensor]:
    from qcsbm_fast import data

    torch.manual_seed(0)
    train = data.load("digits").train
    score = Score(ImageMLP(64, width=256, depth=2), VE(0.01, 5.0), "quasi-conservative")
    objective = DenoisingObjective(score, stream=NoiseStream(1), balancing_factor=0.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    for _ in range(1000):
        optimizer.zero_grad()
        objective(train[torch.randint(len(train), (128,))]).loss.backward()
        optimizer.step()
    return score, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--draws", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.run:
        setup = trained.load(RunFolder(arguments.run)).setup
        score, train = setup.score, setup.train
    else:
        score, train = digits()
    variances = {}
    for name, options in CASES.items():
        draw = penalty_gradient(score, train, arguments.batch, **options)
        samples = torch.stack([draw() for _ in range(arguments.draws)])
        variances[name] = samples.var(0).sum().item()
    rows = harness.interleaved(
        {name: step(score, train, arguments.batch, **options) for name, options in CASES.items()}
    )
    first = variances[rows[0].name]
    print(f"{'':<34}{'variance':>10}{'step time':>11}{'product':>9}")
    for row in rows:
        variance = variances[row.name] / first
        print(f"{row.name:<34}{variance:>10.2f}{1 / row.speedup:>11.2f}{variance / row.speedup:>9.2f}")


if __name__ == "__main__":
    main()
