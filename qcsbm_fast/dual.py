"""Dual values: a primal and the tangents pushed along with it.

A network written once runs on plain tensors and on duals. Linear functions push all tangents as one enlarged batch;
sums, concatenations and scalings of duals are spelled as for tensors; non-linear layers call a fused op that reads the
primal once. Tangents are explicit because PyTorch's implicit forward mode gives a custom op a zero tangent, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F


class DualUnsupported(NotImplementedError, AttributeError):
    """A function that does not know how to push a `Dual` was given one."""


class Dual:
    """`primal` `(B, *)` with `K` directional derivatives `tangents` `(K, B, *)`.

    Raises:
        ValueError: if the shapes do not match.
    """

    __slots__ = ("primal", "tangents")

    def __init__(self, primal: Tensor, tangents: Tensor):
        if tangents.shape[1:] != primal.shape:
            raise ValueError(
                f"Dual: tangents expected (K, {', '.join(map(str, primal.shape))}), got {tuple(tangents.shape)}"
            )
        self.primal = primal
        self.tangents = tangents

    def __repr__(self) -> str:
        return f"Dual(primal {tuple(self.primal.shape)}, {self.tangents.shape[0]} tangents)"

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.primal.dtype

    @property
    def device(self) -> torch.device:
        return self.primal.device

    def map(self, linear_function: Callable[[Tensor], Tensor]) -> Dual:
        """Applies a function that is linear and acts on trailing dimensions only."""
        return Dual(linear_function(self.primal), linear_function(self.tangents))

    def reshape(self, *shape: int) -> Dual:
        """As `Tensor.reshape`, the batch dimension kept first."""
        return Dual(self.primal.reshape(*shape), self.tangents.reshape(self.tangents.shape[0], *shape))

    def flatten(self, start_dim: int = 0) -> Dual:
        """As `Tensor.flatten`, of the dimensions from `start_dim` on."""
        return Dual(self.primal.flatten(start_dim), self.tangents.flatten(start_dim + 1))

    def __neg__(self) -> Dual:
        return self.map(torch.neg)

    def __add__(self, other: Value | float) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.primal + other.primal, self.tangents + other.tangents)
        primal = self.primal + other
        return Dual(primal, self.tangents.expand(-1, *primal.shape))

    __radd__ = __add__

    def __sub__(self, other: Value | float) -> Dual:
        return self + (-other)

    def __rsub__(self, other: Tensor | float) -> Dual:
        return (-self) + other

    def __mul__(self, other: Value | float) -> Dual:
        if isinstance(other, Dual):
            return Dual(
                self.primal * other.primal, self.tangents * other.primal + self.primal * other.tangents
            )
        return Dual(self.primal * other, self.tangents * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Tensor | float) -> Dual:
        if isinstance(other, Dual):
            raise DualUnsupported("division by a Dual is not pushed")
        return Dual(self.primal / other, self.tangents / other)

    def __getattr__(self, name: str) -> Any:
        raise DualUnsupported(f"Tensor.{name} is not pushed through a Dual")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise DualUnsupported(f"{getattr(func, '__name__', func)} is not pushed through a Dual")
        return handler(*args, **(kwargs or {}))


def _refuse(name: str) -> Callable[..., Any]:
    def method(self: Dual, *args: Any) -> Any:
        raise DualUnsupported(f"{name} is not pushed through a Dual")

    return method


for _name in ("__getitem__", "__len__", "__iter__", "__bool__", "__float__", "__pow__", "__rpow__", "__matmul__",
              "__rmatmul__", "__rtruediv__", "__lt__", "__le__", "__gt__", "__ge__", "__array__"):  # fmt: skip
    setattr(Dual, _name, _refuse(_name))


Value: TypeAlias = Tensor | Dual
V = TypeVar("V", Tensor, Dual)


def linear(x: V, weight: Tensor, bias: Tensor | None = None) -> V:
    """`x W^T + bias`; tangents lose the bias."""
    if isinstance(x, Dual):
        return Dual(F.linear(x.primal, weight, bias), F.linear(x.tangents, weight))
    return F.linear(x, weight, bias)


def conv2d(x: V, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> V:
    """Convolution of images `(B, C, H, W)`; the tangents are one batch of `K B` images, without the bias."""
    if isinstance(x, Dual):
        tangents = F.conv2d(x.tangents.flatten(0, 1), weight, None, stride, padding)
        return Dual(
            F.conv2d(x.primal, weight, bias, stride, padding), tangents.unflatten(0, x.tangents.shape[:2])
        )
    return F.conv2d(x, weight, bias, stride, padding)


def chunk(x: V, chunks: int) -> list[V]:
    """Equal parts of the last dimension."""
    if isinstance(x, Dual):
        pairs = zip(x.primal.chunk(chunks, -1), x.tangents.chunk(chunks, -1), strict=True)
        return [Dual(primal, tangents) for primal, tangents in pairs]
    return list(x.chunk(chunks, -1))


def cat(values: Sequence[Value], dim: int = 0) -> Value:
    """Concatenation along a dimension other than the batch; a plain tensor among duals has zero tangents."""
    duals = [v for v in values if isinstance(v, Dual)]
    if not duals:
        return torch.cat([v for v in values if isinstance(v, Tensor)], dim)
    if dim % duals[0].primal.dim() == 0:
        raise ValueError("cat: dim expected a dimension other than the batch (0) for duals")
    probes, batch = duals[0].tangents.shape[:2]
    rows = [
        v.tangents.flatten(0, 1) if isinstance(v, Dual) else v.new_zeros((probes * batch, *v.shape[1:]))
        for v in values
    ]  # one batch, so that images keep their channels next to each other in memory
    return Dual(
        torch.cat([v.primal if isinstance(v, Dual) else v for v in values], dim),
        torch.cat(rows, dim).unflatten(0, (probes, batch)),
    )


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.conv2d: conv2d,
    torch.cat: cat,
    torch.neg: Dual.__neg__,
    torch.Tensor.add: lambda a, b: b + a,
    torch.Tensor.sub: lambda a, b: b.__rsub__(a),
    torch.Tensor.mul: lambda a, b: b * a,
    torch.add: lambda a, b: a + b if isinstance(a, Dual) else b + a,
    torch.sub: lambda a, b: a - b if isinstance(a, Dual) else b.__rsub__(a),
    torch.mul: lambda a, b: a * b if isinstance(a, Dual) else b * a,
    torch.flatten: lambda x, start_dim=0: x.flatten(start_dim),
}
