"""Self-attention over the pixels of images between a normalisation and a residual sum, with its tangents, as one op.

With `N` the group normalisation of `group_norm_silu` without SiLU, and pixels as rows,

    [q, k, v] = W N(x) + bias,   z = q k^T,   p = softmax(z),   y = scale (x + V p v + bias_out).

Tangents `z' = q' k^T + q k'^T` give `p' = p (z' - <p, z'>)`, row by row, and `p' v + p v'`. For cotangents `g` of `p v`
and `g'_k` of its tangents, with `h = g v^T + sum_k g'_k v'_k^T`, `h'_k = g'_k v^T`,

    gz'_k = p (h'_k - <p, h'_k>),   gz = p (e - <p, e>),   e = h + sum_k (h'_k (z'_k - <p, z'_k>) - z'_k <p, h'_k>).

The factor `1 / sqrt C` of the scores is the caller's, in the rows of `W` that make `q`. The kernel makes `p` again in
the adjoint and never stores it. Deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import any_layout, coefficients, divisor, fail, image_tangents
from .layout import to_channels_last
from .registry import OPS, Op, accumulate_dtype, gradient_wanted
from .res_block import (
    Pair,
    block_weight,
    first_probes,
    pack,
    pair,
    pull_weight,
    push_convolution,
    scaled_sum,
    unpack,
)


def _tokens(images: Pair, parts: int) -> list[list[Tensor]]:
    """Images and tangents `(*, parts C, H, W)` as `parts` pairs `(*, N, C)` in the accumulation dtype."""
    rows = [v.movedim(-3, -1).flatten(-3, -2).to(accumulate_dtype(v.dtype)) for v in images]
    return [list(part) for part in zip(*(v.chunk(parts, -1) for v in rows), strict=True)]


def _images(rows: Tensor, like: Tensor) -> Tensor:
    return rows.movedim(-1, -2).unflatten(-1, like.shape[-2:]).to(like.dtype)


def _rows_of_p(q: list[Tensor], k: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`p`, `z'` and `<p, z'>`."""
    p = torch.softmax(q[0] @ k[0].mT, -1)
    moved = q[1] @ k[0].mT + q[0] @ k[1].mT
    return p, moved, (p * moved).sum(-1, keepdim=True)


