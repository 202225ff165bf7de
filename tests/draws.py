"""Random arguments of the ops, in every size and dtype."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.ops.registry import OPS, accumulate_dtype

Size = tuple[int, ...]


class Draw:
    """Random arguments of one call: the same numbers for every dtype, up to rounding."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=self.generator).to(self.dtype)

    def images(self, *size: int) -> Tensor:
        """`(*, C, H, W)`, stored channels-last as the image ops take it."""
        return self.normal(*size).movedim(-3, -1).contiguous().movedim(-1, -3)

    def vector(self, *size: int) -> Tensor:
        """Coefficients in [0.5, 1.5) in the accumulation dtype."""
        values = torch.rand(size, dtype=torch.float64, generator=self.generator) + 0.5
        return values.to(accumulate_dtype(self.dtype))

    def state(self) -> Tensor:
        """A seed and an offset that need both of their 32-bit words."""
        return torch.randint(2**62, (2,), generator=self.generator)


def fill(d: Draw, size: Size) -> tuple[Any, ...]:
    return d.state(), list(size), d.dtype


def activation(
    kind: str,
    constant: float,
    *,
    lead: Size | None = None,
    learnt: bool = True,
    grads: int = 0,
    g: bool = True,
) -> Callable[[Draw, Size], tuple[Any, ...]]:
    """Arguments `([g], [gdot], x, [tangents], bias, p, kind, constant)`: `lead` is `(K,)`, `grads` their cotangents."""

    def build(d: Draw, size: Size) -> tuple[Any, ...]:
        tangents = [d.normal(*lead, *size)] if lead is not None else []
        cotangents = [d.normal(*size) if g else None, *(d.normal(*t.shape) for t in tangents)][:grads]
        vectors = (d.vector(size[-1]) if learnt else None, d.vector(size[-1]) if learnt else None)
        return *cotangents, d.normal(*size), *tangents, *vectors, kind, constant

    return build


def group_norm(
    silu: bool, *, lead: Size | None = None, bias: bool = True, grads: int = 0, g: bool = True
) -> Callable[[Draw, Size], tuple[Any, ...]]:
    """Arguments `x, [tangents], bias, gamma, beta, groups, eps, silu`, in two groups of channels.

    With cotangents `[g], [gdot], x, [tangents], bias, gamma, beta, statistics..., groups, silu`.
    """

    def build(d: Draw, size: Size) -> tuple[Any, ...]:
        tangents = [d.images(*lead, *size)] if lead is not None else []
        cotangents = [d.images(*size) if g else None, *(d.images(*t.shape) for t in tangents)][:grads]
        vectors = (d.vector(*size[:2]) if bias else None, d.vector(size[1]), d.vector(size[1]))
        call = (d.images(*size), *tangents, *vectors)
        if not grads:
            return *call, 2, 1e-6, silu
        statistics = OPS[f"group_norm_silu{'_jvp' if tangents else ''}"].reference(*call, 2, 1e-6, silu)
        return *cotangents, *call, *statistics[1 + len(tangents) :], 2, silu

    return build


def convolution(
    *, lead: Size | None = None, bias: bool = True, taps: int = 3
) -> Callable[[Draw, Size], tuple[Any, ...]]:
    """Arguments `x, [tangents], weight, bias, transposed`, to five channels."""

    def build(d: Draw, size: Size) -> tuple[Any, ...]:
        tangents = [d.images(*lead, *size)] if lead is not None else []
        weight = d.images(5, size[1], taps, taps).to(accumulate_dtype(d.dtype))
        return d.images(*size), *tangents, weight, d.vector(5) if bias else None, False

    return build


def swish_mlp(
    probes: int, *, grads: int = 0, inputs: bool = True, weights: bool = True
) -> Callable[[Draw, Size], tuple[Any, ...]]:
    """Arguments `x, tangents, parameters, widths` of `(B, D_0, ...)`.

    With cotangents `g, gdot, x, tangents, pre, pre_dot, parameters, widths, inputs, weights`.
    """

    def build(d: Draw, size: Size) -> tuple[Any, ...]:
        rows, *widths = size
        dtype = accumulate_dtype(d.dtype)
        weight = [d.normal(out, before) * before**-0.5 for before, out in pairwise(widths)]
        vectors = [(d.vector(out) - 1, d.vector(out)) for out in widths[1:-1]]
        hidden = [part for w, pair in zip(weight, vectors, strict=False) for part in (w, *pair)]
        parts = (*hidden, d.vector(widths[-2]), weight[-1])
        parameters = torch.cat([part.flatten().to(dtype) for part in parts])

        def pushed(width: int, probes: int) -> tuple[Tensor, Tensor | None]:
            return d.normal(rows, width), d.normal(probes, rows, width) if probes else None

        x = pushed(widths[0], probes)
        if not grads:
            return *x, parameters, widths
        g = pushed(widths[-1], probes if grads > 1 else 0)
        columns = sum(widths[1:-1])
        pre = d.normal(rows, columns).to(dtype), d.normal(probes, rows, columns).to(dtype)
        return *g, *x, *pre, parameters, widths, inputs, weights

    return build


def swish_mlp_public(x: Tensor, t: Tensor | None, parameters: Tensor, widths: list[int]) -> Any:
    return ops.swish_mlp(x, parameters, widths) if t is None else ops.swish_mlp_jvp(x, t, parameters, widths)


def norm(public: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a: public(*a[:-3], groups=a[-3], eps=a[-2], silu=a[-1])


def fir(x: Tensor, taps: list[float], up: int, down: int, pad: int, rows: int, cols: int) -> Tensor:
    """`fir` takes the padding after the image where the op takes the size of the result."""
    height = x.shape[-2] if isinstance(x, Tensor) and x.dim() > 1 else 1
    after = (rows - 1) * down + len(taps) - pad - height * up
    return ops.fir(x, taps, up=up, down=down, pad=(pad, after))
