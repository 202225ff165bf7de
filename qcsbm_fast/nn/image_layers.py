"""Layers of image networks, for tensors and duals: convolution, normalisation, resampling, merging."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import dual, ops
from ..dual import Dual, V
from ..ops.layout import to_channels_last


def scaled_uniform_(weight: Tensor, scale: float) -> Tensor:
    """Uniform with variance `scale / mean(fan in, fan out)`, as the authors do; 0 stands for 1e-10."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = math.sqrt(3 * (scale or 1e-10) / ((fan_in + fan_out) / 2))
    return nn.init.uniform_(weight, -bound, bound)


def channels_last(x: V) -> V:
    """The images `(B, C, H, W)`, and their tangents, with the channels next to each other in memory."""
    return x.map(to_channels_last) if isinstance(x, Dual) else to_channels_last(x)


def images(x: V, function: Callable[[Tensor], Tensor]) -> V:
    """Applies a linear function of batches of images; the tangents are one batch of `K B`."""
    if isinstance(x, Dual):
        tangents = function(x.tangents.flatten(0, 1))
        return Dual(function(x.primal), tangents.unflatten(0, x.tangents.shape[:2]))
    return function(x)


def add(a: V, b: V, scale: float = 1.0) -> V:
    """`scale (a + b)`, of two tensors or two duals."""
    if isinstance(a, Dual) and isinstance(b, Dual):
        return Dual(ops.scaled_add(a.primal, b.primal, scale), ops.scaled_add(a.tangents, b.tangents, scale))
    return ops.scaled_add(a, b, scale)  # pyright: ignore[reportArgumentType]


class Sum:
    """`scale (a + b)`."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, a: V, b: V) -> V:
        return add(a, b, self.scale)


class Join:
    """The channels of two images behind one another."""

    def __call__(self, a: V, b: V) -> V:
        return dual.cat([a, b], 1)  # pyright: ignore[reportReturnType]


class Conv(nn.Module):
    """Convolution with a square kernel, `(B, C, H, W) -> (B, D, H', W')`; the weight is stored channels-last.

    Args:
        in_channels, out_channels, size: of the kernel.
        stride: step of the kernel.
        padding: zeros around the image; None keeps its size at stride 1.
        init_scale: see `scaled_uniform_`; the bias starts at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        init_scale: float = 1.0,
    ):
        super().__init__()
        weight = scaled_uniform_(torch.empty(out_channels, in_channels, size, size), init_scale)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.stride = stride
        self.padding = size // 2 if padding is None else padding

    def forward(self, x: V) -> V:
        return self.with_bias(x, self.bias)

    def with_bias(self, x: V, bias: Tensor | None) -> V:
        """The convolution with another bias `(D,)`, or with none where it is added elsewhere."""
        return dual.conv2d(x, self.weight, bias, self.stride, self.padding)


class GroupNormSiLU(nn.Module):
    """Group normalisation of images plus a bias `(B, C)`, then SiLU unless switched off; shape preserved.

    Groups have four channels, or more where there would be over 32 groups; eps is 1e-6, as in the authors'
    networks.
    """

    def __init__(self, channels: int, silu: bool = True):
        super().__init__()
        self.groups = min(channels // 4, 32)
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"channels: expected a multiple of 4, above 128 of 32, got {channels}")
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.silu = silu

    def forward(self, x: V, bias: Tensor | None = None) -> V:
        gamma, beta, groups, silu = self.gamma, self.beta, self.groups, self.silu
        if isinstance(x, Dual):
            pair = ops.group_norm_silu_jvp(x.primal, x.tangents, bias, gamma, beta, groups=groups, silu=silu)
            return Dual(*pair)
        return ops.group_norm_silu(x, bias, gamma, beta, groups=groups, silu=silu)


class Resample(nn.Module):
    """Doubles or halves images by a filter, or, without one, by repetition or the mean of 2 x 2 pixels.

    Args:
        direction: "up" or "down".
        taps: the filter along one axis, in any scale, such as (1, 3, 3, 1); None for none.
        margin: pixels more on every side of the result.
    """

    def __init__(self, direction: Literal["up", "down"], taps: Sequence[float] | None, margin: int = 0):
        super().__init__()
        self.up, self.down = (2, 1) if direction == "up" else (1, 2)
        taps = [1.0, 1.0] if taps is None else taps
        self.taps = [self.up * tap / sum(taps) for tap in taps]  # inserted zeros halve the sum on each axis
        excess = len(taps) - 2
        self.pad = ((excess + 1) // 2 + self.up - 1 + margin, excess // 2 + margin)

    def forward(self, x: V) -> V:
        return (
            x.map(self)
            if isinstance(x, Dual)
            else ops.fir(x, self.taps, up=self.up, down=self.down, pad=self.pad)
        )


class ConvResample(nn.Module):
    """Doubles or halves images by a filter, or without one, and a 3 x 3 convolution.

    Up: the convolution of the doubled image. Down: the convolution with stride 2 of the filtered image, or,
    without a filter, of the image with one row and one column of zeros at the end.
    """

    def __init__(
        self,
        direction: Literal["up", "down"],
        in_channels: int,
        out_channels: int,
        taps: Sequence[float] | None,
    ):
        super().__init__()
        self.filtered = taps is not None
        self.upsample = None
        self.taps: list[float] | None = None
        if direction == "up":
            self.upsample = Resample("up", taps, margin=int(self.filtered))
            self.conv = Conv(in_channels, out_channels, padding=0 if self.filtered else 1)
        else:
            if taps is not None:
                self.taps = [tap / sum(taps) for tap in taps]
                self.pad = ((len(taps) + 1) // 2, len(taps) // 2)
            self.conv = Conv(in_channels, out_channels, stride=2, padding=0)

    def forward(self, x: V) -> V:
        if self.upsample is not None:
            return self.conv(self.upsample(x))
        return self.conv(images(x, self._widen))

    def _widen(self, x: Tensor) -> Tensor:
        if self.taps is None:
            return F.pad(x, (0, 1, 0, 1))
        return ops.fir(x, self.taps, pad=self.pad)


class ToImage(nn.Module):
    """Normalisation, SiLU and a 3 x 3 convolution: `(B, C, H, W) -> (B, D, H, W)`."""

    def __init__(self, in_channels: int, out_channels: int, init_scale: float):
        super().__init__()
        self.norm = GroupNormSiLU(in_channels)
        self.conv = Conv(in_channels, out_channels, init_scale=init_scale)

    def forward(self, x: V) -> V:
        return self.conv(self.norm(x))
