"""Embeddings of the noise level for image networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .image_layers import scaled_uniform_


class FourierFeatures(nn.Module):
    """Random Fourier features of `log sigma`, `(B,) -> (B, 2 features)` (Tancik et al. 2020; Song et al.
    2021).

    In float64: at scale 16 the phase reaches some thousand, where float32 has lost four digits.
    """

    frequencies: Tensor

    def __init__(self, features: int, scale: float):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(features) * scale)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = sigma.double().log()[:, None] * self.frequencies.double() * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], -1)


class PositionalFeatures(nn.Module):
    """Sines and cosines of the step nearest to `sigma`, `(B,) -> (B, features)` (Vaswani et al. 2017; Ho et
    al. 2020).

    The steps `0 ... steps - 1` are a geometric sequence of noise levels from `sigma_max` down to `sigma_min`.
    In float32, as
    the authors compute it: whole steps have exact angles only up to rounding, and their networks were trained
        with it.
    """

    def __init__(self, features: int, sigma_min: float, sigma_max: float, steps: int):
        super().__init__()
        self.features = features
        self.log_max, self.spacing = math.log(sigma_max), math.log(sigma_max / sigma_min) / (steps - 1)

    def forward(self, sigma: Tensor) -> Tensor:
        step = ((self.log_max - sigma.double().log()) / self.spacing).round().float()
        half = self.features // 2
        frequencies = torch.exp(torch.arange(half, device=sigma.device) * (-math.log(10_000) / (half - 1)))
        angle = step[:, None] * frequencies
        return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, self.features % 2))


class NoiseEmbedding(nn.Module):
    """`SiLU(W2 SiLU(W1 features))`, `(B, inputs) -> (B, width)`: what the blocks turn into biases."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.hidden = initialise(nn.Linear(inputs, width))
        self.out = initialise(nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return F.silu(self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype)))))


def initialise(layer: nn.Linear, scale: float = 1.0) -> nn.Linear:
    """`layer` with the authors' initialisation (`scaled_uniform_`) and no bias."""
    scaled_uniform_(layer.weight.data, scale)
    nn.init.zeros_(layer.bias)
    return layer
