"""Group normalisation and SiLU of images in one pass, its tangents, and the adjoints of both.

With `u = x + bias`, mean `mu` and `r = (var + eps)^{-1/2}` of each sample's group of `N` values (Wu & He
2018):

    n = r (u - mu),   a = gamma n + beta,   y = a sigmoid(a)   (y = a without SiLU).

Write `P t = t - mean(t) - n mean(n t)`, which is symmetric. Then `dn = r P dx`, a tangent `t` gives
`y' = silu'(a) gamma r P t`, and a cotangent `g` gives `gx = r P (gamma silu'(a) g)`. The joint adjoint of
value and tangents, with `w_k = gamma silu'(a) g'_k`, is

    gt_k = r P w_k,
    gx   = r P h - (r^2 / N) n sum_k <w_k, P t_k>,
    h    = gamma (silu'(a) g + silu''(a) sum_k a'_k g'_k) - r sum_k (mean(n t_k) w_k + mean(n w_k) t_k).

The bias is one number per sample and channel, the embedding of the noise level; it carries no tangent. All
`K` tangents share one read of `x`. Variances are centred; sums are in float32 (float64 for float64);
deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import any_layout, coefficients, divisor, fail, image_tangents
from .layout import to_channels_last
from .registry import Op, accumulate_dtype


class _Groups:
    """The quantities of the formulas, as `(B, G, C/G, H W)` in the accumulation dtype.

    `statistics` `(B, G, 2)` are `mu` and `r`.
    """

    def __init__(
        self,
        x: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        groups: int,
        silu: bool,
        *,
        eps: float = 0.0,
        statistics: Tensor | None = None,
    ):
        self.shape, self.groups, self.dtype = x.shape, groups, accumulate_dtype(x.dtype)
        u = self.split(x)
        if bias is not None:
            u = u + bias.reshape(x.shape[0], groups, x.shape[1] // groups, 1)
        if statistics is None:
            mu = self.mean(u)
            statistics = self.pair(mu, torch.rsqrt(self.mean((u - mu).square()) + eps))
        self.statistics = statistics
        self.gamma = gamma.reshape(groups, -1, 1)
        mu, self.r = (value[..., None, None] for value in statistics.unbind(-1))
        self.n = (u - mu) * self.r
        a = self.gamma * self.n + beta.reshape(groups, -1, 1)
        if silu:
            s = torch.sigmoid(a)
            self.y, self.slope = a * s, s * (1 + a * (1 - s))
            self.bend = s * (1 - s) * (2 + a * (1 - 2 * s))
        else:
            self.y, self.slope, self.bend = a, torch.ones_like(a), torch.zeros_like(a)

    def split(self, x: Tensor) -> Tensor:
        """`(*, B, C, H, W)` as `(*, B, G, C/G, H W)`."""
        size = (self.groups, self.shape[1] // self.groups, self.shape[2] * self.shape[3])
        return x.to(self.dtype).reshape(*x.shape[:-3], *size)

    def join(self, value: Tensor, like: Tensor) -> Tensor:
        return to_channels_last(value.reshape(like.shape).to(like.dtype))

    def mean(self, value: Tensor) -> Tensor:
        return value.mean((-2, -1), keepdim=True)

    def pair(self, a: Tensor, b: Tensor) -> Tensor:
        """Two numbers per group, `(*, G, 1, 1)`, as `(*, G, 2)`."""
        return torch.stack([a, b], -1).flatten(-3, -2).squeeze(-2)

    def channels(self, value: Tensor) -> Tensor:
        """Sum over samples and pixels, `(C,)`."""
        return value.sum((0, -1)).flatten()

    def bias_gradient(self, gx: Tensor, bias: Tensor | None) -> Tensor:
        return gx.sum(-1).flatten(1) if bias is not None else gx.new_empty(0)


def _reference(
    x: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    s = _Groups(x, bias, gamma, beta, groups, silu, eps=eps)
    return s.join(s.y, x), s.statistics


def _reference_jvp(
    x: Tensor,
    tangents: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = _Groups(x, bias, gamma, beta, groups, silu, eps=eps)
    t = s.split(tangents)
    t_mean, nt_mean = s.mean(t), s.mean(s.n * t)
    ydot = s.slope * s.gamma * s.r * (t - t_mean - s.n * nt_mean)
    return s.join(s.y, x), s.join(ydot, tangents), s.statistics, s.pair(t_mean, nt_mean)


def _reference_vjp(
    g: Tensor,
    x: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = _Groups(x, bias, gamma, beta, groups, silu, statistics=statistics)
    ga = s.slope * s.split(g)
    h = s.gamma * ga
    gx = s.r * (h - s.mean(h) - s.n * s.mean(s.n * h))
    return s.join(gx, x), s.bias_gradient(gx, bias), s.channels(ga * s.n), s.channels(ga)


def _reference_jvp_vjp(
    g: Tensor | None,
    gdot: Tensor,
    x: Tensor,
    tangents: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    statistics: Tensor,
    tangent_statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = _Groups(x, bias, gamma, beta, groups, silu, statistics=statistics)
    t_mean, nt_mean = (value[..., None, None] for value in tangent_statistics.unbind(-1))
    t, gdot_ = s.split(tangents), s.split(gdot)
    pt, w = t - t_mean - s.n * nt_mean, s.gamma * s.slope * gdot_
    ga = s.bend * (s.gamma * s.r * pt * gdot_).sum(0)
    if g is not None:
        ga = ga + s.slope * s.split(g)
    w_mean, nw_mean = s.mean(w), s.mean(s.n * w)
    h = s.gamma * ga - s.r * (nt_mean * w + nw_mean * t).sum(0)
    gx = s.r * (h - s.mean(h) - s.n * (s.mean(s.n * h) + s.r * s.mean(w * pt).sum(0)))
    ggamma = ga * s.n + s.r * (s.slope * gdot_ * pt).sum(0)
    gt = s.join(s.r * (w - w_mean - s.n * nw_mean), tangents)
    return s.join(gx, x), gt, s.bias_gradient(gx, bias), s.channels(ggamma), s.channels(ga)


_VECTORS = "Tensor? bias, Tensor gamma, Tensor beta"
_op = Op(
    f"group_norm_silu(Tensor x, {_VECTORS}, int groups, float eps, bool silu) -> (Tensor, Tensor)", _reference
)
_vjp = Op(
    f"group_norm_silu_vjp(Tensor g, Tensor x, {_VECTORS}, Tensor statistics, int groups, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _reference_vjp,
)
_jvp = Op(
    f"group_norm_silu_jvp(Tensor x, Tensor tangents, {_VECTORS}, int groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _reference_jvp,
)
_jvp_vjp = Op(
    f"group_norm_silu_jvp_vjp(Tensor? g, Tensor gdot, Tensor x, Tensor tangents, {_VECTORS}, Tensor statistics, "
    "Tensor tangent_statistics, int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference_jvp_vjp,
)


def _refuse_statistics(*grads: Tensor | None) -> None:
    if any(g is not None for g in grads):
        raise NotImplementedError("group_norm_silu: the statistics have no derivative; detach them")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    _refuse_statistics(*rest)
    if g is None:
        return (None,) * 7
    x, bias, gamma, beta, statistics = ctx.saved_tensors
    gx, gbias, ggamma, gbeta = _vjp(
        to_channels_last(g), x, bias, gamma, beta, statistics, ctx.groups, ctx.silu
    )
    return gx, None if bias is None else gbias, ggamma, gbeta, None, None, None


def _jvp_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _jvp_backward(ctx: Any, g: Tensor | None, gdot: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
    _refuse_statistics(*rest)
    if g is None and gdot is None:
        return (None,) * 8
    x, tangents, bias, gamma, beta, statistics, tangent_statistics = ctx.saved_tensors
    g = None if g is None else to_channels_last(g)
    own = (bias, gamma, beta, statistics)
    if gdot is None:
        gx, gbias, ggamma, gbeta = _vjp(g, x, *own, ctx.groups, ctx.silu)
        gt = None
    else:
        gx, gt, gbias, ggamma, gbeta = _jvp_vjp(
            g, to_channels_last(gdot), x, tangents, *own, tangent_statistics, ctx.groups, ctx.silu
        )
    return gx, gt, None if bias is None else gbias, ggamma, gbeta, None, None, None


_op.set_backward(_backward, _save)
_jvp.set_backward(_jvp_backward, _jvp_save)


def _checked(
    x: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, groups: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    if any_layout("group_norm_silu", "x", x).dim() != 4:
        fail("group_norm_silu", "x", "images (B, C, H, W)", x)
    channels = x.shape[1]
    op = "group_norm_silu"
    divisor(op, "groups", groups, channels)
    bias = None if bias is None else coefficients(op, "bias", bias, x.shape[:2], x)
    gamma, beta = (coefficients(op, n, v, (channels,), x) for n, v in (("gamma", gamma), ("beta", beta)))
    return to_channels_last(x), bias, gamma, beta


def group_norm_silu(
    x: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    """`silu(gamma * normalise(x + bias) + beta)`, the statistics over each sample's `groups` groups of
    channels.

    Args:
        x: `(B, C, H, W)`, best channels-last; the result is.
        bias: `(B, C)` or None.
        gamma, beta: `(C,)`.
        groups: number of groups, a divisor of `C`.
        eps: added to the variance.
        silu: False leaves the activation out.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    return _op(*_checked(x, bias, gamma, beta, groups), groups, eps, silu)[0]


def group_norm_silu_jvp(
    x: Tensor,
    tangents: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """`group_norm_silu` `(B, C, H, W)` and its derivatives along the tangents, `(K, B, C, H, W)`.

    Args as `group_norm_silu`, and tangents: `(K, B, C, H, W)`, dtype and device of `x`.
    """
    x, *rest = _checked(x, bias, gamma, beta, groups)
    return _jvp(x, image_tangents("group_norm_silu", tangents, x), *rest, groups, eps, silu)[:2]
