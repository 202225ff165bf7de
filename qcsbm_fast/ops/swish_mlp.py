"""A network of linear layers and Swishes, with its tangents, as one op: on the CPU a block of samples goes through all
layers while it is in the cache.

    h_0 = x,   u_l = W_l h_{l-1} + b_l,   h_l = swish(u_l; p_l) for l = 1 ... L,   y = V swish(h_L; q),

`swish(u; p) = u sigmoid(p u)` with a learnt `p` per channel (Ramachandran et al. 2017), widths `D_0 ... D_{L+1}`. The
tangents `y' = J x'` share the read of the weights, and one pass gives the joint adjoint of both, see `bias_act`.

Computed in float32 (float64 for float64), of products in three of bfloat16 where `split_float32` allows them;
deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .bias_act import jet
from .check import coefficients, fail, floating, like
from .registry import Op, accumulate_dtype, gradient_wanted

Layer = tuple[Tensor, Tensor, Tensor]  # W, b, p


def _shapes(widths: Sequence[int]) -> list[tuple[int, ...]]:
    """Of the parameters, in their order."""
    hidden = [shape for d, out in pairwise(widths[:-1]) for shape in ((out, d), (out,), (out,))]
    return [*hidden, (widths[-2],), (widths[-1], widths[-2])]


def _unpack(parameters: Tensor, widths: Sequence[int]) -> tuple[list[Layer], Tensor, Tensor]:
    """The hidden layers, `q` and `V`."""
    shapes = _shapes(widths)
    parts = parameters.split([math.prod(shape) for shape in shapes])
    *hidden, q, head = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    return list(zip(*(iter(hidden),) * 3, strict=True)), q, head


def _activations(u: Tensor, udot: Tensor, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a hidden layer gives, and its tangents."""
    value, dx, *_ = jet(u, None, p, "swish", 1.0)
    tangents = dx * udot
    return (value, tangents) if q is None else _activations(value, tangents, q, None)


