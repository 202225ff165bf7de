"""Metrics of samples: density and coverage, Wasserstein and feature distances, against definitions and other code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qcsbm_fast.metrics import (
    classifier_score,
    density_coverage,
    extract,
    frechet_distance,
    kernel_distance,
    sliced_wasserstein2,
    wasserstein2,
)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 4])
def test_density_and_coverage_are_the_definition(k: int) -> None:
    real, fake = normal(40, 3), 1.5 * normal(30, 3, seed=1) + 0.5
    r, f = real.numpy(), fake.numpy()
    radii = [sorted(np.linalg.norm(np.delete(r, i, 0) - r[i], axis=1))[k - 1] for i in range(40)]
    inside = np.linalg.norm(r[:, None] - f[None], axis=2) <= np.array(radii)[:, None]
    found = density_coverage(real, fake, k)
    assert found.density == pytest.approx(inside.sum() / (k * 30))
    assert found.coverage == pytest.approx(inside.any(1).mean())
    assert density_coverage(real, fake[:1], k).coverage <= 1  # one sample is enough on the other side
    with pytest.raises(ValueError, match="k: expected 1 to 39"):
        density_coverage(real, fake, 40)


def test_density_is_one_for_equal_laws_and_coverage_sees_a_missing_mode() -> None:
    """E density = 1 exactly; 1500 points leave it a standard deviation of about 2%."""
    real, fake = normal(1500, 2), normal(1500, 2, seed=1)
    found = density_coverage(real, fake)
    assert abs(found.density - 1) < 0.1
    assert found.coverage > 0.93  # 1 - 2^-5 for continuous laws
    assert density_coverage(torch.cat((real, real + 100)), fake).coverage == pytest.approx(found.coverage / 2)


def test_wasserstein_of_shifted_and_scaled_sets() -> None:
    pytest.importorskip("ot")
    x = normal(300, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    assert wasserstein2(x, x[torch.randperm(300)] + shift) == pytest.approx(shift.norm().item())
    spread = (x - x.mean(0)).square().sum(1).mean().sqrt().item()
    assert wasserstein2(x - x.mean(0), 3 * (x - x.mean(0))) == pytest.approx(2 * spread)
    # a random direction sees 1/D of a squared shift: 2000 directions, 5 standard errors of cos^2
    sliced = sliced_wasserstein2(x, x + shift, projections=2000) ** 2
    mean, deviation = shift.square().sum().item() / 4, math.sqrt(1 / 8 - 1 / 16) * shift.square().sum().item()
    assert abs(sliced - mean) < 5 * deviation / math.sqrt(2000)
    with pytest.raises(ValueError, match=r"at most 5000 each, got \(5001, 1\)"):
        wasserstein2(torch.zeros(5001, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("count", [500, 12])  # with fewer samples than features the covariance is singular
def test_frechet_distance(count: int) -> None:
    """The definition by SciPy's matrix root; and the closed form for commuting covariances."""
    from scipy.linalg import sqrtm

    a, b = normal(count, 16), 1.5 * normal(400, 16, seed=1) @ normal(16, 16, seed=2) / 4 + 0.3
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = np.asarray(sqrtm(ca @ cb))
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(ca + cb - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, 2 * a + 1) == pytest.approx(
        (a.mean(0) + 1).square().sum().item() + np.trace(ca), rel=1e-9
    )
    assert frechet_distance(a, a) < 1e-8
    with pytest.raises(ValueError, match=r"features \(N, F\)"):
        frechet_distance(a, b[:, :3])


def test_feature_distances_against_torchmetrics() -> None:
    """On one set of images and one small network, the same numbers as torchmetrics gives."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Network(torch.nn.Module):
        num_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(x.double(), 4)[:, :, :1, :2].flatten(1)

    network = Network()
    a, b = normal(120, 3, 8, 8), 1.2 * normal(120, 3, 8, 8, seed=1) + 0.1
    theirs = fid.FrechetInceptionDistance(feature=network, normalize=True)
    for images, real in ((a, True), (b, False)):
        theirs.update(images, real=real)
    features = [extract(network, images, batch_size=50) for images in (a, b)]
    assert frechet_distance(*features) == pytest.approx(theirs.compute().item(), rel=1e-3)
    theirs = kid.KernelInceptionDistance(feature=network, subsets=1, subset_size=120, normalize=True)
    for images, real in ((a, True), (b, False)):
        theirs.update(images, real=real)
    found = kernel_distance(*features, subsets=1, size=120)
    assert found.mean == pytest.approx(theirs.compute()[0].item(), rel=1e-3)


def test_kernel_distance_is_unbiased() -> None:
    """Of two halves of one law: 0 within 5 standard errors over 60 independent pairs; apart for another law."""
    values = [
        kernel_distance(normal(40, 5, seed=i), normal(40, 5, seed=100 + i), subsets=1).mean for i in range(60)
    ]
    mean, error = np.mean(values), np.std(values) / math.sqrt(60)
    assert abs(mean) < 5 * error
    shifted = kernel_distance(normal(400, 5), normal(400, 5, seed=1) + 0.5, subsets=20, size=200)
    assert shifted.mean > 10 * shifted.error > 0


def test_classifier_score_of_sure_and_unsure_classifiers() -> None:
    sure = 1000.0 * torch.eye(7).repeat(3, 1)
    assert classifier_score(sure) == pytest.approx(7.0)
    assert classifier_score(torch.zeros(5, 7)) == pytest.approx(1.0)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    expected = math.exp((p * (p / p.mean(0)).log()).sum(1).mean())
    assert classifier_score(p.log()) == pytest.approx(expected)
