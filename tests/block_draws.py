"""Random arguments of the ops that are blocks of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from draws import Draw, Size
from qcsbm_fast import ops
from qcsbm_fast.ops.registry import OPS, accumulate_dtype

FILTERS = {
    "up": ([0.25, 0.75, 0.75, 0.25], 2, 1, 2),
    "down": ([0.125, 0.375, 0.375, 0.125], 1, 2, 1),
    None: ([], 1, 1, 0),
}


def _weight(d: Draw, out: int, channels: int, size: int) -> Tensor:
    """Its outputs have the variance of the inputs."""
    weight = d.images(out, channels, size, size) / (size * max(channels, 1) ** 0.5)
    return weight.to(accumulate_dtype(d.dtype))


def _images(d: Draw, size: Size, probes: int) -> tuple[Tensor, Tensor | None]:
    return d.images(*size), d.images(probes, *size) if probes else None


def res_block(
    probes: int,
    out: int | None = None,
    resample: Literal["up", "down"] | None = None,
    *,
    grads: int = 0,
    weights: bool = True,
) -> Callable[[Draw, Size], tuple[Any, ...]]:
    """Arguments of `res_block`, in two groups of channels before and two after; with cotangents, of its adjoint.

    out: channels of the result; None for those of the images.
    """

    def build(d: Draw, size: Size) -> tuple[Any, ...]:
        batch, channels, *sides = size
        width = out or channels
        projects = resample is not None or width != channels
        parameters = (
            d.vector(batch, width),
            *(d.vector(channels) for _ in "ab"),
            _weight(d, width, channels, 3),
            *(d.vector(width) for _ in "ab"),
            _weight(d, width, width, 3),
        )
        bias, shortcut = d.vector(width), _weight(d, width, channels, 1) if projects else None
        given = _images(d, size, probes)
        taps, up, down, pad = FILTERS[resample]
        call = (*given, *parameters, bias, shortcut, 2, 2, 1e-6, 0.7, taps, up, down, pad)
        if not grads:
            return call
        above = _images(d, (batch, width, *(side * up // down for side in sides)), probes if grads > 1 else 0)
        kept = OPS["res_block"].reference(*call)[2:]
        return *above, *given, *parameters, shortcut, *kept, 2, 2, 0.7, taps, up, down, pad, weights

    return build


def res_block_public(*call: Any) -> Any:
    *tensors, groups_in, groups_out, eps, scale, taps, up, down, pad = call
    found = ops.res_block(
        *tensors, groups=(groups_in, groups_out), eps=eps, scale=scale, resample=(taps, up, down, pad)
    )
    return found if tensors[1] is not None else found[0]


def attention_block(
    probes: int, *, grads: int = 0, weights: bool = True
) -> Callable[[Draw, Size], tuple[Any, ...]]:
    """Arguments of `attention_block`, in two groups of channels; with cotangents, of its adjoint."""

    def build(d: Draw, size: Size) -> tuple[Any, ...]:
        c = size[1]
        gamma, beta, bias, bias_out = d.vector(c), d.vector(c), d.vector(3 * c), d.vector(c)
        weight, weight_out = _weight(d, 3 * c, c, 1), _weight(d, c, c, 1)
        weight[:c] /= max(c, 1) ** 0.5  # scores of order 1
        given = _images(d, size, probes)
        call = (*given, gamma, beta, weight, bias, weight_out, bias_out, 2, 1e-6, 0.7)
        if not grads:
            return call
        above = _images(d, size, probes if grads > 1 else 0)
        kept = OPS["attention_block"].reference(*call)[2:]
        return *above, *given, gamma, beta, weight, weight_out, *kept, 2, 0.7, weights

    return build


def attention_block_public(*call: Any) -> Any:
    *tensors, groups, eps, scale = call
    found = ops.attention_block(*tensors, groups=groups, eps=eps, scale=scale)
    return found if tensors[1] is not None else found[0]
