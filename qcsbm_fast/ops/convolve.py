"""Convolution of images on CPUs with AVX2 or AVX-512, of bfloat16 by their matrix registers (AMX) where they have some.

With `W` of 3 x 3 taps and zeros around the image, which keep its size, or of one,

    y[b, d, p] = sum_{c, q} W[d, c, q] x[b, c, p + q] + bias[d],

its tangents, its adjoint (`transposed`) and the gradient by `W`, to which images and tangents add in one pass.

By matrix registers products are of bfloat16, also those of float32 where these may be split, see `split`. All others
are of float32, by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016): measured errors are some 1e-6 of the result's
norm, twice those of the sum itself; of weight gradients over many pixels 2e-6. Sums are float32, weights and their
gradients float32 whatever the dtype of the images. Deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from . import backend
from .check import any_layout, coefficients, describe, fail, image_tangents
from .layout import to_channels_last
from .registry import Op, accumulate_dtype, gradient_wanted

# With fewer channels registers, of 32 by 16 values or of 16, would stay mostly empty.
_LEAST_CHANNELS = 16


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    rows = x.to(weight.dtype).flatten(0, -4)
    y = (F.conv_transpose2d if transposed else F.conv2d)(rows, weight, bias, padding=weight.shape[-1] // 2)
    return to_channels_last(y.to(x.dtype).unflatten(0, x.shape[:-3]))


def _reference_jvp(
    x: Tensor, tangents: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    return _reference(x, weight, bias, transposed), _reference(tangents, weight, None, transposed)


def _reference_weight(
    x: Tensor, g: Tensor, tangents: Tensor | None, g_tangents: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    shape = (g.shape[-3], x.shape[-3], size, size)
    rows, g_rows = (value.to(dtype).flatten(0, -4) for value in (x, g))
    gw = conv2d_weight(rows, shape, g_rows, padding=size // 2)
    if tangents is not None and g_tangents is not None:
        gw = gw + _reference_weight(tangents, g_tangents, None, None, size)[0]
    return to_channels_last(gw), g_rows.sum((0, 2, 3))


_op = Op("convolve(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor", _reference)
_jvp = Op(
    "convolve_jvp(Tensor x, Tensor tangents, Tensor weight, Tensor? bias, bool transposed) -> (Tensor, Tensor)",
    _reference_jvp,
)
_weight = Op(
    "convolve_weight(Tensor x, Tensor g, Tensor? tangents, Tensor? g_tangents, int size) -> (Tensor, Tensor)",
    _reference_weight,
)


def _weight_gradients(
    x: Tensor, g: Tensor, t: Tensor | None, gt: Tensor | None, size: int, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """Of weight and bias; in the adjoint, which has no bias, images and cotangents change their roles."""
    return (_weight(g, x, gt, t, size)[0], None) if transposed else _weight(x, g, t, gt, size)


def _wanted(ctx: Any, weight: int) -> bool:
    """Whether the gradient of argument `weight` or of the next, the bias, is; they come together."""
    return gradient_wanted(ctx, *(i for i in (weight, weight + 1) if ctx.needs_input_grad[i]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    if g is None:
        return (None,) * 4
    x, weight = ctx.saved_tensors
    g, gx, gw, gbias = to_channels_last(g), None, None, None
    if ctx.needs_input_grad[0]:
        gx = _op(g, weight, None, not ctx.transposed)
    if _wanted(ctx, 1):
        gw, gbias = _weight_gradients(x, g, None, None, weight.shape[-1], ctx.transposed)
    return gx, gw, gbias if ctx.needs_input_grad[2] else None, None


def _jvp_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, tangents, weight, _, ctx.transposed = inputs
    ctx.save_for_backward(x, tangents, weight)
    ctx.set_materialize_grads(False)


def _jvp_backward(ctx: Any, g: Tensor | None, gt: Tensor | None) -> tuple[Any, ...]:
    x, t, weight = ctx.saved_tensors
    g, gt = (None if cotangent is None else to_channels_last(cotangent) for cotangent in (g, gt))
    gx, gtangents, gw, gbias = None, None, None, None
    if g is not None and gt is not None and all(ctx.needs_input_grad[:2]):
        gx, gtangents = _jvp(g, gt, weight, None, not ctx.transposed)
    elif g is not None and ctx.needs_input_grad[0]:
        gx = _op(g, weight, None, not ctx.transposed)
    elif gt is not None and ctx.needs_input_grad[1]:
        gtangents = _op(gt, weight, None, not ctx.transposed)
    if _wanted(ctx, 2):
        if g is not None:
            gw, gbias = _weight_gradients(
                x, g, None if gt is None else t, gt, weight.shape[-1], ctx.transposed
            )
        elif gt is not None:
            gw, _ = _weight_gradients(t, gt, None, None, weight.shape[-1], ctx.transposed)
    return gx, gtangents, gw, gbias if ctx.needs_input_grad[3] else None, None


def _weight_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])


def _weight_backward(ctx: Any, u: Tensor, ubias: Tensor) -> tuple[Any, ...]:
    x, g, tangents, g_tangents = ctx.saved_tensors
    u = to_channels_last(u)
    if tangents is None:
        gx, gg, gtangents, gg_tangents = _op(g, u, None, True), _op(x, u, ubias, False), None, None
    else:
        gx, gtangents = _jvp(g, g_tangents, u, None, True)
        gg, gg_tangents = _jvp(x, tangents, u, ubias, False)
    return gx, gg, gtangents, gg_tangents, None


_op.set_backward(_backward, _save)
_jvp.set_backward(_jvp_backward, _jvp_save)
_weight.set_backward(_weight_backward, _weight_save)


_HAS_KERNELS = backend.has_kernel("convolve", "cpu")


def has_image_kernels(x: Tensor) -> bool:
    """Whether the CPU kernels of convolutions and of what holds some take these images."""
    return _HAS_KERNELS and x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu"


def has_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` has a kernel for these images and this weight."""
    return (
        has_image_kernels(x)
        and weight.dtype == torch.float32
        and weight.shape[2:] in ((3, 3), (1, 1))
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
    )


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if any_layout("convolve", "x", x).dim() < 4:
        fail("convolve", "x", "images (*, C, H, W)", x)
    channels, dtype = x.shape[-3], accumulate_dtype(x.dtype)
    if not isinstance(weight, Tensor):
        raise TypeError(f"convolve: weight expected a tensor, got {describe(weight)}")
    shapes = ((channels, 3, 3), (channels, 1, 1))
    if weight.dim() != 4 or weight.shape[1:] not in shapes or weight.dtype != dtype or not len(weight):
        expected = f"(D, {channels}, 3, 3) or (D, {channels}, 1, 1), {dtype}".replace("torch.", "")
        fail("convolve", "weight", expected, weight)
    if weight.device != x.device:
        fail("convolve", "weight", f"on {x.device}", weight)
    bias = None if bias is None else coefficients("convolve", "bias", bias, weight.shape[:1], x)
    return to_channels_last(x), to_channels_last(weight), bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula above.

    Args:
        x: images `(*, C, H, W)` with at least a batch dimension, best channels-last; the result is.
        weight: `(D, C, 3, 3)` or `(D, C, 1, 1)`, float32 (float64 beside float64 images), best channels-last.
        bias: `(D,)` or None.

    Returns:
        `(*, D, H, W)` of the dtype of `x`.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    return _op(*_checked(x, weight, bias), False)


def convolve_jvp(
    x: Tensor, tangents: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`convolve` and its derivatives along the tangents, `(K, *, D, H, W)`, which have no bias.

    Args as `convolve`, and tangents: `(K, *, C, H, W)`, dtype and device of `x`.
    """
    x, weight, bias = _checked(x, weight, bias)
    return _jvp(x, image_tangents("convolve", tangents, x), weight, bias, False)
