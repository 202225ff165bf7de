"""A network's layers as one call of `ops.layers`, where nobody can tell the difference but by the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from .. import dual
from ..dual import Dual, V
from ..ops import has_image_kernels
from ..ops.layers import HAS_LAYERS, Program, Step, layers
from .attention import Attention
from .image_layers import Conv, ConvResample, GroupNormSiLU, Join, Resample, Sum, ToImage
from .res_block import Dropout, ResBlock

_EPS = 1e-6


class NetworkProgram:
    """The program of a network whose `layout(run, x)` calls `run(part, *values)` for one part after another.

    Parts, parameters and dropout are looked at in every call; other settings of a part are read once.

    Args:
        network: of parts of this package; one with a part of another class, be it a subclass, has no program.
        layout: a function of a runner and a value.
    """

    def __init__(self, network: nn.Module, layout: Callable[[Any, Any], Any]):
        self._program = Program()
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._places = [
            (owner._modules, name, part, type(part))
            for owner in network.modules()
            for name, part in owner._modules.items()
            if part is not None
        ]
        self._counts = [(owner._modules, len(owner._modules)) for owner in network.modules()]
        self._dropouts = [part for part in network.modules() if isinstance(part, Dropout)]
        try:
            self._known = HAS_LAYERS and layout(self._run, 0) == self._program.values - 1
        except KeyError:
            self._known = False

    def current(self) -> bool:
        """Whether the network still has the parts that it had, and no others."""
        return all(owner.get(name) is part for owner, name, part, _ in self._places) and all(
            len(parts) == count for parts, count in self._counts
        )

    def fits(self, x: V) -> bool:
        """Whether a call is the same as calling the parts on `x`: no hook, mode or compiler would see them."""
        values = [x.primal, x.tangents] if isinstance(x, Dual) else [x]
        return (
            self._known
            and has_image_kernels(values[0])
            and forward_ad._current_level < 0
            and not torch._C._are_functorch_transforms_active()
            and not torch._C._len_torch_dispatch_stack()
            and not hooks._has_any_global_hook()
            and not any(part.training and part.p for part in self._dropouts)
            and self._untouched()
            and all(type(value) is Tensor for value in values)
            and all(map(_is_plain, self._parameters()))
        )

    def _untouched(self) -> bool:
        for _, _, part, kind in self._places:
            state = part.__dict__  # past the module's own search for names: this runs at every call
            if (
                type(part) is not kind
                or state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return False
        return True

    def __call__(self, x: V, embedding: Tensor | None) -> V:
        """The layout's result for `x` `(B, C, H, W)` and the embedding of the noise level, `(B, E)`."""
        return dual.through(self._push, x, embedding)

    def _push(self, x: Tensor, tangents: Tensor | None, embedding: Any) -> tuple[Tensor, Tensor]:
        return layers(self._program, x, tangents, embedding, self._parameters())

    def _parameters(self) -> list[Any]:
        return [owner.get(name) for owner, name in self._slots]

    def _run(self, part: Any, *values: int) -> int:
        return _STEPS[type(part)](self, part, *values)

    def _add(
        self,
        kind: Step,
        *values: int,
        parameters: Sequence[tuple[nn.Module, str]] = (),
        numbers: Sequence[float] = (),
        own: Sequence[int] = (),
    ) -> int:
        self._slots += [(module._parameters, name) for module, name in parameters]
        return self._program.add(kind, *values, parameters=len(parameters), numbers=numbers, own=own)

    def _res_block(self, block: ResBlock, x: int) -> int:
        first, second, shortcut, f = block.norm_in, block.norm_out, block.shortcut, block.resample
        parameters = [
            *_of(first, "gamma", "beta"), *_of(block.conv_in, "weight", "bias"),
            *_of(second, "gamma", "beta"), *_of(block.conv_out, "weight", "bias"),
            *(place for layer in (shortcut, block.embed) if layer for place in _of(layer, "weight", "bias")),
        ]  # fmt: skip
        taps, up, down, before = ([], 1, 1, 0) if f is None else (f.taps, f.up, f.down, f.pad[0])
        parts = int(block.embed is not None), int(shortcut is not None)
        own = (parts[0], first.groups, second.groups, parts[1], up, down, before, len(taps))
        return self._add(
            Step.RES_BLOCK, x, parameters=parameters, numbers=(_EPS, block.scale, *taps), own=own
        )

    def _attention(self, part: Attention, x: int) -> int:
        projections = [part.query, part.key, part.value, part.out]
        parameters = _of(part.norm, "gamma", "beta")
        parameters += [place for layer in projections for place in _of(layer, "weight", "bias")]
        numbers = (_EPS, part.scale, 1 / math.sqrt(part.query.in_features))
        return self._add(Step.ATTENTION, x, parameters=parameters, numbers=numbers, own=(part.norm.groups,))

    def _convolution(self, conv: Conv, x: int, after: int | None = None) -> int:
        own = (conv.stride, conv.padding, conv.padding if after is None else after)
        return self._add(Step.CONVOLUTION, x, parameters=_of(conv, "weight", "bias"), own=own)

    def _filter(self, taps: Sequence[float], up: int, down: int, pad: tuple[int, int], x: int) -> int:
        return self._add(Step.FILTER, x, numbers=taps, own=(up, down, *pad, len(taps)))

    def _resample(self, part: Resample, x: int) -> int:
        return self._filter(part.taps, part.up, part.down, part.pad, x)

    def _conv_resample(self, part: ConvResample, x: int) -> int:
        if part.upsample is not None:
            return self._convolution(part.conv, self._resample(part.upsample, x))
        if part.taps is None:
            return self._convolution(part.conv, x, after=1)
        return self._convolution(part.conv, self._filter(part.taps, 1, 1, part.pad, x))

    def _norm(self, norm: GroupNormSiLU, x: int) -> int:
        own = (norm.groups, int(norm.silu))
        return self._add(Step.NORM, x, parameters=_of(norm, "gamma", "beta"), numbers=(_EPS,), own=own)

    def _to_image(self, part: ToImage, x: int) -> int:
        return self._convolution(part.conv, self._norm(part.norm, x))

    def _sum(self, part: Sum, a: int, b: int) -> int:
        return self._add(Step.SUM, a, b, numbers=(part.scale,))

    def _join(self, part: Join, a: int, b: int) -> int:
        return self._add(Step.JOIN, a, b)


_STEPS: dict[type, Callable[..., int]] = {
    ResBlock: NetworkProgram._res_block,
    Attention: NetworkProgram._attention,
    Conv: NetworkProgram._convolution,
    Resample: NetworkProgram._resample,
    ConvResample: NetworkProgram._conv_resample,
    ToImage: NetworkProgram._to_image,
    Sum: NetworkProgram._sum,
    Join: NetworkProgram._join,
}


def _of(module: nn.Module, *names: str) -> list[tuple[nn.Module, str]]:
    return [(module, name) for name in names]


def _is_plain(parameter: Any) -> bool:
    """Whether the kernels read it as it is; a pruned or parametrised one is not even there."""
    return (
        type(parameter) in (nn.Parameter, Tensor)
        and parameter.dtype is torch.float32
        and (parameter.dim() < 4 or parameter.is_contiguous(memory_format=torch.channels_last))
    )
