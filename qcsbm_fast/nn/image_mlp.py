"""A residual network of fully connected layers for small images."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..dual import V
from .layers import Linear, LinearSwish, LogFourierEmbedding, bias_act

_SPREAD = 0.5  # of data in [0, 1], as an upper bound


class _Block(nn.Module):
    """`h + W2 Swish(W1 h + e(sigma))`: the embedding is a bias of its own for each sample."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.inner = Linear(width, width)
        self.embed = nn.Linear(embedding, width)
        self.outer = Linear(width, width)
        nn.init.zeros_(self.outer.bias)
        nn.init.normal_(self.outer.weight, std=0.1 / math.sqrt(width))

    def forward(self, h: V, embedding: Tensor) -> V:
        inner = self.inner(h) + self.embed(embedding)
        return h + self.outer(bias_act(inner, None, None, "swish"))


class ImageMLP(nn.Module):
    """The field `f(x, sigma)` of images in [0, 1], `(B, *), (B,) -> (B, *)`, for tensors and duals.

    With `u = x - 1/2` and `d = 1/2` the spread of a pixel, `f = a(sigma) u + b(sigma) F(u / sqrt(sigma^2 + d^2))`:
    the linear part is what is right where noise drowns the data, so that the layers `F` learn the rest (Karras et
    al. 2022, arXiv 2206.00364, Section 5). For a score `f / sigma`: `a = -sigma / (sigma^2 + d^2)`,
    `b = d / sqrt(sigma^2 + d^2)`. For an energy `||f||^2 / (2 sigma)`, whose gradient is quadratic in `f`:
    `a = sqrt(sigma / (sigma^2 + d^2))` and the square root of that `b`.

    Args:
        dim: number of values of one image.
        width: channels of the residual stream.
        depth: number of residual blocks.
        energy: whether the field is used as an energy.
    """

    def __init__(self, dim: int, width: int = 512, depth: int = 3, energy: bool = False):
        super().__init__()
        embedding = 128
        self.energy = energy
        self.embed = nn.Sequential(LogFourierEmbedding(64, scale=0.5), LinearSwish(2 * 64, embedding))
        self.input = Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(depth))
        self.output = Linear(width, dim)
        nn.init.normal_(self.output.weight, std=1e-2 / math.sqrt(width))

    def forward(self, x: V, sigma: Tensor) -> V:
        shape, embedding, sigma = x.shape, self.embed(sigma), sigma[:, None]
        total = (sigma**2 + _SPREAD**2).sqrt()
        if self.energy:
            linear, rest = sigma.sqrt() / total, (_SPREAD / total).sqrt()
        else:
            linear, rest = -sigma / total**2, _SPREAD / total
        u = (x - 0.5).flatten(1)
        h = self.input(u / total)
        for block in self.blocks:
            h = block(h, embedding)
        return (u * linear + self.output(h) * rest).reshape(*shape)
