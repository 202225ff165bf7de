"""The residual block of NCSN++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import dual, ops
from ..dual import Dual, V
from .embedding import initialise
from .image_layers import Conv, GroupNormSiLU, Resample, add


class Dropout(nn.Module):
    """Zeroes elements with probability `p` in training; a dual's tangents share the primal's mask."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: V) -> V:
        if not self.training or self.p == 0:
            return x
        primal = x.primal if isinstance(x, Dual) else x
        return x * torch.empty_like(primal).bernoulli_(1 - self.p).div_(1 - self.p)


class ResBlock(nn.Module):
    """`scale (shortcut(x) + conv(dropout(act(conv(resample(act(x))) + e))))`, `act` normalising first.

    The embedding `e` of the noise level is one bias per sample and channel, see `noise_biases`. Biases move to where
    they cost nothing: the first convolution's into that sum, which the normalisation takes as an argument, the
    shortcut's into the second's.

    Args:
        in_channels, out_channels: of the images; the shortcut is a 1 x 1 convolution if they differ or the
            size does.
        embedding: width of the noise embedding, None for no conditioning.
        dropout: probability.
        resample: changes the image size on both branches; None keeps it.
        scale: factor of the sum, 1 or 1/sqrt 2.
        init_scale: of the last convolution; shortcut_init_scale: of the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int | None,
        *,
        dropout: float,
        resample: Resample | None = None,
        scale: float,
        init_scale: float,
        shortcut_init_scale: float = 1.0,
    ):
        super().__init__()
        self.norm_in = GroupNormSiLU(in_channels)
        self.conv_in = Conv(in_channels, out_channels)
        self.embed = None if embedding is None else initialise(nn.Linear(embedding, out_channels))
        self.norm_out = GroupNormSiLU(out_channels)
        self.dropout = Dropout(dropout)
        self.conv_out = Conv(out_channels, out_channels, init_scale=init_scale)
        self.resample = resample
        self.shortcut = None
        if in_channels != out_channels or resample is not None:
            self.shortcut = Conv(in_channels, out_channels, size=1, init_scale=shortcut_init_scale)
        self.scale = scale

    def forward(self, x: V, bias: Tensor) -> V:
        """`x` `(B, C, H, W)`, the first convolution's bias and the noise level's `(B, D)` -> `(B, D, H', W')`."""
        if not (self.training and self.dropout.p):
            x = dual.autocast(x)
            if dual.has_convolution(x, self.conv_in.weight):
                return self._as_one_op(x, bias)
        h = self.norm_in(x)
        if self.resample is not None:
            h = self.resample(h)
        h = self.conv_in.with_bias(h, None)
        h = self.dropout(self.norm_out(h, bias))
        if self.shortcut is None:
            return add(x, self.conv_out(h), self.scale)
        h = self.conv_out.with_bias(h, self.conv_out.bias + self.shortcut.bias)
        return add(self._shortcut(self.shortcut, x), h, self.scale)

    def _as_one_op(self, x: Any, bias: Tensor) -> Any:
        """The same where the convolutions have kernels of the package."""
        first, second, shortcut, f = self.norm_in, self.norm_out, self.shortcut, self.resample
        bias_out = self.conv_out.bias if shortcut is None else self.conv_out.bias + shortcut.bias
        return dual.through(
            ops.res_block,
            x,
            bias,
            first.gamma,
            first.beta,
            self.conv_in.weight,
            second.gamma,
            second.beta,
            self.conv_out.weight,
            bias_out,
            None if shortcut is None else shortcut.weight,
            groups=(first.groups, second.groups),
            scale=self.scale,
            resample=((), 1, 1, 0) if f is None else (f.taps, f.up, f.down, f.pad[0]),
        )

    def _shortcut(self, conv: Conv, x: V) -> V:
        """The 1 x 1 convolution commutes with resampling: it goes where the image is smaller."""
        if self.resample is None:
            return conv.with_bias(x, None)
        if self.resample.up > 1:
            return self.resample(conv.with_bias(x, None))
        return conv.with_bias(self.resample(x), None)


def noise_biases(blocks: Sequence[ResBlock], embedding: Tensor | None, batch: int) -> dict[nn.Module, Tensor]:
    """The bias `(B, D)` of each block: its first convolution's, and what it makes of the embedding `(B, E)`.

    One product for all blocks.
    """
    biases: list[Tensor] = [block.conv_in.bias for block in blocks]
    if embedding is None:
        parts = [bias.expand(batch, -1) for bias in biases]
    else:
        layers = [block.embed for block in blocks if block.embed is not None]
        weights, offsets = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        weight, bias = torch.cat(weights), torch.cat(offsets) + torch.cat(biases)
        parts = F.linear(embedding, weight, bias).split([len(bias) for bias in biases], 1)
    return dict(zip(blocks, parts, strict=True))
