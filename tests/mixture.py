"""A score in closed form that is not linear: a mixture of Gaussians of one isotropic variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import SDE

CENTRES = torch.tensor([[-2.0, 0.0], [1.5, 1.0], [0.5, -1.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SPREAD = 0.4


class MixtureScore:
    """Score of x_t under `sde` when x_0 is a mixture of N(centre, spread^2 I) with weights."""

    def __init__(
        self, sde: SDE, centres: Tensor = CENTRES, weights: Tensor = WEIGHTS, spread: float = SPREAD
    ) -> None:
        self.sde, self.centres, self.weights, self.spread = sde, centres, weights, spread

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t `(B,)` at `x (B, D)`, in x's dtype."""
        mean, std = self.sde.marginal(t.to(x))
        variance = (mean * self.spread).square() + std.square()
        gap = (x[:, None] - mean[:, None, None] * self.centres.to(x)).square().sum(2)
        exponents = self.weights.to(x).log() - gap / (2 * variance[:, None])
        return exponents.logsumexp(1) - 0.5 * x.shape[1] * (2 * math.pi * variance).log()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        mean, std = self.sde.marginal(t.to(x))
        variance = (mean * self.spread).square() + std.square()
        offsets = mean[:, None, None] * self.centres.to(x) - x[:, None]
        weights = (self.weights.to(x).log() - offsets.square().sum(2) / (2 * variance[:, None])).softmax(1)
        return (weights[:, :, None] * offsets).sum(1) / variance[:, None]

    def sample(self, count: int, seed: int) -> Tensor:
        """`(count, D)` draws of x_0, float32."""
        stream = NoiseStream(seed)
        which = torch.searchsorted(self.weights.cumsum(0), stream.uniform((count,)).double())
        noise = stream.normal((count, self.centres.shape[1]))
        return self.centres[which.clamp(max=len(self.weights) - 1)].float() + self.spread * noise
