"""Noise by the index of the sample, so that a job can be cut into batches and shared out at will."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.ops.registry import per_row
from qcsbm_fast.random import NoiseStream

_BLOCK = 1 << 16  # elements that share a Philox offset
_DRAW_BITS = 32  # an offset is the number of the draw, and above it that of the block
_OWN_DRAWS = 1 << 62  # apart from every block


class SampleNoise(NoiseStream):
    """The noise of the samples `first`, `first + 1`, ... of a job, a function of seed, draw and sample index
    alone.

    In draws of size `(B, *)`, sample i of the job gets the same numbers from whichever batch it is in. (All
    elements of a draw for the whole job, in row-major order, are cut into blocks with a Philox offset each; a
    batch draws the blocks that it touches.) `draw()`, for ops that make noise themselves, gives every batch a
    state of its own.

    Args:
        seed: of the job, 0 <= seed < 2^63.
        first: index of the batch's first sample in the job, 0 <= first < 2^30.
        device: where the draws are made.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, seed: int, first: int, device: torch.device | str = "cpu"):
        super().__init__(seed, device)
        if not 0 <= first < 1 << 30:
            raise ValueError(f"SampleNoise: first expected 0 <= first < 2^30, got {first}")
        self.first = first
        self._state[1] = _OWN_DRAWS + (first << _DRAW_BITS)

    def normal(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._draw_by_index(ops.philox_normal, size, dtype)

    def uniform(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._draw_by_index(ops.philox_uniform, size, dtype)

    def rademacher(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._draw_by_index(ops.rademacher, size, dtype)

    def _draw_by_index(self, op: Callable[..., Tensor], size: Sequence[int], dtype: torch.dtype) -> Tensor:
        state = self.draw()
        state[1].bitwise_and_((1 << _DRAW_BITS) - 1)
        dim = math.prod(size[1:])
        begin, end = self.first * dim, (self.first + size[0]) * dim
        parts = []
        for block in range(begin // _BLOCK, max(end - 1, begin) // _BLOCK + 1):
            own = state.clone()
            own[1] += block << _DRAW_BITS
            elements = op(own, (min(end - block * _BLOCK, _BLOCK),), dtype)
            parts.append(elements[max(begin - block * _BLOCK, 0) :])
        return torch.cat(parts).view(tuple(size))


def noisy_step(
    x: Tensor,
    score: Tensor,
    a: float | Tensor,
    b: float | Tensor,
    c: float | Tensor,
    stream: NoiseStream,
) -> tuple[Tensor, Tensor]:
    """`(x', mean)` with mean = a x + b score and x' = mean + c z: `ops.sde_step` with the stream's noise.

    The coefficients are numbers, or tensors `(B,)` on the device of `x`.
    """
    if not isinstance(stream, SampleNoise):
        return ops.sde_step(x, score, a, b, c, stream.draw())
    z = stream.normal(x.shape, x.dtype)
    if isinstance(a, Tensor) or isinstance(b, Tensor) or isinstance(c, Tensor):
        a, b, c = (per_row(v.to(x.dtype), x) if isinstance(v, Tensor) else v for v in (a, b, c))
        mean = a * x + b * score
        return mean + c * z, mean
    mean = torch.add(a * x, score, alpha=b)
    return torch.add(mean, z, alpha=c), mean
