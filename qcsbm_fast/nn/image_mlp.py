"""A residual network of fully connected layers for small images."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..dual import V
from .layers import Linear, LinearSwish, LogFourierEmbedding, bias_act


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
    """The field `f(x, sigma)` of images, `(B, *), (B,) -> (B, *)`, for tensors and duals; a score is `f / sigma`.

    The input is centred and scaled to unit size at every noise level.

    Args:
        dim: number of values of one image.
        width: channels of the residual stream.
        depth: number of residual blocks.
    """

    def __init__(self, dim: int, width: int = 512, depth: int = 3):
        super().__init__()
        embedding = 128
        self.embed = nn.Sequential(LogFourierEmbedding(64, scale=0.5), LinearSwish(2 * 64, embedding))
        self.input = Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(depth))
        self.output = Linear(width, dim)
        nn.init.normal_(self.output.weight, std=1e-2 / math.sqrt(width))

    def forward(self, x: V, sigma: Tensor) -> V:
        shape = x.shape
        embedding = self.embed(sigma)
        h = self.input(((x - 0.5).flatten(1)) / (sigma**2 + 0.25).sqrt()[:, None])
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(h).reshape(*shape)
