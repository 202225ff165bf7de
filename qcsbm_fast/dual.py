"""Dual values: a primal and the tangents pushed along with it.

A network written once runs on plain tensors and on duals. Linear functions push all tangents as one enlarged batch;
sums, concatenations and scalings of duals are spelled as for tensors; non-linear layers call a fused op that reads the
primal once. Tangents are explicit because PyTorch's implicit forward mode gives a custom op a zero tangent, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops


class DualUnsupported(NotImplementedError, AttributeError):
    """A function that does not know how to push a `Dual` was given one."""


class Dual:
    """`primal` `(B, *)` with `K` directional derivatives `tangents` `(K, B, *)`.

    Raises:
        ValueError: if the shapes do not match.
    """

    __slots__ = ("aliased", "primal", "tangents")

    def __init__(self, primal: Tensor, tangents: Tensor):
        if tangents.shape[1:] != primal.shape:
            raise ValueError(
                f"Dual: tangents expected (K, {', '.join(map(str, primal.shape))}), got {tuple(tangents.shape)}"
            )
        self.primal = primal
        self.tangents = tangents
        self.aliased = False  # whether another dual may share its memory: then nothing is done to it in place

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
        self.require_graph()
        return Dual(linear_function(self.primal), linear_function(self.tangents))

    def require_graph(self) -> None:
        """Raises DualUnsupported where the graph of the primal would end: reverse mode sees a constant there."""
        if not torch.is_grad_enabled() and self.primal.requires_grad:
            raise DualUnsupported("a part without a graph is not pushed through a Dual")

    def share(self, *views: Dual) -> None:
        """Notes that `views` show the memory of this dual."""
        for dual in (self, *views):
            dual.aliased = True

    def reshape(self, *shape: Any) -> Dual:
        """As `Tensor.reshape`."""
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        view = Dual(self.primal.reshape(size), self.tangents.reshape(self.tangents.shape[0], *size))
        self.share(view)
        return view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Dual:
        """As `Tensor.flatten`."""
        start, end = (dim if dim < 0 else dim + 1 for dim in (start_dim, end_dim))
        view = Dual(self.primal.flatten(start_dim, end_dim), self.tangents.flatten(start, end))
        self.share(view)
        return view

    def _widened(self, dims: int) -> Tensor:
        """The tangents, to be combined with something of `dims` dimensions."""
        self.require_graph()
        missing = dims - self.primal.dim()
        if missing <= 0:
            return self.tangents
        probes, *shape = self.tangents.shape
        return self.tangents.reshape(probes, *(1,) * missing, *shape)

    def __neg__(self) -> Dual:
        return self.map(torch.neg)

    def __add__(self, other: Value | float) -> Dual:
        if isinstance(other, Dual):
            primal = self.primal + other.primal
            return Dual(primal, self._widened(primal.dim()) + other._widened(primal.dim()))
        primal = self.primal + other
        tangents = self._widened(primal.dim())
        return Dual(primal, tangents.to(primal.dtype).expand(-1, *primal.shape))

    __radd__ = __add__

    def __sub__(self, other: Value | float) -> Dual:
        return self + (-other)

    def __rsub__(self, other: Tensor | float) -> Dual:
        return (-self) + other

    def __mul__(self, other: Value | float) -> Dual:
        if isinstance(other, Dual):
            primal = self.primal * other.primal
            mine, theirs = (value._widened(primal.dim()) for value in (self, other))
            return Dual(primal, mine * other.primal + self.primal * theirs)
        primal = self.primal * other
        return Dual(primal, self._widened(primal.dim()) * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Value | float) -> Dual:
        if isinstance(other, Dual):
            primal = self.primal / other.primal
            mine, theirs = (value._widened(primal.dim()) for value in (self, other))
            return Dual(primal, (mine - primal * theirs) / other.primal)
        primal = self.primal / other
        return Dual(primal, self._widened(primal.dim()) / other)

    def __rtruediv__(self, other: Tensor | float) -> Dual:
        return torch.reciprocal(self) * other  # pyright: ignore

    def __iadd__(self, other: Value | float) -> Dual:
        return self.assign(self + other)

    def __isub__(self, other: Value | float) -> Dual:
        return self.assign(self - other)

    def __imul__(self, other: Value | float) -> Dual:
        return self.assign(self * other)

    def __itruediv__(self, other: Value | float) -> Dual:
        return self.assign(self / other)

    def assign(self, result: Dual) -> Dual:
        """Becomes `result`, as a tensor does under an operation in place.

        Raises:
            DualUnsupported: if another dual may show the same memory, or the shape or dtype would change.
        """
        if self.aliased or (result.shape, result.dtype) != (self.shape, self.dtype):
            raise DualUnsupported("nothing is done in place on this Dual")
        self.primal, self.tangents = result.primal, result.tangents
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Dual]:
        return iter(self.unbind(0))

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        """What a tensor has under that name: a module written for tensors finds it here."""
        from . import rules

        return rules.attribute(self, name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None and not kwargs:
            return handler(*args)
        from . import rules

        return rules.apply(func, args, kwargs or {})


def _method(name: str) -> Callable[..., Any]:
    def method(self: Dual, *args: Any) -> Any:
        from . import rules

        return rules.apply(getattr(Tensor, name), (self, *args), {})

    return method


def _refuse(name: str) -> Callable[..., Any]:
    def method(self: Dual, *args: Any) -> Any:
        raise DualUnsupported(f"{name} is not pushed through a Dual")

    return method


for _name in ("__getitem__", "__setitem__", "__pow__", "__rpow__", "__matmul__", "__rmatmul__", "__abs__", "__lt__",
              "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):  # fmt: skip
    setattr(Dual, _name, _method(_name))
for _name in ("__bool__", "__float__", "__int__", "__index__", "__array__"):
    setattr(Dual, _name, _refuse(_name))


Value: TypeAlias = Tensor | Dual
V = TypeVar("V", Tensor, Dual)


def linear(x: V, weight: Tensor, bias: Tensor | None = None) -> V:
    """`x W^T + bias`; tangents lose the bias."""
    if isinstance(x, Dual):
        x.require_graph()
        return Dual(F.linear(x.primal, weight, bias), F.linear(x.tangents, weight))
    return F.linear(x, weight, bias)


def conv2d(x: V, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> V:
    """Convolution of images `(B, C, H, W)`; the tangents are one batch of `K B` images, without the bias."""
    keeps_size = stride == 1 and weight.shape[2:] in ((1, 1), (3, 3)) and padding == weight.shape[2] // 2
    if keeps_size:
        x = autocast(x)
    fused = keeps_size and has_convolution(x, weight)
    if isinstance(x, Dual):
        if fused:
            return Dual(*ops.convolve_jvp(x.primal, x.tangents, weight, bias))
        tangents = _convolve(x.tangents.flatten(0, 1), weight, None, stride, padding)
        return Dual(
            _convolve(x.primal, weight, bias, stride, padding), tangents.unflatten(0, x.tangents.shape[:2])
        )
    if fused:
        return ops.convolve(x, weight, bias)
    return _convolve(x, weight, bias, stride, padding)


def has_convolution(x: Value, weight: Tensor) -> bool:
    """`ops.has_convolution` of the images, or of a dual's."""
    return ops.has_convolution(x.primal if isinstance(x, Dual) else x, weight)


