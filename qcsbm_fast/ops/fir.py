"""Up- and down-sampling of images by a separable finite impulse response (Karras et al. 2020; Zhang 2019).

Along each axis, with taps `f_0 ... f_{L-1}`: insert `up - 1` zeros after every value, put `pad` zeros before,
convolve, keep every `down`-th value:

    y_o = sum_j f_j z_{o down + L - 1 - j},   z_{m up + pad} = x_m, zero elsewhere.

The map is linear, and its adjoint is another such map: reversed taps, `up` and `down` exchanged, `pad`
replaced by `L - 1 - pad`. `K` tangents are a batch of `K B` images. Computed in float32 (float64 for
float64); deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .check import any_layout, fail
from .layout import to_channels_last
from .registry import Op, accumulate_dtype


def _axis(x: Tensor, taps: Tensor, up: int, down: int, pad: int, size: int) -> Tensor:
    """The formula along the last dimension of `x` `(*, W)`, `size` values of it."""
    z = F.pad(x[..., None], (0, up - 1)).flatten(-2)
    z = F.pad(z, (pad, (size - 1) * down + taps.shape[0] - pad - z.shape[-1]))
    return F.conv1d(z.reshape(-1, 1, z.shape[-1]), taps.flip(0)[None, None], stride=down).reshape(
        *x.shape[:-1], size
    )


def _reference(
    x: Tensor, taps: Sequence[float], up: int, down: int, pad: int, rows: int, cols: int
) -> Tensor:
    f = torch.tensor(taps, dtype=accumulate_dtype(x.dtype), device=x.device)
    y = _axis(x.to(f.dtype), f, up, down, pad, cols)
    y = _axis(y.transpose(-1, -2), f, up, down, pad, rows).transpose(-1, -2)
    return to_channels_last(y.to(x.dtype))


_op = Op("fir(Tensor x, float[] taps, int up, int down, int pad, int rows, int cols) -> Tensor", _reference)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.taps, ctx.up, ctx.down, ctx.pad, *_ = inputs
    ctx.size = x.shape[-2:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    if g is None:
        return (None,) * 7
    gx = _op(to_channels_last(g), ctx.taps[::-1], ctx.down, ctx.up, len(ctx.taps) - 1 - ctx.pad, *ctx.size)
    return gx, *(None,) * 6


_op.set_backward(_backward, _save)


def fir(
    x: Tensor, taps: Sequence[float], *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    """Zero insertion by `up`, padding, convolution with `taps` along both axes, every `down`-th value.

    Args:
        x: images `(*, C, H, W)` with at least a batch dimension, best channels-last; the result is.
        taps: the filter along one axis; the filter of the plane is its outer product with itself.
        up, down: factors, at least 1.
        pad: zeros before and after each axis, once the zeros are inserted; negative numbers crop.

    Returns:
        `(*, C, H', W')` with `H' = (H up + pad0 + pad1 - L) // down + 1`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if any_layout("fir", "x", x).dim() < 4:
        fail("fir", "x", "images (*, C, H, W)", x)
    if not (1 <= up < 1 << 31 and 1 <= down < 1 << 31):
        raise ValueError(f"fir: up, down expected factors of at least 1 and below 2^31, got {up}, {down}")
    if not all(-(1 << 31) < zeros < 1 << 31 for zeros in pad):
        raise ValueError(f"fir: pad expected numbers between -2^31 and 2^31, got {pad}")
    rows, cols = ((n * up + sum(pad) - len(taps)) // down + 1 for n in x.shape[-2:])
    if not all(math.isfinite(tap) for tap in taps):
        raise ValueError(f"fir: taps expected finite numbers, got {taps}")
    if not taps or min(rows, cols) < 1:
        fail("fir", "x", f"images large enough for {len(taps)} taps and padding {pad}", x)
    return _op(to_channels_last(x), list(taps), up, down, pad[0], rows, cols)
