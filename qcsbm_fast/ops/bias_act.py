"""Bias and activation over the last dimension, `y = f(x + bias; p)`, its tangents and their adjoints.

Activations: Swish `x sigmoid(p x)` (Ramachandran et al. 2017) with a learnt `p` per channel, ELU `x` or
`p (e^x - 1)` (Clevert et al. 2016), LeakyReLU `x` or `p x`; for the last two `p` is a constant.
One read of `x` serves the value and all `K` tangents `f'(x + bias) t_k`; one read serves their joint adjoint
`gx = f' g + f'' sum_k gdot_k t_k`, `gt_k = f' gdot_k`. The parameter and bias gradients are sums over rows.

Computed in float32 (float64 for float64); deterministic; float32 error against float64 below 4e-7 of the largest
value (tests/test_ops.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import coefficients, fail, floating, like
from .registry import Op, accumulate_dtype

KINDS = ("swish", "elu", "leaky_relu")


def jet(x: Tensor, bias: Tensor | None, p: Tensor | None, kind: str, constant: float) -> tuple[Tensor, ...]:
    """f, f', f'', df/dp and df'/dp at x + bias, in the accumulation dtype."""
    u = x.to(accumulate_dtype(x.dtype))
    if bias is not None:
        u = u + bias
    q = torch.full((), constant, dtype=u.dtype, device=u.device) if p is None else p
    if kind == "swish":
        s = torch.sigmoid(q * u)
        ds = s * (1 - s)
        bend = 2 + q * u * (1 - 2 * s)
        return u * s, s + q * u * ds, q * ds * bend, u * u * ds, u * ds * bend
    positive, zero, one = u > 0, torch.zeros_like(u), torch.ones_like(u)
    if kind == "elu":
        e = torch.exp(u.clamp(max=0))
        below = (q * (e - 1), q * e, q * e, e - 1, e)
    elif kind == "leaky_relu":
        below = (q * u, q * one, zero, u, one)
    else:
        raise ValueError(f"bias_act: kind expected one of {', '.join(KINDS)}, got {kind!r}")
    above = (u, one, zero, zero, zero)
    return tuple(torch.where(positive, a, b) for a, b in zip(above, below, strict=True))


def _sum_rows(value: Tensor, wanted: Tensor | None) -> Tensor:
    return value.flatten(0, -2).sum(0) if wanted is not None else value.new_empty(0)


def _reference(x: Tensor, bias: Tensor | None, p: Tensor | None, kind: str, constant: float) -> Tensor:
    return jet(x, bias, p, kind, constant)[0].to(x.dtype)


def _reference_vjp(
    g: Tensor, x: Tensor, bias: Tensor | None, p: Tensor | None, kind: str, constant: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, dx, _, dp, _ = jet(x, bias, p, kind, constant)
    gx = dx * g
    return gx.to(x.dtype), _sum_rows(gx, bias), _sum_rows(dp * g, p)


def _reference_jvp(
    x: Tensor, tangents: Tensor, bias: Tensor | None, p: Tensor | None, kind: str, constant: float
) -> tuple[Tensor, Tensor]:
    y, dx, *_ = jet(x, bias, p, kind, constant)
    return y.to(x.dtype), (dx * tangents).to(x.dtype)


def _reference_jvp_vjp(
    g: Tensor | None,
    gdot: Tensor,
    x: Tensor,
    tangents: Tensor,
    bias: Tensor | None,
    p: Tensor | None,
    kind: str,
    constant: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, dx, dxx, dp, dxp = jet(x, bias, p, kind, constant)
    inner = (gdot.to(dx.dtype) * tangents).sum(0)
    gx, gp = dxx * inner, dxp * inner
    if g is not None:
        gx, gp = gx + dx * g, gp + dp * g
    return gx.to(x.dtype), (dx * gdot).to(x.dtype), _sum_rows(gx, bias), _sum_rows(gp, p)


_TAIL = "Tensor? bias, Tensor? p, str kind, float constant)"
_op = Op(f"bias_act(Tensor x, {_TAIL} -> Tensor", _reference)
_vjp = Op(f"bias_act_vjp(Tensor g, Tensor x, {_TAIL} -> (Tensor, Tensor, Tensor)", _reference_vjp)
_jvp = Op(f"bias_act_jvp(Tensor x, Tensor tangents, {_TAIL} -> (Tensor, Tensor)", _reference_jvp)
_jvp_vjp = Op(
    f"bias_act_jvp_vjp(Tensor? g, Tensor gdot, Tensor x, Tensor tangents, {_TAIL} "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _reference_jvp_vjp,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.kind, ctx.constant = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    if g is None:
        return (None,) * 5
    x, bias, p = ctx.saved_tensors
    gx, gbias, gp = _vjp(g.contiguous(), x, bias, p, ctx.kind, ctx.constant)
    return gx, None if bias is None else gbias, None if p is None else gp, None, None


def _jvp_backward(ctx: Any, g: Tensor | None, gdot: Tensor | None) -> tuple[Any, ...]:
    if g is None and gdot is None:
        return (None,) * 6
    x, tangents, bias, p = ctx.saved_tensors
    if gdot is None:
        assert g is not None
        gx, gbias, gp = _vjp(g.contiguous(), x, bias, p, ctx.kind, ctx.constant)
        gt = None
    else:
        gx, gt, gbias, gp = _jvp_vjp(
            None if g is None else g.contiguous(),
            gdot.contiguous(),
            x,
            tangents,
            bias,
            p,
            ctx.kind,
            ctx.constant,
        )
    return gx, gt, None if bias is None else gbias, None if p is None else gp, None, None


_op.set_backward(_backward, _save)
_jvp.set_backward(_jvp_backward, _save)


def _checked(
    x: Tensor, bias: Tensor | None, p: Tensor | None, kind: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if kind not in KINDS:
        raise ValueError(f"bias_act: kind expected one of {', '.join(KINDS)}, got {kind!r}")
    x = floating("bias_act", "x", x)
    if x.dim() < 1:
        fail("bias_act", "x", "at least one dimension", x)
    bias, p = (
        None if vector is None else coefficients("bias_act", name, vector, x.shape[-1:], x)
        for name, vector in (("bias", bias), ("p", p))
    )
    return x, bias, p


def bias_act(
    x: Tensor, bias: Tensor | None = None, p: Tensor | None = None, *, kind: str, constant: float = 1.0
) -> Tensor:
    """`f(x + bias; p)` over the last dimension.

    Args:
        x: `(*, C)`, any floating dtype.
        bias: `(C,)` or None.
        p: `(C,)`, the activation's parameter, or None for `constant` in every channel.
        kind: "swish", "elu" or "leaky_relu".

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device, or an unknown kind.
    """
    x, bias, p = _checked(x, bias, p, kind)
    return _op(x, bias, p, kind, constant)


def bias_act_jvp(
    x: Tensor,
    tangents: Tensor,
    bias: Tensor | None = None,
    p: Tensor | None = None,
    *,
    kind: str,
    constant: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`bias_act` and its tangents: `f(x + bias; p)` `(*, C)` and `f'(x + bias; p) t_k` `(K, *, C)`.

    Args as `bias_act`, and tangents: `(K, *, C)`, dtype and device of `x`.
    """
    x, bias, p = _checked(x, bias, p, kind)
    tangents = floating("bias_act", "tangents", tangents)
    tangents = like("bias_act", "tangents", tangents, x, lead=tangents.shape[:1])
    return _jvp(x, tangents, bias, p, kind, constant)