def _streams(x: Tensor, tangents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and tangents in the accumulation dtype."""
    wide = x.to(accumulate_dtype(x.dtype))
    return wide, wide.new_empty(0, *x.shape) if tangents is None else tangents.to(wide.dtype)


def _reference(
    x: Tensor, tangents: Tensor | None, parameters: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, q, head = _unpack(parameters, widths)
    h, hdot = _streams(x, tangents)
    kept, kept_tangents = [], []
    for number, (weight, bias, p) in enumerate(hidden, 1):
        u, udot = h @ weight.T + bias, hdot @ weight.T
        kept.append(u)
        kept_tangents.append(udot)
        h, hdot = _activations(u, udot, p, q if number == len(hidden) else None)
    pre, pre_tangents = torch.cat(kept, -1), torch.cat(kept_tangents, -1)
    return (h @ head.T).to(x.dtype), (hdot @ head.T).to(x.dtype), pre, pre_tangents


def _bend(g: Tensor, gdot: Tensor, u: Tensor, udot: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of a Swish: cotangents of `u` and its tangents, gradient of `p`."""
    _, dx, dxx, dp, dxp = jet(u, None, p, "swish", 1.0)
    inner = (gdot * udot).sum(0)
    return dx * g + dxx * inner, dx * gdot, (dp * g + dxp * inner).sum(0)


def _reference_vjp(
    g: Tensor,
    g_tangents: Tensor | None,
    x: Tensor,
    tangents: Tensor | None,
    pre: Tensor,
    pre_tangents: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    inputs: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, q, head = _unpack(parameters, widths)
    probes = 0 if g_tangents is None else pre_tangents.shape[0]
    cotangents = _streams(g, g_tangents)
    before = _streams(x, None if tangents is None else tangents[:probes])
    us, udots = (value.split(list(widths[1:-1]), -1) for value in (pre, pre_tangents[:probes]))
    outputs = []  # of the layers before, with their tangents
    for number, (u, udot, (_, _, p)) in enumerate(zip(us, udots, hidden, strict=True), 1):
        outputs.append(before)
        before = _activations(u, udot, p, q if number == len(hidden) else None)

    def through(weight: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
        """The weight's gradient; moves the cotangents through it."""
        nonlocal cotangents
        gradient = sum(c.flatten(0, -2).T @ h.flatten(0, -2) for c, h in zip(cotangents, given, strict=True))
        cotangents = tuple(c @ weight for c in cotangents)
        return gradient  # pyright: ignore[reportReturnType]

    found = [through(head, before)]
    for number in reversed(range(len(hidden))):
        weight, _, p = hidden[number]
        u, udot = us[number], udots[number]
        if number == len(hidden) - 1:
            *cotangents, gq = _bend(*cotangents, *_activations(u, udot, p, None), q)
            found.append(gq)
        *cotangents, gp = _bend(*cotangents, u, udot, p)
        gb = cotangents[0].sum(0)
        found += [gp, gb, through(weight, outputs[number])]
    gx, gtangents = (value.to(x.dtype) for value in cotangents)
    gparameters = torch.cat([part.flatten() for part in reversed(found)])
    if not inputs:
        gx, gtangents = gx.new_empty(0, gx.shape[1]), gx.new_empty(probes, 0, gx.shape[1])
    return gx, gtangents, gparameters if weights else gparameters.new_empty(0)


_op = Op(
    "swish_mlp(Tensor x, Tensor? tangents, Tensor parameters, int[] widths) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _reference,
)
_vjp = Op(
    "swish_mlp_vjp(Tensor g, Tensor? g_tangents, Tensor x, Tensor? tangents, Tensor pre, Tensor pre_tangents, "
    "Tensor parameters, int[] widths, bool inputs, bool weights) -> (Tensor, Tensor, Tensor)",
    _reference_vjp,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, tangents, parameters, ctx.widths = inputs
    _, _, pre, pre_tangents = output
    ctx.save_for_backward(x, tangents, pre, pre_tangents, parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, g_tangents: Tensor | None, *kept: Tensor | None) -> tuple[Any, ...]:
    if any(cotangent is not None for cotangent in kept):
        raise NotImplementedError("swish_mlp: the pre-activations have no derivative")
    x, tangents, pre, pre_tangents, parameters = ctx.saved_tensors
    gdot = None if tangents is None or g_tangents is None else g_tangents.contiguous()
    if g is None and gdot is None:
        return (None,) * 4
    g = x.new_zeros(x.shape[0], ctx.widths[-1]) if g is None else g.contiguous()
    *arguments, last = range(2 if tangents is None else 3)
    inputs, weights = gradient_wanted(ctx, *arguments), gradient_wanted(ctx, last)
    kept = (x, tangents, pre, pre_tangents, parameters)
    gx, gtangents, gparameters = _vjp(g, gdot, *kept, ctx.widths, inputs, weights)
    along = inputs and gdot is not None and ctx.needs_input_grad[1]
    return gx if inputs else None, gtangents if along else None, gparameters if weights else None, None


_op.set_backward(_backward, _save)


def _checked(x: Tensor, parameters: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    widths = [int(width) for width in widths]
    if len(widths) < 3 or min(widths) < 1:
        raise ValueError(f"swish_mlp: widths expected three or more positive numbers, got {widths}")
    x = floating("swish_mlp", "x", x)
    if x.dim() != 2 or x.shape[1] != widths[0]:
        fail("swish_mlp", "x", f"(B, {widths[0]})", x)
    size = sum(math.prod(shape) for shape in _shapes(widths))
    return x, coefficients("swish_mlp", "parameters", parameters, (size,), x), widths


def swish_mlp(x: Tensor, parameters: Tensor, widths: Sequence[int]) -> Tensor:
    """The formula above.

    Args:
        x: `(B, D_0)`, any floating dtype.
        parameters: flat, one after another `W_1` `(D_1, D_0)`, `b_1`, `p_1`, `W_2`, ..., `p_L`, `q` `(D_L,)`, `V`
            `(D_{L+1}, D_L)`.
        widths: `D_0 ... D_{L+1}`, with one hidden layer or more.

    Returns:
        `(B, D_{L+1})` of the dtype of `x`.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    x, parameters, widths = _checked(x, parameters, widths)
    return _op(x, None, parameters, widths)[0]


def swish_mlp_jvp(
    x: Tensor, tangents: Tensor, parameters: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`swish_mlp` and its derivatives along the tangents, `(K, B, D_{L+1})`.

    Args as `swish_mlp`, and tangents: `(K, B, D_0)`, dtype and device of `x`.
    """
    x, parameters, widths = _checked(x, parameters, widths)
    tangents = floating("swish_mlp", "tangents", tangents)
    tangents = like("swish_mlp", "tangents", tangents, x, lead=tangents.shape[:1])
    y, y_tangents, _, _ = _op(x, tangents, parameters, widths)
    return y, y_tangents
