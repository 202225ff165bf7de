"""Langevin chains for a score at one noise level: unadjusted, and with Metropolis's correction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.noise import noisy_step

Field = Callable[[Tensor], Tensor]
"""`(B, *) -> (B, *)`, such as `lambda x: score(x, t)`."""


@torch.no_grad()
def unadjusted_langevin(
    field: Field, x: Tensor, step_sizes: Sequence[float], *, stream: NoiseStream
) -> Tensor:
    """The states `(B, *)` after a step x' = x + h/2 field(x) + sqrt(h) z for every h in `step_sizes`.

    With a field that is a noisy estimate of the score, such as that of a mini-batch, and falling sizes it is
    stochastic gradient Langevin dynamics (Welling & Teh 2011).
    """
    for size in step_sizes:
        x, _ = noisy_step(x, field(x), 1.0, 0.5 * size, math.sqrt(size), stream)
    return x


class MetropolisResult(NamedTuple):
    """The states `(B, *)`, and the share of each chain's proposals that was accepted, `(B,)`."""

    x: Tensor
    accepted: Tensor


@torch.no_grad()
def metropolis_langevin(
    field: Field, x: Tensor, step_sizes: Sequence[float], *, stream: NoiseStream, points: int = 8
) -> MetropolisResult:
    """The chain of `unadjusted_langevin` with every step accepted or refused (Roberts & Tweedie 1996).

    The ratio of densities in Metropolis's rule is the score's `line_integral` along the step. The density
    that belongs to a conservative score is then left as it is, whatever the sizes; another field has no
    density, and the chain is only the paper's comparison (arXiv 2209.12753, section 3.1).
    """
    here, taken = field(x), x.new_zeros(len(x))
    for size in step_sizes:
        proposal, mean = noisy_step(x, here, 1.0, 0.5 * size, math.sqrt(size), stream)
        there = field(proposal)
        backward = x - proposal - 0.5 * size * there
        log_ratio = line_integral(field, x, proposal, points) + _half_square(proposal - mean, backward) / size
        accepted = stream.uniform((len(x),)).log().to(x) < log_ratio
        keep = accepted.view(-1, *(1,) * (x.dim() - 1))
        x, here = torch.where(keep, proposal, x), torch.where(keep, there, here)
        taken += accepted
    return MetropolisResult(x, taken / len(step_sizes))


def _half_square(forward: Tensor, backward: Tensor) -> Tensor:
    """`(||forward||^2 - ||backward||^2) / 2`, `(B,)`."""
    return 0.5 * ((forward - backward) * (forward + backward)).flatten(1).sum(1)


@torch.no_grad()
def line_integral(field: Field, start: Tensor, end: Tensor, points: int = 8) -> Tensor:
    """The integral `(B,)` of `field` along the segment from `start (B, *)` to `end (B, *)`.

    By the Gauss-Legendre rule of `points` points, exact for polynomials of degree 2 points - 1. For the score
    of a density it is log p(end) - log p(start).
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    step = end - start
    total = torch.zeros_like(start)
    for node, weight in zip(nodes, weights, strict=True):
        total = torch.add(total, field(start + 0.5 * (1.0 + node) * step), alpha=0.5 * weight)
    return (total * step).flatten(1).sum(1)
