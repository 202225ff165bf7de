"""Controllable generation without a conditional model: part of the sample is given (Song et al. 2021,
appendix I.2).

After each step of a sampler the given coordinates are replaced by a draw of what they are at that time, the
given values carried along the forward process; the score does the rest. As the free coordinates see the given
ones through noise, this samples their conditional law approximately; more corrector steps come closer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import SDE


@dataclass(frozen=True)
class Known:
    """Coordinates that are given, in the orthonormal basis `basis` of the channels if there is one.

    Attributes:
        values: `(B, *)` or `(1, *)`, the given values, in that basis; what is not given does not matter.
        mask: broadcasts over `values`: 1 where given, 0 where to be drawn.
        basis: `(C, C)` orthogonal, its rows the basis vectors: coordinates are `basis x` along dimension 1.
    """

    values: Tensor
    mask: Tensor
    basis: Tensor | None = None

    def impose(
        self, x: Tensor, mean: Tensor, sde: SDE, time: float, stream: NoiseStream
    ) -> tuple[Tensor, Tensor]:
        """`x (B, *)` at `time` with the given coordinates drawn, and its `mean` with them noise-free."""
        scale, std = (float(v) for v in sde.marginal(torch.tensor([time], dtype=torch.float64)))
        values, mask = self.values.to(x), self.mask.to(x)
        given_mean = (scale * values).expand_as(x)
        given = given_mean + std * stream.normal(x.shape, x.dtype)
        return tuple(
            self._from_basis(torch.lerp(self._to_basis(free), fixed, mask.expand_as(x)))
            for free, fixed in ((x, given), (mean, given_mean))
        )  # pyright: ignore[reportReturnType]

    def _to_basis(self, x: Tensor) -> Tensor:
        return x if self.basis is None else torch.einsum("dc,bc...->bd...", self.basis.to(x), x)

    def _from_basis(self, x: Tensor) -> Tensor:
        return x if self.basis is None else torch.einsum("dc,bd...->bc...", self.basis.to(x), x)


def inpainting(image: Tensor, mask: Tensor) -> Known:
    """Draw what is missing: `image (B, *)`, `mask` 1 where it is given, 0 where not, broadcasting over
    `image`.

    Raises ValueError where the mask does not broadcast or holds another number.
    """
    try:
        full = mask.expand_as(image)
    except RuntimeError:
        raise ValueError(
            f"mask: expected a shape that broadcasts to {tuple(image.shape)}, got {tuple(mask.shape)}"
        ) from None
    if not ((full == 0) | (full == 1)).all():
        raise ValueError("mask: expected zeros and ones only; use (mask > 0.5).float()")
    return Known(image, mask)


def colorisation(grey: Tensor) -> Known:
    """Draw three channels whose mean is `grey (B, 1, H, W)`.

    In an orthonormal basis of the channels that begins with (1, 1, 1) / sqrt 3, the first coordinate, sqrt 3
    grey, is given. Raises ValueError unless `grey` has one channel.
    """
    if grey.dim() != 4 or grey.shape[1] != 1:
        raise ValueError(f"grey: expected (B, 1, H, W), got {tuple(grey.shape)}")
    r3, r2, r6 = 1 / math.sqrt(3), 1 / math.sqrt(2), 1 / math.sqrt(6)
    basis = torch.tensor([[r3, r3, r3], [r2, -r2, 0.0], [r6, r6, -2 * r6]], dtype=torch.float64)
    values = torch.cat((math.sqrt(3) * grey, torch.zeros_like(grey).expand(-1, 2, -1, -1)), 1)
    mask = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    return Known(values, mask, basis)
