"""Metrics against their definitions, closed forms and float64 autograd.

Statistical bounds are 5 standard errors (two-sided error rate 6e-7 per figure), seeds fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gaussian import GaussianScore
from qcsbm_fast.metrics import asymmetry_by_level, oracle_score, precision_recall, score_error
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import SDE, VE, VP

TIMES = torch.linspace(0.0, 1.0, 5)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autograd_oracle(x: Tensor, data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gradient of the log mixture density, by autograd in float64 on the whole matrix of distances."""
    x = x.double().requires_grad_()
    flat, mean, std = x.flatten(1), mean.double()[:, None], std.double()[:, None]
    squared = (flat[:, None] - mean[:, None] * data.double().flatten(1)).square().sum(2)
    return torch.autograd.grad(torch.logsumexp(-squared / (2 * std.square()), 1).sum(), x)[0]


def test_oracle_score_is_the_gradient_of_the_log_mixture() -> None:
    data = normal(3000, 2, 2, seed=1) * 2.0 + 1.0  # several blocks, of samples too
    x = torch.cat(
        (normal(270, 2, 2, seed=2), 100.0 * normal(5, 2, 2, seed=3), data[:5])
    )  # far, and on points
    mean, std = torch.linspace(1.0, 0.3, 280).double(), torch.logspace(-2, 1, 280).double().roll(7)
    scale = (x.flatten(1).norm(dim=1) + 10.0) / std.square()  # the size of the terms that cancel
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        # the oracle of the rounded inputs
        inputs = [v.to(dtype) for v in (x, data, mean, std)]
        found = oracle_score(*inputs)
        assert found.dtype == dtype
        assert found.shape == x.shape
        expected = autograd_oracle(*inputs)
        error = (found.double() - expected).flatten(1).norm(dim=1)
        assert (error / scale).max() < bound


class Shifted:
    """The oracle of `data`, plus a constant."""

    def __init__(self, sde: SDE, data: Tensor, shift: float) -> None:
        self.sde, self.data, self.shift = sde, data, shift

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return oracle_score(x, self.data, *self.sde.marginal(t)) + self.shift


def test_score_error_of_known_scores() -> None:
    data = normal(5000, 2).float()
    for sde in (VE(0.1, 3.0), VP(0.1, 20.0)):
        args = (data, data[:300], TIMES + 1e-3, NoiseStream(0))
        assert (score_error(Shifted(sde, data, 0.0), *args, batch_size=64) == 0).all()
        shifted = score_error(Shifted(sde, data, 3.0), *args, batch_size=64)
        torch.testing.assert_close(shifted, torch.full((5,), 9.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_score_error_is_a_mean_over_the_noise() -> None:
    """For one data point the oracle is -z / std: the zero score errs by ||z||^2 / (2 std^2)."""

    class Zero:
        sde = VE(0.1, 3.0)

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    count, dim = 20_000, 3
    point = torch.tensor([[1.0, -2.0, 0.5]])
    errors = score_error(Zero(), point, point.expand(count, dim), TIMES, NoiseStream(1))
    std = Zero.sde.sigma(TIMES.double())
    z = (errors * 2 * std.square() - dim) / math.sqrt(2 * dim / count)
    assert z.abs().max() < 5
    assert z.unique().numel() == 5


class Linear(torch.nn.Module):
    """s = J x / std(t) with a learnt J: its Jacobian is the same everywhere."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sde = VE(0.1, 3.0)
        self.weight = torch.nn.Parameter(normal(dim, dim, seed=4).float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight.T / self.sde.sigma(t)[:, None]).view_as(x)


@pytest.mark.parametrize("exact", [True, False])
def test_asymmetry_of_a_linear_score(exact: bool) -> None:
    score, x0 = Linear(4), normal(3000, 1, 2, 2).float()
    levels = asymmetry_by_level(score, x0, TIMES, NoiseStream(2), exact=exact, batch_size=999)
    jacobian = score.weight.detach().double()
    antisymmetric = (jacobian - jacobian.T).square().sum()
    std = score.sde.sigma(TIMES.double())
    asym = 0.5 * antisymmetric / std.square()
    for value in (levels.asym, levels.asym_error, levels.nasym, levels.nasym_error):
        assert value.shape == TIMES.shape
        assert value.dtype == torch.float64
        assert not value.requires_grad
    if exact:
        torch.testing.assert_close(levels.asym, asym, rtol=1e-5, atol=0)
        nasym = 0.25 * antisymmetric / jacobian.square().sum()
        torch.testing.assert_close(levels.nasym, nasym.expand(5), rtol=1e-5, atol=0)
        assert (levels.asym_error < 1e-6 * asym).all()
    else:
        assert ((levels.asym - asym).abs() < 5 * levels.asym_error).all()
        # A^T A = B gives the probe variance of 1/2 v^T B v, v Rademacher: 1/2 sum_{i != j} B_ij^2
        gram = (jacobian - jacobian.T).T @ (jacobian - jacobian.T)
        variance = 0.5 * (gram.square().sum() - gram.diagonal().square().sum()) / std**4
        torch.testing.assert_close(levels.asym_error, (variance / 3000).sqrt(), rtol=0.1, atol=0)
    assert score.weight.grad is None


def test_a_gradient_field_has_none() -> None:
    score = GaussianScore(VE(0.1, 3.0))
    for exact in (True, False):
        levels = asymmetry_by_level(score, normal(100, 2).float(), TIMES, NoiseStream(3), exact=exact)
        assert levels.asym.max() < 1e-9
        assert levels.nasym.max() < 1e-12


def by_definition(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                radius = sorted(np.linalg.norm(np.delete(centres, i, 0) - centre, axis=1))[k - 1]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_definition(k: int) -> None:
    real, fake = normal(40, 3), 1.5 * normal(30, 3, seed=1) + 0.5
    expected = by_definition(real.numpy(), fake.numpy(), k)
    assert 0.1 < expected[0] < 0.9 or 0.1 < expected[1] < 0.9
    assert precision_recall(real, fake, k) == pytest.approx(expected)
    # far from the origin, where ||a||^2 + ||b||^2 - 2 a.b has lost the distance
    assert precision_recall(real + 2.0**26, fake + 2.0**26, k) == pytest.approx(expected)
    assert precision_recall(real.view(40, 1, 3), fake.view(30, 1, 3), k) == pytest.approx(expected)


def test_precision_and_recall_of_constructed_sets() -> None:
    cluster = normal(1500, 2)  # more than a block
    two = torch.cat((cluster, cluster + 100.0))
    assert precision_recall(cluster, cluster) == (1.0, 1.0)
    assert precision_recall(cluster, cluster + 100.0) == (0.0, 0.0)
    assert precision_recall(two, cluster) == (1.0, 0.5)  # a mode is missing
    assert precision_recall(cluster, two) == (0.5, 1.0)  # a mode is invented
    # closed balls: the neighbours' distance itself counts; repeated points are neighbours of each other
    line = torch.tensor([[0.0], [1.0], [2.0]])
    assert precision_recall(line, torch.tensor([[3.0], [3.5]]), k=1) == (0.5, 0.0)
    assert precision_recall(torch.zeros(3, 1), torch.tensor([[0.0], [1e-6], [5.0]]), k=1).precision == 1 / 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"k: expected 1 to 2, .* got 3"):
        precision_recall(torch.zeros(5, 2), torch.zeros(3, 2), k=3)
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 3))
