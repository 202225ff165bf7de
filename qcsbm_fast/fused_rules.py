"""Rules of `rules.apply` whose tangents the package's fused ops push: normalisations with SiLU, softmax, attention.

A rule `(func, args, kwargs)` returns what the call gives, or NotImplemented where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from . import ops
from .dual import Dual, DualUnsupported
from .ops.layout import to_channels_last


def duals(*values: Any) -> list[Dual]:
    """The duals in nested containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Dual)]


def only_first(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the first argument is a dual and the others are none."""
    return isinstance(args[0], Dual) and not duals(args[1:], kwargs)


class _NormDual(Dual):
    """The group norm of a dual that is not worked out yet: with the SiLU that often follows it is one op."""

    def __init__(self, x: Dual, gamma: Tensor, beta: Tensor, groups: int, eps: float):
        self._inputs = (x.primal, x.tangents, gamma, beta, groups, eps)
        self.aliased = False

    def value(self, silu: bool = False) -> Dual:
        x, tangents, gamma, beta, groups, eps = self._inputs
        images, moving = (
            v.flatten(n).unsqueeze(-1) if x.dim() != 4 else v for n, v in ((2, x), (3, tangents))
        )
        primal, moved = ops.group_norm_silu_jvp(
            images, moving, None, gamma, beta, groups=groups, eps=eps, silu=silu
        )
        return Dual(primal.reshape(x.shape), moved.reshape(tangents.shape))

    @property
    def pending(self) -> bool:
        return "_inputs" in self.__dict__

    def __getattribute__(self, name: str) -> Any:
        if name in ("primal", "tangents") and self.pending:
            self.assign(self.value())
        return super().__getattribute__(name)

    def assign(self, result: Dual) -> Dual:
        super().assign(result)
        self.__dict__.pop("_inputs", None)
        return self

    def require_graph(self) -> None:
        if not self.pending:
            super().require_graph()

    @property
    def shape(self) -> torch.Size:
        return self._inputs[0].shape if self.pending else self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._inputs[0].dtype if self.pending else self.primal.dtype


def _silu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if isinstance(x, _NormDual) and x.pending:
        return x.value(silu=True)
    values = (x.primal, x.tangents)
    images = x.primal.dim() == 4 and x.primal.is_contiguous(memory_format=torch.channels_last)
    if images:  # elementwise: the op reads the memory as it lies
        values = tuple(to_channels_last(value).movedim(-3, -1) for value in values)
    pushed = ops.bias_act_jvp(*values, kind="swish", constant=1.0)
    return Dual(*(value.movedim(-1, -3) if images else value for value in pushed))


def _group_norm(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def normalise(
        x: Dual, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Any:
        channels = x.shape[1]
        gamma = x.primal.new_ones(channels) if weight is None else weight
        beta = x.primal.new_zeros(channels) if bias is None else bias
        return _NormDual(x, gamma, beta, groups, eps)

    if not only_first(args, kwargs) or args[0].primal.dim() < 3:
        return NotImplemented
    return normalise(*args, **kwargs)


def _layer_norm(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Over the last dimension: a group norm of images of one pixel, one group."""

    def normalise(
        x: Dual, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Any:
        channels, rows = shape[-1], x.reshape(-1, shape[-1], 1, 1)
        gamma = x.primal.new_ones(channels) if weight is None else weight
        beta = x.primal.new_zeros(channels) if bias is None else bias
        return _NormDual(rows, gamma, beta, 1, eps).value().reshape(x.shape)

    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    if not only_first(args, kwargs) or len(shape) != 1:
        return NotImplemented
    return normalise(*args, **kwargs)


def _batch_norm(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def normalise(
        x: Dual, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
        momentum: float = 0.1, eps: float = 1e-5,
    ) -> Any:  # fmt: skip
        if training or var is None:  # samples depend on each other, and the statistics on the call
            raise DualUnsupported("batch_norm in training is not pushed through a Dual")
        scale = torch.rsqrt(var + eps) * (1.0 if weight is None else weight)
        tangents = x.tangents * scale.to(x.dtype).reshape(-1, *(1,) * (x.primal.dim() - 2))
        return Dual(func(x.primal, mean, var, weight, bias, False, momentum, eps), tangents)

    return normalise(*args, **kwargs) if only_first(args, kwargs) else NotImplemented


def _softmax(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not only_first(args, kwargs) or dim is None or kwargs.get("dtype") or len(args) > 2:
        return NotImplemented
    x, dim = args[0], dim % args[0].primal.dim() - args[0].primal.dim()
    pushed = ops.softmax_jvp(*(value.movedim(dim, -1) for value in (x.primal, x.tangents)))
    return Dual(*(value.movedim(-1, dim) for value in pushed))


def _attention(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if is_causal or enable_gqa:
            return NotImplemented
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        z = torch.matmul(query * factor, key.transpose(-2, -1))
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            z = z + (
                torch.zeros_like(attn_mask, dtype=z.dtype).masked_fill(~attn_mask, -torch.inf)
                if hidden
                else attn_mask
            )
        return torch.matmul(F.dropout(torch.softmax(z, -1), dropout_p), value)

    return attend(*args, **kwargs)


FUSED: dict[str, Callable[..., Any]] = {
    "silu": _silu,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
}