def _reference(
    x: Tensor,
    tangents: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    groups: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = pair(x, tangents)
    *h, norm, tangent_norm = OPS["group_norm_silu_jvp"].reference(
        *given, None, gamma, beta, groups, eps, False
    )
    qkv = push_convolution((h[0], h[1]), weight, bias)
    q, k, v = _tokens(qkv, 3)
    p, moved, mean = _rows_of_p(q, k)
    o = _images(p @ v[0], x), _images(p * (moved - mean) @ v[0] + p @ v[1], x)
    y, y_tangents = scaled_sum(given, push_convolution(o, weight_out, bias_out), scale)
    return y, y_tangents, pack(*h, *qkv, *o), torch.cat([norm.flatten(), tangent_norm.flatten()])


def _reference_vjp(
    g: Tensor,
    g_tangents: Tensor | None,
    x: Tensor,
    tangents: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    weight_out: Tensor,
    kept: Tensor,
    statistics: Tensor,
    groups: int,
    scale: float,
    weights: bool,
) -> tuple[Tensor, ...]:
    given, above = pair(x, tangents), pair(g, g_tangents)
    probes, all_probes, batch = len(above[1]), len(given[1]), len(x)
    wide = (batch, 3 * x.shape[1], *x.shape[2:])
    h, qkv, o = (first_probes(v, probes) for v in unpack(kept, all_probes, [x.shape, wide, x.shape]))
    norm, tangent_norm = statistics.split([2 * batch * groups, 2 * all_probes * batch * groups])
    scaled = above[0] * scale, above[1] * scale
    gw_out, gb_out = pull_weight(o, above, 1, scale)
    ((go, go_tangents),) = _tokens(push_convolution(scaled, weight_out, None, True), 1)
    q, k, v = _tokens(qkv, 3)
    p, moved, mean = _rows_of_p(q, k)
    hp_tangents = go_tangents @ v[0].mT
    h_mean = (p * hp_tangents).sum(-1, keepdim=True)
    gz_tangents = p * (hp_tangents - h_mean)
    e = go @ v[0].mT + (go_tangents @ v[1].mT + hp_tangents * (moved - mean) - moved * h_mean).sum(0)
    gz = p * (e - (p * e).sum(-1, keepdim=True))
    gq = gz @ k[0] + (gz_tangents @ k[1]).sum(0)
    gk = gz.mT @ q[0] + (gz_tangents.mT @ q[1]).sum(0)
    gv = p.mT @ go + ((p * (moved - mean)).mT @ go_tangents).sum(0)
    moves = gz_tangents @ k[0], gz_tangents.mT @ q[0], p.mT @ go_tangents
    gqkv = _images(torch.cat([gq, gk, gv], -1), x), _images(torch.cat(moves, -1), x)
    gw, gb = pull_weight(h, gqkv, 1, 1.0)
    call = (*push_convolution(gqkv, weight, None, True), x, given[1][:probes], None, gamma, beta)
    shapes = norm.view(batch, groups, 2), tangent_norm.view(all_probes, batch, groups, 2)[:probes]
    gx, gt, _, ggamma, gbeta = OPS["group_norm_silu_jvp_vjp"].reference(*call, *shapes, groups, False)
    gx, gt = scaled_sum((gx, gt), scaled, 1.0)
    found = [value if weights else value[:0] for value in (gw, gb, gw_out, gb_out)]
    return gx, gt, ggamma, gbeta, *found


_op = Op(
    "attention_block(Tensor x, Tensor? tangents, Tensor gamma, Tensor beta, Tensor weight, Tensor bias, "
    "Tensor weight_out, Tensor bias_out, int groups, float eps, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
)
_vjp = Op(
    "attention_block_vjp(Tensor g, Tensor? g_tangents, Tensor x, Tensor? tangents, Tensor gamma, Tensor beta, "
    "Tensor weight, Tensor weight_out, Tensor kept, Tensor statistics, int groups, float scale, bool weights) -> "
    f"({', '.join(['Tensor'] * 8)})",
    _reference_vjp,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, tangents, gamma, beta, weight, _, weight_out, _, ctx.groups, _, ctx.scale = inputs
    ctx.save_for_backward(x, tangents, gamma, beta, weight, weight_out, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, g_tangents: Tensor | None, *kept: Tensor | None) -> tuple[Any, ...]:
    if any(cotangent is not None for cotangent in kept):
        raise NotImplementedError("attention_block: what it keeps has no derivative; detach it")
    x, tangents, *rest = ctx.saved_tensors
    gdot = None if tangents is None or g_tangents is None else to_channels_last(g_tangents)
    if g is None and gdot is None:
        return (None,) * 11
    g = to_channels_last(torch.zeros_like(x) if g is None else g)
    first = 1 if tangents is None else 2
    weights = gradient_wanted(ctx, *range(first, first + 6))
    gx, gt, *found = _vjp(g, gdot, x, tangents, *rest, ctx.groups, ctx.scale, weights)
    gt = gt if gdot is not None and ctx.needs_input_grad[1] else None
    return gx, gt, *(found if weights else [None] * 6), None, None, None


_op.set_backward(_backward, _save)


def attention_block(
    x: Tensor,
    tangents: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The formula above, and its derivatives along the tangents.

    Args:
        x: `(B, C, H, W)`, best channels-last; the results are, of the same shape.
        tangents: `(K, B, C, H, W)`, dtype and device of `x`; None for none.
        gamma, beta, bias_out: `(C,)`; bias: `(3 C,)`.
        weight: `(3 C, C, 1, 1)`; weight_out: `(C, C, 1, 1)`; all parameters float32 (float64 beside float64 images).
        groups: of the normalisation, a divisor of `C`.
        eps: added to its variances.
        scale: of the sum.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    op = "attention_block"
    if any_layout(op, "x", x).dim() != 4:
        fail(op, "x", "images (B, C, H, W)", x)
    c = x.shape[1]
    divisor(op, "groups", groups, c)
    if tangents is not None:
        tangents = image_tangents(op, tangents, x)
    vectors = {"gamma": (gamma, c), "beta": (beta, c), "bias": (bias, 3 * c), "bias_out": (bias_out, c)}
    found = {name: coefficients(op, name, value, (size,), x) for name, (value, size) in vectors.items()}
    return _op(
        to_channels_last(x),
        tangents,
        found["gamma"],
        found["beta"],
        block_weight(op, "weight", weight, (3 * c, c, 1, 1), x),
        found["bias"],
        block_weight(op, "weight_out", weight_out, (c, c, 1, 1), x),
        found["bias_out"],
        groups,
        eps,
        scale,
    )[:2]