def through(op: Callable[..., tuple[Tensor, Tensor]], x: V, *arguments: Any, **options: Any) -> V:
    """`op(x, tangents, ...)`, a value and its tangents, for a dual, or for a tensor, which has none."""
    if isinstance(x, Dual):
        return Dual(*op(x.primal, x.tangents, *arguments, **options))
    return op(x, None, *arguments, **options)[0]


def autocast(x: V) -> V:
    """What autocast makes of images on the CPU, the one device whose convolution is an op of the package."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return x
    dtype = torch.get_autocast_dtype("cpu")
    if isinstance(x, Dual):
        return Dual(x.primal.to(dtype), x.tangents.to(dtype))
    return x.to(dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if weight.shape[2:] == (1, 1) and (stride, padding) == (1, 0):
        # a matrix product over the channels: of channels-last images the gradients are twice as fast
        return F.linear(x.movedim(-3, -1), weight.flatten(1), bias).movedim(-1, -3)
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


# What the package's own networks call often, past the search for a rule; methods in place of operators, which
# torch.compile would bring here again.
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.neg: Dual.__neg__,
    torch.Tensor.neg: Dual.__neg__,
    torch.Tensor.add: lambda a, b: a.__add__(b) if isinstance(a, Dual) else b.__radd__(a),
    torch.Tensor.sub: lambda a, b: a.__sub__(b) if isinstance(a, Dual) else b.__rsub__(a),
    torch.Tensor.mul: lambda a, b: a.__mul__(b) if isinstance(a, Dual) else b.__rmul__(a),
}
