"""The residual block of NCSN++ (Song et al. 2021, after Brock et al. 2019), with its tangents, as one op.

With `N` the group normalisation of `group_norm_silu`, SiLU included, `R` a filter of `fir` that doubles or halves the
image, or the identity, and 3 x 3 convolutions `W`, `V`,

    h = R N_in(x),   u = W * h,   k = N_out(u + bias),   y = scale (S x + V * k + bias_out);

the shortcut `S` is the identity, or a convolution of 1 x 1 and `R`. The bias, one number per sample and channel, holds
the first convolution's and the embedding of the noise level. Tangents and the joint adjoint are those of the parts.

A call costs what one of its parts would; on the CPU sums of branches are added where a part writes its result.
Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .check import any_layout, coefficients, divisor, fail, image_tangents
from .layout import to_channels_last
from .registry import OPS, Op, accumulate_dtype, gradient_wanted

Pair = tuple[Tensor, Tensor]  # values (B, *) and K >= 0 tangents (K, B, *)


def pair(x: Tensor, tangents: Tensor | None) -> Pair:
    return x, x.new_empty(0, *x.shape) if tangents is None else tangents


def push_convolution(
    images: Pair, weight: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Pair:
    return OPS["convolve_jvp"].reference(*images, weight, bias, transposed)


def scaled_sum(a: Pair, b: Pair, scale: float) -> Pair:
    first, second = (to_channels_last((v + w) * scale) for v, w in zip(a, b, strict=True))
    return first, second


class _Filter:
    """The filter, or the identity where there are no taps."""

    def __init__(self, taps: Sequence[float], up: int, down: int, pad: int):
        self.taps, self.up, self.down, self.pad = list(taps), up, down, pad

    def __call__(self, pair: Pair) -> Pair:
        if not self.taps:
            return pair
        rows, cols = (n * self.up // self.down for n in pair[0].shape[-2:])
        first, second = (
            OPS["fir"].reference(v, self.taps, self.up, self.down, self.pad, rows, cols) for v in pair
        )
        return first, second

    @property
    def adjoint(self) -> _Filter:
        return _Filter(self.taps[::-1], self.down, self.up, len(self.taps) - 1 - self.pad)


def pack(*values: Tensor) -> Tensor:
    """The numbers of images, channels-last, one behind the other."""
    return torch.cat([value.movedim(-3, -1).flatten() for value in values])


def unpack(kept: Tensor, probes: int, shapes: Sequence[Sequence[int]]) -> list[Pair]:
    """The images of these shapes `(B, C, H, W)`, each with its tangents, from `pack`."""
    pairs = []
    for batch, channels, *size in shapes:
        shape = (1 + probes, batch, *size, channels)
        part, kept = kept.split([math.prod(shape), kept.numel() - math.prod(shape)])
        images = part.reshape(shape).movedim(-1, -3)
        pairs.append((images[0], images[1:]))
    return pairs


def first_probes(images: Pair, probes: int) -> Pair:
    return images[0], images[1][:probes]


def pull_weight(given: Pair, g: Pair, size: int, factor: float) -> tuple[Tensor, Tensor]:
    """The gradients of a weight with `size` taps a side and of a bias, `factor` times."""
    gw, gb = OPS["convolve_weight"].reference(given[0], g[0], given[1], g[1], size)
    return gw * factor, gb * factor


def _reference(
    x: Tensor,
    tangents: Tensor | None,
    bias: Tensor,
    gamma_in: Tensor,
    beta_in: Tensor,
    weight_in: Tensor,
    gamma_out: Tensor,
    beta_out: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    shortcut: Tensor | None,
    groups_in: int,
    groups_out: int,
    eps: float,
    scale: float,
    taps: Sequence[float],
    up: int,
    down: int,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    resample, given = _Filter(taps, up, down, pad), pair(x, tangents)
    norm = OPS["group_norm_silu_jvp"].reference
    *a, norm_in, tangent_norm_in = norm(*given, None, gamma_in, beta_in, groups_in, eps, True)
    h = resample((a[0], a[1]))
    u = push_convolution(h, weight_in)
    *k, norm_out, tangent_norm_out = norm(*u, bias, gamma_out, beta_out, groups_out, eps, True)
    kept = [*h, *u, *k]
    if shortcut is None:
        s = given
    elif down > 1:  # the convolution commutes with the filter: it goes where the image is smaller
        r = resample(given)
        s = push_convolution(r, shortcut)
        kept += r
    else:
        s = resample(push_convolution(given, shortcut))
    y, y_tangents = scaled_sum(s, push_convolution((k[0], k[1]), weight_out, bias_out), scale)
    statistics = torch.cat([v.flatten() for v in (norm_in, norm_out, tangent_norm_in, tangent_norm_out)])
    return y, y_tangents, pack(*kept), statistics


def _reference_vjp(
    g: Tensor,
    g_tangents: Tensor | None,
    x: Tensor,
    tangents: Tensor | None,
    bias: Tensor,
    gamma_in: Tensor,
    beta_in: Tensor,
    weight_in: Tensor,
    gamma_out: Tensor,
    beta_out: Tensor,
    weight_out: Tensor,
    shortcut: Tensor | None,
    kept: Tensor,
    statistics: Tensor,
    groups_in: int,
    groups_out: int,
    scale: float,
    taps: Sequence[float],
    up: int,
    down: int,
    pad: int,
    weights: bool,
) -> tuple[Tensor, ...]:
    resample, given, above = _Filter(taps, up, down, pad), pair(x, tangents), pair(g, g_tangents)
    probes, all_probes = len(above[1]), len(given[1])
    inside = (len(x), x.shape[1], *g.shape[2:])
    kept_pairs = unpack(kept, all_probes, [inside, g.shape, g.shape, *[inside] * (down > 1)])
    h, u, k, *r = (first_probes(images, probes) for images in kept_pairs)
    at = first_probes(given, probes)
    sizes = [groups_in, groups_out, all_probes * groups_in, all_probes * groups_out]
    norms = statistics.split([2 * len(x) * size for size in sizes])
    norm_in, norm_out = (v.view(len(x), n, 2) for v, n in zip(norms[:2], sizes[:2], strict=True))
    tangent_norm_in, tangent_norm_out = (
        v.view(all_probes, len(x), n, 2) for v, n in zip(norms[2:], sizes[:2], strict=True)
    )

    def pull_norm(g: Pair, at: Pair, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        *own, statistics, of_tangents, groups = rest
        call = (*g, *at, bias, *own, statistics, of_tangents[:probes], groups, True)
        return OPS["group_norm_silu_jvp_vjp"].reference(*call)

    scaled = above[0] * scale, above[1] * scale
    gk = push_convolution(scaled, weight_out, None, True)
    gw_out, gb_out = pull_weight(k, above, 3, scale)
    gu, gu_tangents, gbias, ggamma_out, gbeta_out = pull_norm(
        gk, u, bias, gamma_out, beta_out, norm_out, tangent_norm_out, groups_out
    )
    pulled = gu, gu_tangents
    gw_in, _ = pull_weight(h, pulled, 3, 1.0)
    ga = resample.adjoint(push_convolution(pulled, weight_in, None, True))
    back, gshortcut = scaled, weight_in.new_empty(0, x.shape[1], 1, 1)
    if shortcut is not None and down > 1:
        gshortcut, _ = pull_weight(r[0], above, 1, scale)
        back = resample.adjoint(push_convolution(scaled, shortcut, None, True))
    elif shortcut is not None:
        gshortcut, _ = pull_weight(at, resample.adjoint(above), 1, scale)
        back = push_convolution(resample.adjoint(scaled), shortcut, None, True)
    gx, gt, _, ggamma_in, gbeta_in = pull_norm(
        ga, at, None, gamma_in, beta_in, norm_in, tangent_norm_in, groups_in
    )
    gx, gt = scaled_sum((gx, gt), back, 1.0)
    if not weights:
        gw_in, gw_out, gb_out, gshortcut = (value[:0] for value in (gw_in, gw_out, gb_out, gshortcut))
    return gx, gt, gbias, ggamma_in, gbeta_in, gw_in, ggamma_out, gbeta_out, gw_out, gb_out, gshortcut


_PARAMETERS = (
    "Tensor bias, Tensor gamma_in, Tensor beta_in, Tensor weight_in, Tensor gamma_out, Tensor beta_out, "
    "Tensor weight_out"
)
_FILTER = "float[] taps, int up, int down, int pad"
_op = Op(
    f"res_block(Tensor x, Tensor? tangents, {_PARAMETERS}, Tensor bias_out, Tensor? shortcut, int groups_in, "
    f"int groups_out, float eps, float scale, {_FILTER}) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
)
_vjp = Op(
    f"res_block_vjp(Tensor g, Tensor? g_tangents, Tensor x, Tensor? tangents, {_PARAMETERS}, Tensor? shortcut, "
    f"Tensor kept, Tensor statistics, int groups_in, int groups_out, float scale, {_FILTER}, bool weights) -> "
    f"({', '.join(['Tensor'] * 11)})",
    _reference_vjp,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, shortcut, groups_in, groups_out, _, scale, taps, up, down, pad = inputs
    ctx.numbers = (groups_in, groups_out, scale, taps, up, down, pad)
    ctx.shape = output[0].shape
    ctx.save_for_backward(*tensors, shortcut, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, g_tangents: Tensor | None, *kept: Tensor | None) -> tuple[Any, ...]:
    if any(cotangent is not None for cotangent in kept):
        raise NotImplementedError("res_block: what it keeps has no derivative; detach it")
    x, tangents, *rest = ctx.saved_tensors
    gdot = None if tangents is None or g_tangents is None else to_channels_last(g_tangents)
    if g is None and gdot is None:
        return (None,) * 19
    g = to_channels_last(x.new_zeros(ctx.shape) if g is None else g)
    first = 1 if tangents is None else 2
    weights = gradient_wanted(ctx, *range(first, first + 8 + (rest[7] is not None)))
    gx, gt, *found = _vjp(g, gdot, x, tangents, *rest, *ctx.numbers, weights)
    gt = gt if gdot is not None and ctx.needs_input_grad[1] else None
    found = found if weights else [None] * len(found)
    return gx, gt, *found[:-1], None if rest[7] is None else found[-1], *(None,) * 8


_op.set_backward(_backward, _save)


def block_weight(op: str, name: str, value: Tensor, shape: Sequence[int], x: Tensor) -> Tensor:
    """`value`, channels-last, if it has this shape, the accumulation dtype of `x` and its device."""
    dtype = accumulate_dtype(x.dtype)
    if not isinstance(value, Tensor) or (value.shape, value.dtype, value.device) != (shape, dtype, x.device):
        fail(op, name, f"{dtype} {tuple(shape)} on {x.device}".removeprefix("torch."), value)
    return to_channels_last(value)


def _checked(x: Tensor, parameters: Sequence[Any], groups: tuple[int, int], resample: Any) -> list[Any]:
    op = "res_block"
    if any_layout(op, "x", x).dim() != 4:
        fail(op, "x", "images (B, C, H, W)", x)
    channels, weight_in = x.shape[1], parameters[3]
    if not isinstance(weight_in, Tensor) or weight_in.dim() != 4 or not len(weight_in):
        fail(op, "weight_in", f"(D, {channels}, 3, 3)", weight_in)
    out = weight_in.shape[0]
    shapes = {
        "bias": (len(x), out),
        "gamma_in": (channels,),
        "beta_in": (channels,),
        "weight_in": (out, channels, 3, 3),
        "gamma_out": (out,),
        "beta_out": (out,),
        "weight_out": (out, out, 3, 3),
        "bias_out": (out,),
        "shortcut": (out, channels, 1, 1),
    }
    for name, count, size in zip(("groups_in", "groups_out"), groups, (channels, out), strict=True):
        divisor(op, name, count, size)
    taps, up, down, pad = resample
    if (up, down) not in ((1, 1), (2, 1), (1, 2)) or (up != down and not taps) or not 0 <= pad < 65536:
        raise ValueError(
            f"{op}: resample expected taps, factors of which one is 2, zeros before, got {resample}"
        )
    *required, shortcut = parameters
    if shortcut is None and (channels != out or taps):
        fail(op, "shortcut", f"({out}, {channels}, 1, 1)", None)
    given = required if shortcut is None else parameters
    found = [
        (block_weight if len(shape) == 4 else coefficients)(op, name, value, shape, x)
        for (name, shape), value in zip(shapes.items(), given, strict=False)
    ]
    return [*found, *[None] * (shortcut is None)]


def res_block(
    x: Tensor,
    tangents: Tensor | None,
    bias: Tensor,
    gamma_in: Tensor,
    beta_in: Tensor,
    weight_in: Tensor,
    gamma_out: Tensor,
    beta_out: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    shortcut: Tensor | None = None,
    *,
    groups: tuple[int, int],
    eps: float = 1e-6,
    scale: float = 1.0,
    resample: tuple[Sequence[float], int, int, int] = ((), 1, 1, 0),
) -> tuple[Tensor, Tensor]:
    """The formula above, and its derivatives along the tangents.

    Args:
        x: `(B, C, H, W)`, best channels-last; the results are.
        tangents: `(K, B, C, H, W)`, dtype and device of `x`; None for none.
        bias: `(B, D)`.
        gamma_in, beta_in: `(C,)`; gamma_out, beta_out, bias_out: `(D,)`.
        weight_in: `(D, C, 3, 3)`; weight_out: `(D, D, 3, 3)`; all parameters float32 (float64 beside float64 images).
        shortcut: `(D, C, 1, 1)`; None for the identity, where number of channels and size stay.
        groups: of the two normalisations.
        eps: added to their variances.
        scale: of the sum.
        resample: taps, `up`, `down` and the zeros before the image as `fir` takes them.

    Returns:
        `(B, D, H', W')` with `H' = H up / down`, and `(K, B, D, H', W')`.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    parameters = (bias, gamma_in, beta_in, weight_in, gamma_out, beta_out, weight_out, bias_out, shortcut)
    parameters = _checked(x, parameters, groups, resample)
    if tangents is not None:
        tangents = image_tangents("res_block", tangents, x)
    taps, up, down, pad = resample
    call = (*parameters, *groups, eps, scale, list(taps), up, down, pad)
    return _op(to_channels_last(x), tangents, *call)[:2]
