"""Divergence of a vector field from tangents alone: no graph, no backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .linearize import push
from .penalty import Distribution, check_batch, draw_probes, unit_tangents
from .random import NoiseStream, as_stream


def divergence(
    fn: Callable[[Any], Any],
    x: Tensor,
    *,
    probes: int = 1,
    distribution: Distribution = "rademacher",
    v: Tensor | None = None,
    exact: bool = False,
    generator: NoiseStream | torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`fn(x)` `(B, *)` and `tr J` `(B,)`, estimated as the mean of `<v, J v>` over probes (Hutchinson 1989) or exact.

    Arguments and errors as `penalty.asymmetry`.
    """
    check_batch(x, v)
    if exact:
        v = unit_tangents(x)
    elif v is None:
        v = draw_probes(x, probes, distribution, as_stream(generator, x.device))
    with torch.no_grad():
        at = push(fn, x, v)
        products = (v * at.jv).flatten(2).sum(2)
    return at.value, products.sum(0) if exact else products.mean(0)
