"""Layers of an image network, one after another, as one call: no new mathematics, but the other ops' without a visit to
Python, the dispatcher and autograd for each, which for small images take longer than the numbers.

A program is a list of steps. Each makes one value, images and their tangents, from one or two earlier ones; value 0 is
the input and step i makes value i + 1; the last is the result. The kernel (csrc/register/layers.cpp) runs the steps in
their order, its adjoint in the reverse order, adding up the cotangents of a value that several steps read.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from . import backend
from .layout import to_channels_last
from .registry import LIBRARY, gradient_wanted

_PROGRAM = "Tensor? embedding, Tensor[] parameters, {}int[] program, float[] numbers"
LIBRARY.define(f"layers(Tensor x, Tensor? tangents, {_PROGRAM.format('')}, bool keep) -> Tensor[]")
LIBRARY.define(
    "layers_vjp(Tensor g, Tensor? g_tangents, Tensor x, Tensor? tangents, "
    f"{_PROGRAM.format('Tensor[] kept, ')}, bool inputs, bool weights) -> Tensor[]"
)
_layers, _layers_vjp = torch.ops.qcsbm.layers.default, torch.ops.qcsbm.layers_vjp.default
HAS_LAYERS = backend.has_kernel("layers", "cpu")

_OWN_FIELDS = 8


class Step(IntEnum):
    """The kinds of steps, with the tensors among the parameters, the numbers and the whole numbers that each takes.

    RES_BLOCK: `gamma_in, beta_in, weight_in`, the first convolution's bias `(D,)`, `gamma_out, beta_out, weight_out,
        bias_out` of `res_block`, with a shortcut its weight and bias, with an embedding the weight `(D, E)` and
        bias of what it adds to the first convolution's; `eps, scale` and the taps; whether there is an embedding, the
        groups of the two norms, whether there is a shortcut, `up, down`, the zeros before and the number of taps.
    ATTENTION: `gamma, beta` of `attention_block`, then weight `(C, C)` and bias of query, key, value and output; `eps,
        scale` and the factor of the query; the groups.
    CONVOLUTION: a weight `(D, C, S, S)`, S 1 or 3, and a bias; the stride and the zeros before and after the image.
    FILTER: the taps of `fir`; `up, down`, the zeros before and after, the number of taps.
    SUM: the factor of the sum of two values. JOIN: the channels of two values behind one another.
    NORM: `gamma, beta` of `group_norm_silu`; `eps`; the groups, and whether SiLU follows.
    """

    RES_BLOCK = 0
    ATTENTION = 1
    CONVOLUTION = 2
    FILTER = 3
    SUM = 4
    JOIN = 5
    NORM = 6


class Program:
    """Steps as the kernel takes them; how many parameters they have."""

    def __init__(self) -> None:
        self.fields: list[int] = []
        self.numbers: list[float] = []
        self.parameters = 0
        self.values = 1

    def add(
        self,
        kind: Step,
        *values: int,
        parameters: int = 0,
        numbers: Sequence[float] = (),
        own: Sequence[int] = (),
    ) -> int:
        """A step that reads these values, with its next `parameters` tensors; returns the value that it makes."""
        first, second = (*values, -1)[:2]
        rest = [0] * (_OWN_FIELDS - len(own))
        self.fields += [kind, first, second, self.parameters, len(self.numbers), *own, *rest]
        self.numbers += numbers
        self.parameters += parameters
        self.values += 1
        return self.values - 1


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        program: Program,
        x: Tensor,
        tangents: Tensor | None,
        embedding: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, y_tangents, *kept = _layers(
                x, tangents, embedding, parameters, program.fields, program.numbers, True
            )
        ctx.program, ctx.shape = program, y.shape
        ctx.save_for_backward(x, tangents, embedding, *parameters, *kept)
        ctx.set_materialize_grads(False)
        return y, y_tangents

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, g: Tensor | None, g_tangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, tangents, embedding, *rest = ctx.saved_tensors
        gdot = None if tangents is None or g_tangents is None else to_channels_last(g_tangents)
        if g is None and gdot is None:
            return (None,) * (4 + ctx.program.parameters)
        g = to_channels_last(x.new_zeros(ctx.shape) if g is None else g)
        first = 1 if tangents is None else 2
        inputs = gradient_wanted(ctx, *range(first))
        last = first + ctx.program.parameters + (embedding is not None)
        weights = gradient_wanted(ctx, *range(first, last))
        given = (ctx.program, inputs, weights, g, gdot, x, tangents, embedding, *rest)
        gx, gt, *found = _Adjoint.apply(*given)  # pyright: ignore[reportGeneralTypeIssues]
        return (
            None,
            gx if inputs else None,
            gt if inputs and gdot is not None else None,
            found[0] if weights and embedding is not None else None,
            *(found[1:] if weights else [None] * ctx.program.parameters),
        )


class _Adjoint(torch.autograd.Function):
    """The adjoint, for which asking for a derivative raises instead of dropping a term."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        program: Program,
        inputs: bool,
        weights: bool,
        g: Tensor,
        g_tangents: Tensor | None,
        x: Tensor,
        tangents: Tensor | None,
        embedding: Tensor | None,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        parameters, kept = rest[: program.parameters], rest[program.parameters :]
        call = (g, g_tangents, x, tangents, embedding, parameters, kept, program.fields, program.numbers)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_layers_vjp(*call, inputs, weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(
            "the network has no derivative of this order: differentiate the tangents of a qcsbm_fast.Dual instead"
        )


def layers(
    program: Program,
    x: Tensor,
    tangents: Tensor | None,
    embedding: Tensor | None,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The program's last value and its tangents, `(B, D, H', W')` and `(K, B, D, H', W')`.

    Where `HAS_LAYERS`, on the CPU, in eager mode.

    Args:
        x: `(B, C, H, W)`; best channels-last.
        tangents: `(K, B, C, H, W)`, dtype and device of `x`; None for none.
        embedding: of the noise level, `(B, E)`, float32 (float64 beside float64 images); None where no block has one.
        parameters: of the steps, one behind the other, float32 (float64 beside float64 images); weights channels-last.

    Raises:
        RuntimeError: naming what does not fit the program.
    """
    x, embedding = to_channels_last(x), None if embedding is None else embedding.contiguous()
    tangents = None if tangents is None else to_channels_last(tangents)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, tangents, embedding, parameters):
        return _Layers.apply(program, x, tangents, embedding, *parameters)  # pyright: ignore[reportReturnType]
    with torch._C._AutoDispatchBelowAutograd():
        y, y_tangents = _layers(x, tangents, embedding, parameters, program.fields, program.numbers, False)
    return y, y_tangents
