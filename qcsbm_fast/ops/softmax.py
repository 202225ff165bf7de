"""Softmax over the last dimension, its tangents, and the adjoints of both.

With `p = softmax(z)`: a tangent `d` gives `p' = p (d - <p, d>)`, a cotangent `g` gives `p (g - <p, g>)`: the
map is symmetric. The joint adjoint of value and tangents is

    gd_k = p (g'_k - <p, g'_k>),
    gz   = p (h - <p, h>),   h = g + sum_k [g'_k (d_k - <p, d_k>) - <p, g'_k> d_k].

The largest element is subtracted first. Computed in float32 (float64 for float64); deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import fail, floating, like
from .registry import Op, accumulate_dtype


def _dot(p: Tensor, value: Tensor) -> Tensor:
    return (p * value).sum(-1, keepdim=True)


def _reference(z: Tensor) -> Tensor:
    return torch.softmax(z.to(accumulate_dtype(z.dtype)), -1).to(z.dtype)


def _reference_jvp(z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(z.to(accumulate_dtype(z.dtype)), -1)
    return p.to(z.dtype), (p * (tangents - _dot(p, tangents))).to(z.dtype)


def _reference_vjp(g: Tensor, p: Tensor) -> Tensor:
    p_, g_ = (v.to(accumulate_dtype(p.dtype)) for v in (p, g))
    return (p_ * (g_ - _dot(p_, g_))).to(p.dtype)


def _reference_jvp_vjp(g: Tensor | None, gdot: Tensor, p: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    p_, gdot_, d = (v.to(accumulate_dtype(p.dtype)) for v in (p, gdot, tangents))
    inner = _dot(p_, gdot_)
    h = (gdot_ * (d - _dot(p_, d)) - inner * d).sum(0)
    if g is not None:
        h = h + g
    return (p_ * (h - _dot(p_, h))).to(p.dtype), (p_ * (gdot_ - inner)).to(p.dtype)


_op = Op("softmax(Tensor z) -> Tensor", _reference)
_vjp = Op("softmax_vjp(Tensor g, Tensor p) -> Tensor", _reference_vjp)
_jvp = Op("softmax_jvp(Tensor z, Tensor tangents) -> (Tensor, Tensor)", _reference_jvp)
_jvp_vjp = Op(
    "softmax_jvp_vjp(Tensor? g, Tensor gdot, Tensor p, Tensor tangents) -> (Tensor, Tensor)",
    _reference_jvp_vjp,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None) -> Tensor | None:
    if g is None:
        return None
    (p,) = ctx.saved_tensors
    return _vjp(g.contiguous(), p)


def _jvp_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[1])
    ctx.set_materialize_grads(False)


def _jvp_backward(ctx: Any, g: Tensor | None, gdot: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    p, tangents = ctx.saved_tensors
    g = None if g is None else g.contiguous()
    if gdot is None:
        return None if g is None else _vjp(g, p), None
    return _jvp_vjp(g, gdot.contiguous(), p, tangents)


_op.set_backward(_backward, _save)
_jvp.set_backward(_jvp_backward, _jvp_save)


def _checked(z: Tensor) -> Tensor:
    z = floating("softmax", "z", z)
    if z.dim() < 1:
        fail("softmax", "z", "at least one dimension", z)
    return z


def softmax(z: Tensor) -> Tensor:
    """`e^z / sum e^z` over the last dimension of `z` `(*, N)`."""
    return _op(_checked(z))


def softmax_jvp(z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax `(*, N)` and its derivatives along `tangents` `(K, *, N)`, of the dtype and device of `z`."""
    z, tangents = _checked(z), floating("softmax", "tangents", tangents)
    return _jvp(z, like("softmax", "tangents", tangents, z, lead=tangents.shape[:1]))
