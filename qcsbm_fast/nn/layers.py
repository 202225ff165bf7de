"""Layers that take and return a plain tensor or a `Dual`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .. import dual, ops
from ..dual import Dual, V

Kind = Literal["swish", "elu", "leaky_relu"]


def bias_act(x: V, bias: Tensor | None, p: Tensor | None, kind: Kind, constant: float = 1.0) -> V:
    """`f(x + bias; p)` over the last dimension of `x` `(*, C)`; a dual's tangents share one read of the primal."""
    if isinstance(x, Dual):
        return Dual(*ops.bias_act_jvp(x.primal, x.tangents, bias, p, kind=kind, constant=constant))
    return ops.bias_act(x, bias, p, kind=kind, constant=constant)


class Activation(nn.Module):
    """ELU or LeakyReLU with a fixed constant, or Swish `x sigmoid(p x)` with one learnt `p` per channel, 1 at first."""

    def __init__(self, channels: int, kind: Kind, constant: float = 1.0):
        super().__init__()
        self.kind: Kind = kind
        self.constant = constant
        self.p = nn.Parameter(torch.ones(channels)) if kind == "swish" else None

    def forward(self, x: V) -> V:
        return bias_act(x, None, self.p, self.kind, self.constant)


class LinearSwish(nn.Linear):
    """Linear layer and Swish, one learnt parameter per channel; bias and activation in one pass: `(*, C) -> (*, D)`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.p = nn.Parameter(torch.ones(out_features))

    def forward(self, x: V) -> V:  # pyright: ignore[reportIncompatibleMethodOverride]
        return bias_act(dual.linear(x, self.weight), self.bias, self.p, "swish")


class Linear(nn.Linear):
    """Linear layer: `(*, C) -> (*, D)`."""

    def forward(self, x: V) -> V:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dual.linear(x, self.weight, self.bias)


class LogFourierEmbedding(nn.Module):
    """Random Fourier features of `log sigma`: `(B,) -> (B, 2 features)` (Tancik et al. 2020; Song et al. 2021)."""

    frequencies: Tensor

    def __init__(self, features: int, scale: float):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(features) * scale)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = torch.log(sigma)[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], -1)
