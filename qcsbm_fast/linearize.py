"""Value, `J v` and `J^T v` of any function of a batch: by a dual pass where it pushes duals, else by `foreign`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import foreign
from .dual import Dual


class Linearization(NamedTuple):
    """`fn` at the leaf `x`: `value` `(B, *)` and `jv` `(K, B, *)`, both with their graphs if grad mode was on."""

    x: Tensor
    value: Tensor
    jv: Tensor

    def vjp(self, v: Tensor) -> Tensor:
        """`J^T v_k` `(K, B, *)`, without a graph of its own; the graph of `value` is kept."""
        return pull(self.value, self.x, v)


def pull(value: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """`J^T v_k` `(K, B, *)` of a `value` at the leaf `x`; its graph is kept."""
    if not value.requires_grad:
        return torch.zeros_like(v)
    rows = [
        torch.autograd.grad(value, x, cotangent, retain_graph=True, materialize_grads=True)[0]
        for cotangent in v.to(value.dtype)
    ]
    return torch.stack(rows)


def push(fn: Callable[[Any], Any], x: Tensor, v: Tensor) -> Linearization:
    """Evaluates `fn` at `x` `(B, *)` with the tangents `v` `(K, B, *)`.

    Raises:
        ValueError: if the value's shape is not that of `x`.
        NotImplementedError, RuntimeError: where no tangent can be had, or it would be wrong (see `foreign`).
    """
    leaf = x.detach().clone().requires_grad_(torch.is_grad_enabled())  # forward mode refuses expanded tensors
    try:
        result = fn(Dual(leaf, v))
    except Exception as not_dual:  # a module's own checks may raise anything at the sight of a dual
        try:
            value, jv = foreign.push(fn, leaf, v)
        except Exception as error:
            raise error from not_dual
        reason = str(not_dual).partition("\n")[0][:160]
        warnings.warn(f"fn goes through PyTorch's forward mode as a whole, slower: {reason}", stacklevel=3)
    else:
        if not isinstance(result, Dual):
            raise TypeError(f"fn: expected a value that depends on its input, got {type(result).__name__}")
        value, jv = result.primal, result.tangents
    if value.shape != x.shape:
        shape = tuple(x.shape)
        raise ValueError(f"fn: expected a map {shape} -> {shape}, got the value {tuple(value.shape)}")
    return Linearization(leaf, value, jv)
