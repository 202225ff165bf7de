"""Self-attention over the pixels of an image, for plain tensors and duals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import dual, ops
from ..dual import Dual, V
from .embedding import initialise
from .image_layers import GroupNormSiLU, add


def attend(query: V, key: V, value: V) -> V:
    """`softmax(query key^T) value`, `(B, N, C) -> (B, N, C)`.

    With `z = query key^T` and `p = softmax(z)` the tangents are `p' value + p value'`, where `p'` is the tangent of
    the softmax at `z' = [query', query] [key, key']^T`, one product.
    """
    if isinstance(query, Dual) and isinstance(key, Dual) and isinstance(value, Dual):
        probes, batch = query.tangents.shape[:2]
        left = torch.cat([query.tangents, _for_each_probe(query)], -1)
        right = torch.cat([_for_each_probe(key), key.tangents], -1)
        z_tangents = torch.bmm(left.flatten(0, 1), right.flatten(0, 1).mT).unflatten(0, (probes, batch))
        p, p_tangents = ops.softmax_jvp(torch.bmm(query.primal, key.primal.mT), z_tangents)
        # p with all value', side by side: p is not repeated. The value is a product of its own, so that J^T v does not
        # pass through the tangents.
        columns = value.tangents.permute(1, 2, 0, 3).flatten(2)
        around = torch.bmm(p, columns).unflatten(2, (probes, -1)).permute(2, 0, 1, 3)
        through = torch.bmm(p_tangents.flatten(0, 1), _for_each_probe(value).flatten(0, 1)).unflatten(
            0, (probes, batch)
        )
        return Dual(torch.bmm(p, value.primal), around + through)
    return ops.softmax(query @ key.mT) @ value  # pyright: ignore[reportOperatorIssue]


def _for_each_probe(x: Dual) -> Tensor:
    """The primal in the shape of the tangents; for a single one without the sum that ends an expansion's gradient."""
    return x.primal[None].expand_as(x.tangents)


class Attention(nn.Module):
    """`scale (x + out(attend(query h, key h, value h)))`, `h` the normalised image `(B, C, H, W)`."""

    def __init__(self, channels: int, scale: float, init_scale: float):
        super().__init__()
        self.norm = GroupNormSiLU(channels, silu=False)
        self.query, self.key, self.value = (initialise(nn.Linear(channels, channels), 0.1) for _ in range(3))
        self.out = initialise(nn.Linear(channels, channels), init_scale)
        self.scale = scale

    def forward(self, x: V) -> V:
        weight, bias = self._projection()
        out = self.out.weight[:, :, None, None]
        x = dual.autocast(x)
        if dual.has_convolution(x, out):
            return self._as_one_op(x, weight, bias, out)
        height, width = x.shape[-2:]

        def to_tokens(image: Tensor) -> Tensor:
            return image.flatten(-2).mT

        def to_image(tokens: Tensor) -> Tensor:
            return tokens.mT.unflatten(-1, (height, width))

        h: Any = dual.conv2d(self.norm(x), weight, bias)
        tokens: Any = h.map(to_tokens) if isinstance(h, Dual) else to_tokens(h)
        h = attend(*dual.chunk(tokens, 3))
        h = h.map(to_image) if isinstance(h, Dual) else to_image(h)
        h = dual.conv2d(h, out, self.out.bias)
        return add(x, h, self.scale)  # pyright: ignore[reportArgumentType]

    def _as_one_op(self, x: Any, weight: Tensor, bias: Tensor, out: Tensor) -> Any:
        """The same where the convolutions have kernels of the package."""
        norm = self.norm
        parameters = (norm.gamma, norm.beta, weight, bias, out, self.out.bias)
        return dual.through(ops.attention_block, x, *parameters, groups=norm.groups, scale=self.scale)

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Weight `(3 C, C, 1, 1)` and bias of query, key and value, the scores' factor `1 / sqrt C` included."""
        factor = 1 / math.sqrt(self.query.in_features)
        weight = torch.cat([self.query.weight * factor, self.key.weight, self.value.weight])
        return weight[:, :, None, None], torch.cat([self.query.bias * factor, self.key.bias, self.value.bias])
