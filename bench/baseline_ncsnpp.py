"""NCSN++ in plain eager PyTorch and the paper's training step: what the image models are compared with.

NCHW, resampling by zero insertion and grouped convolution, attention by einsum, the penalty by nested VJPs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcsbm_fast.nn import NCSNpp


def _contiguous(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().contiguous().clone())


class _Norm(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        self.norm = nn.GroupNorm(ours.groups, ours.gamma.shape[0], eps=1e-6)
        self.norm.weight, self.norm.bias = _contiguous(ours.gamma), _contiguous(ours.beta)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class _Conv(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        self.weight, self.bias = _contiguous(ours.weight), _contiguous(ours.bias)
        self.stride, self.padding = ours.stride, ours.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def _fir(
    x: Tensor, taps: tuple[float, ...] | list[float], up: int, down: int, pad: tuple[int, int]
) -> Tensor:
    """Zero insertion, padding, a convolution with the plane's filter for every channel, every `down`-th pixel."""
    batch, channels, height, width = x.shape
    x = F.pad(x.reshape(batch, channels, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
    x = F.pad(x.reshape(batch, channels, height * up, width * up), (*pad, *pad))
    kernel = torch.tensor(taps, dtype=x.dtype, device=x.device).flip(0)
    kernel = torch.outer(kernel, kernel).expand(channels, 1, -1, -1)
    return F.conv2d(x, kernel, groups=channels)[:, :, ::down, ::down]


class _Block(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        self.norm_in, self.norm_out = _Norm(ours.norm_in), _Norm(ours.norm_out)
        self.conv_in, self.conv_out = _Conv(ours.conv_in), _Conv(ours.conv_out)
        self.embed = nn.Linear(ours.embed.in_features, ours.embed.out_features)
        self.embed.load_state_dict(ours.embed.state_dict())
        self.shortcut = None if ours.shortcut is None else _Conv(ours.shortcut)
        self.resample, self.scale, self.dropout = ours.resample, ours.scale, ours.dropout.p

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            r = self.resample
            h, x = _fir(h, r.taps, r.up, r.down, r.pad), _fir(x, r.taps, r.up, r.down, r.pad)
        h = self.conv_in(h) + self.embed(embedding)[:, :, None, None]
        h = self.conv_out(F.dropout(F.silu(self.norm_out(h)), self.dropout, self.training))
        return (h + (x if self.shortcut is None else self.shortcut(x))) * self.scale


class _Attention(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        self.norm, self.scale = _Norm(ours.norm), ours.scale
        self.weights = nn.ParameterList(
            _contiguous(p.weight.T) for p in (ours.query, ours.key, ours.value, ours.out)
        )
        self.biases = nn.ParameterList(
            _contiguous(p.bias) for p in (ours.query, ours.key, ours.value, ours.out)
        )

    def project(self, x: Tensor, index: int) -> Tensor:
        y = torch.einsum("bhwc,cd->bhwd", x.permute(0, 2, 3, 1), self.weights[index]) + self.biases[index]
        return y.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = self.norm(x)
        query, key, value = (self.project(n, i) for i in range(3))
        z = torch.einsum("bchw,bcij->bhwij", query, key) / math.sqrt(c)
        p = torch.softmax(z.reshape(b, h, w, h * w), -1).reshape(b, h, w, h, w)
        return (x + self.project(torch.einsum("bhwij,bcij->bchw", p, value), 3)) * self.scale


class PlainNCSNpp(nn.Module):
    """The network of `net` with copies of its parameters: the field `f(x, sigma)`, for tensors only.

    For "biggan" blocks with a filter, "residual" progressive input and no progressive output: the paper's networks.
    """

    def __init__(self, net: NCSNpp):
        super().__init__()
        c = net.config
        if (c.resblock_type, c.fir, c.progressive, c.progressive_input, c.conditional, c.scale_by_sigma) != (
            "biggan", True, "none", "residual", True, True,
        ):  # fmt: skip
            raise ValueError("net: expected the structure of the paper's networks")
        self.scale, self.centered = c.scale, c.centered
        self.features, self.embed = net.features, net.embed
        self.input = _Conv(net.input)
        self.down, self.pyramids = nn.ModuleList(), nn.ModuleList()
        for level in net.down:
            steps = nn.ModuleList()
            for index, block in enumerate(level.blocks):
                steps.append(
                    nn.ModuleList(
                        [_Block(block), *([_Attention(level.attention[index])] if level.attention else [])]
                    )
                )
            if level.resample is not None:
                self.pyramids.append(_Conv(level.pyramid_resample.conv))
                steps.append(nn.ModuleList([_Block(level.resample)]))
            self.down.append(steps)
        self.taps = [tap / sum(c.fir_kernel) for tap in c.fir_kernel]
        first, attention, second = net.middle
        self.middle = nn.ModuleList([_Block(first), _Attention(attention), _Block(second)])
        self.up = nn.ModuleList()
        for level in net.up:
            parts = nn.ModuleList(_Block(block) for block in level.blocks)
            parts.extend(_Attention(attention) for attention in level.attention)
            if level.resample is not None:
                parts.append(_Block(level.resample))
            self.up.append(parts)
        self.blocks_per_level = c.num_res_blocks
        self.out_norm, self.out_conv = _Norm(net.output.norm), _Conv(net.output.conv)  # pyright: ignore

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        embedding = self.embed(self.features(sigma))  # pyright: ignore[reportOptionalCall]
        if not self.centered:
            x = 2 * x - 1
        pyramid, skips = x, [self.input(x)]
        pyramids = iter(self.pyramids)
        for steps in self.down:
            for index, step in enumerate(steps):  # pyright: ignore
                h = step[0](skips[-1], embedding)
                if index == self.blocks_per_level:
                    wide = _fir(pyramid, self.taps, 1, 1, (2, 2))
                    pyramid = h = (next(pyramids)(wide) + h) * self.scale
                elif len(step) > 1:
                    h = step[1](h)
                skips.append(h)
        h = self.middle[2](self.middle[1](self.middle[0](skips[-1], embedding)), embedding)
        for parts in self.up:
            for index, part in enumerate(parts):  # pyright: ignore
                if isinstance(part, _Attention):
                    h = part(h)
                elif index <= self.blocks_per_level:
                    h = part(torch.cat([h, skips.pop()], 1), embedding)
                else:
                    h = part(h, embedding)
        return self.out_conv(F.silu(self.out_norm(h)))


def denoising_step(net: nn.Module, x0: Tensor, sigma: Tensor) -> None:
    """Gradients of the denoising loss."""
    z = torch.randn_like(x0)
    field = net(x0 + sigma[:, None, None, None] * z, sigma)
    (0.5 * (field + z).square().flatten(1).sum(1).mean()).backward()


def nested_step(
    net: nn.Module, x0: Tensor, sigma: Tensor, factor: float, probes: int, *, merged: bool = False
) -> None:
    """Gradients of the quasi-conservative loss with the paper's estimator of `tr(J J^T) - tr(J J)`.

    The inputs are repeated for the probes; `once = J^T v` and `twice = J^T once` by nested VJPs; `||once||^2` and
    `<twice, v>` are trained by two backward calls over one graph, or by one (`merged`).
    """
    x0, sigma = x0.repeat(probes, 1, 1, 1), sigma.repeat(probes)
    s = sigma[:, None, None, None]
    z = torch.randn_like(x0)
    x = (x0 + s * z).requires_grad_()
    v = torch.randint(0, 2, x.shape).to(x.dtype) * 2 - 1
    score = net(x, sigma) / s
    dsm = 0.5 * (s * score + z).square().flatten(1).sum(1)
    (once,) = torch.autograd.grad(score, x, v, create_graph=True)
    (twice,) = torch.autograd.grad(score, x, once, create_graph=True)
    gram = dsm + factor * sigma**2 * once.square().flatten(1).sum(1)
    square = factor * sigma**2 * (twice * v).flatten(1).sum(1)
    if merged:
        (gram - square).mean().backward()
    else:
        gram.mean().backward(retain_graph=True)
        (-square).mean().backward()
