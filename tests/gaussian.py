"""A score in closed form, for the samplers, the likelihood and the metrics: Gaussian data."""

from __future__ import annotations

import torch
from torch import Tensor

from qcsbm_fast.sde import SDE

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=torch.float64)


class GaussianScore:
    """Score of x_t under `sde` when x_0 ~ N(mean (D,), covariance (D, D))."""

    def __init__(self, sde: SDE, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> None:
        self.sde, self.mean = sde, mean
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)

    def spectrum(self, t: Tensor) -> Tensor:
        """`(B, D)`: the variances of x_t along the columns of `basis`, in float64."""
        mean, std = self.sde.marginal(t.double())
        return mean.square()[:, None] * self.eigenvalues + std.square()[:, None]

    def centre(self, t: Tensor) -> Tensor:
        """`(B, D)`: the mean of x_t."""
        return self.sde.marginal(t.double())[0][:, None] * self.mean

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        basis = self.basis.to(x)
        along = (x - self.centre(t).to(x)) @ basis
        return -(along / self.spectrum(t).to(x)) @ basis.T

    def transport(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the probability-flow ODE takes `x (B, D)` from time `start` to `end`.

        Every deviation from the mean keeps its size in standard deviations.
        """
        times = torch.tensor([start, end], dtype=torch.float64)
        (m0, m1), (v0, v1) = self.centre(times), self.spectrum(times)
        return m1 + ((x.double() - m0) @ self.basis * (v1 / v0).sqrt()) @ self.basis.T

    def log_stretch(self, start: float, end: float) -> float:
        """Logarithm of the volume factor of `transport`."""
        before, after = self.spectrum(torch.tensor([start, end], dtype=torch.float64))
        return 0.5 * (after / before).log().sum().item()
