"""Data sets: supports and moments against the distributions' own, fixed splits, reproducible draws.

Statistical bounds are 5 standard errors of the estimate (two-sided error rate 6e-7 per figure), seeds fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qcsbm_fast import data

N = 50_000
TOY = ["checkerboard", "eight-gaussians", "spirals"]


def z_scores(samples: torch.Tensor, expected: torch.Tensor | float) -> torch.Tensor:
    """How many standard errors the column means of `samples (N, k)` lie from `expected`."""
    samples = samples.double()
    return (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))


def test_checkerboard_is_uniform_on_one_colour() -> None:
    x = data.load("checkerboard").train
    assert x.shape == (N, 2)
    assert x.dtype == torch.float32
    column, row = (x / 3.0).floor().long().unbind(1)
    assert (column.min(), column.max(), row.min(), row.max()) == (-2, 1, -2, 1)
    assert (column.remainder(2) == row.remainder(2)).all()
    counts = torch.bincount((column + 2) * 4 + row + 2, minlength=16)
    chi2 = ((counts[counts > 0] - N / 8) ** 2 / (N / 8)).sum().item()
    assert (counts > 0).sum() == 8
    assert chi2 < 40.0  # 7 degrees of freedom: P(chi2 > 40) = 1.3e-6
    inside = (x / 3.0).remainder(1.0).double()
    cells = torch.bincount((inside * 10).long() @ torch.tensor([10, 1]), minlength=100)
    chi2 = ((cells - N / 100) ** 2 / (N / 100)).sum().item()
    assert chi2 < 180.0  # 99 degrees of freedom: P(chi2 > 180) = 1.2e-6


def test_eight_gaussians_are_the_mixture() -> None:
    x = data.load("eight-gaussians").train.double()
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = 8.0 / math.sqrt(2.0) * torch.stack((angles.cos(), angles.sin()), 1)
    nearest = torch.cdist(x, centres).argmin(1)
    counts = torch.bincount(nearest, minlength=8)
    chi2 = ((counts - N / 8) ** 2 / (N / 8)).sum().item()
    assert chi2 < 40.0
    # mixture moments: mean 0, covariance (8^2/2 / 2 + 1/2) I
    squares = torch.stack((x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]), 1)
    assert z_scores(x, 0.0).abs().max() < 5
    assert z_scores(squares, torch.tensor([16.5, 16.5, 0.0], dtype=torch.float64)).abs().max() < 5
    # E ||x||^4 = sum over centres of (r^2 + 2 s2)^2 + 4 s2 r^2 + 4 s2^2 with r^2 = 32, s2 = 1/2
    assert abs(z_scores(x.square().sum(1, keepdim=True) ** 2, 33.0**2 + 64.0 + 1.0)).max() < 5


def test_spirals_lie_on_their_arms() -> None:
    x = data.load("spirals").train.double()
    torch.testing.assert_close(x[0::2], -x[1::2], rtol=0, atol=0)
    arm = x[0::2] * (3.0 / 2.3)
    n = torch.linspace(0, 3 * math.pi, 2001, dtype=torch.float64)
    curve = torch.stack((-n * n.cos(), n * n.sin()), 1)
    # the offset is in [0, 1/2]^2, the grid of n is spaced 0.005 and the arm's speed at most sqrt(1 + 9 pi^2)
    offset = arm[:2000, None] - curve
    outside = (-offset).clamp(min=0) + (offset - 0.5).clamp(min=0)
    assert outside.norm(dim=2).min(1).values.max() < 0.03
    # moments of the arm: E u'^2 terms and the integrals of n cos n, n^2 over n^2 uniform on [0, 9 pi^2]
    weight = 2 * n / (9 * math.pi**2)
    mean = torch.trapezoid(curve * weight[:, None], n, dim=0) + 0.25
    assert z_scores(arm, mean).abs().max() < 5
    second = torch.trapezoid(curve**2 * weight[:, None], n, dim=0) + 0.5 * (mean - 0.25) + 1 / 12
    assert z_scores(arm**2, second).abs().max() < 5


def test_digits_are_a_fixed_stratified_split() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    digit_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert len(digit_of) == len(images)  # no image stands twice, so none can be on both sides
    digits = data.load("digits")
    parts = [(part * 16).double().flatten(1).numpy() for part in (digits.train, digits.test)]
    found = [np.array([digit_of.pop(image.tobytes()) for image in part]) for part in parts]
    assert not digit_of  # each image is on exactly one side, to the bit
    for label in range(10):
        held_out = (found[1] == label).sum()
        assert abs(held_out - 0.2 * (labels == label).sum()) <= 1
    assert digits.image
    assert digits.train.dtype == torch.float32
    assert (digits.train.shape, digits.test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    torch.testing.assert_close(data.load("digits", seed=7).test, digits.test, rtol=0, atol=0)


@pytest.mark.parametrize("name", TOY)
def test_draws_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = data.load(name, points=101, seed=3)
    torch.manual_seed(2)
    again, other = data.load(name, points=101, seed=3), data.load(name, points=101, seed=4)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.test, again.test)
    drawn = torch.cat((first.train, first.test, other.train, other.test)).abs()
    # all four draws are different points (a spiral's x and -x count once)
    assert len(drawn.unique(dim=0)) == 4 * (51 if name == "spirals" else 101)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"one of digits, mnist-5k, .*, spirals, got 'mnist'"):
        data.load("mnist")
    with pytest.raises(ValueError, match="points: expected at least 1, got 0"):
        data.load("spirals", points=0)
