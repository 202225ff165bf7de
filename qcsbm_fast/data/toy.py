"""The three 2-D distributions of arXiv 2209.12753, section 3.2."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def checkerboard(points: int, generator: Generator) -> Tensor:
    """`(points, 2)`: uniform on the eight squares of side 3 of one colour of a 4 x 4 board on [-6, 6]^2.

    x1 = 4u - 2, x2 = u' - 2b + (floor(x1) mod 2), times 3, with u, u' uniform and b a fair coin.
    """
    first = 4.0 * torch.rand(points, generator=generator) - 2.0
    row = torch.randint(2, (points,), generator=generator)
    second = torch.rand(points, generator=generator) - 2.0 * row + first.floor().remainder(2.0)
    return 3.0 * torch.stack((first, second), 1)


def eight_gaussians(points: int, generator: Generator) -> Tensor:
    """`(points, 2)`: an equal mixture of eight normals of variance 1/2 on the circle of radius 8/sqrt(2).

    Centre 8 (cos, sin) of a multiple of 45 degrees, plus a unit normal, times 1/sqrt(2).
    """
    angle = torch.randint(8, (points,), generator=generator) * (math.pi / 4.0)
    centre = 8.0 * torch.stack((angle.cos(), angle.sin()), 1)
    return (centre + torch.randn(points, 2, generator=generator)) / math.sqrt(2.0)


def spirals(points: int, generator: Generator) -> Tensor:
    """`(points, 2)`: two spiral arms, each other's negative.

    With n = 3 pi sqrt(u) an arm is (-n cos n + u'/2, n sin n + u''/2), all times 2.3/3. Points come in pairs
    x, -x, side by side, so that any prefix of the set holds both arms.
    """
    half = (points + 1) // 2
    n = 3.0 * math.pi * torch.rand(half, generator=generator).sqrt()
    arm = torch.stack((-n * n.cos(), n * n.sin()), 1) + 0.5 * torch.rand(half, 2, generator=generator)
    return (2.3 / 3.0) * torch.stack((arm, -arm), 1).reshape(-1, 2)[:points]
