"""The merge of a residual branch, `y = scale (a + b)`, in one pass; both cotangents are `scale g`, computed
once.

Linear, so that tangents take the same op. Computed in float32 (float64 for float64) and rounded once;
deterministic.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .check import any_layout, describe, fail
from .layout import to_channels_last
from .registry import Op, accumulate_dtype


def _reference(a: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = accumulate_dtype(a.dtype)
    return ((a.to(dtype) + b.to(dtype)) * scale).to(a.dtype)


_op = Op("scaled_add(Tensor a, Tensor b, float scale) -> Tensor", _reference)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[2]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    if g is None:  # J^T v of a dual pass: the tangents have no cotangent, and zeros would cost as much as one
        return None, None, None
    scaled = g * ctx.scale
    return scaled, scaled, None


_op.set_backward(_backward, _save)


def scaled_add(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale (a + b)` of images `(*, C, H, W)` of one shape, dtype and device, best channels-last; the result
    is.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    a, b = any_layout("scaled_add", "a", a), any_layout("scaled_add", "b", b)
    if a.dim() < 4:
        fail("scaled_add", "a", "images (*, C, H, W)", a)
    if b.shape != a.shape or b.dtype != a.dtype or b.device != a.device:
        fail("scaled_add", "b", describe(a), b)
    return _op(to_channels_last(a), to_channels_last(b), scale)
