"""A CUDA graph's semantics on the CPU: what a function launches is recorded once and replayed with the same tensors.

Every operation below autograd is kept with its arguments and its result. A replay runs them again in order, numbers
from the host as they were, and writes each result into the recorded tensor: exactly what a graph does, so that a number
that should have changed, or state that was put into a new tensor, shows as a difference from the plain function.
Whatever reads a value back to the host, or sizes a tensor by one, is refused, as a capture would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SYNCHRONISES = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip


class HostReads(AssertionError):
    """The function would make the host wait for the device."""


class Tape(TorchDispatchMode):
    """Runs and records. `names` are the operations in order."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    @property
    def names(self) -> list[str]:
        return [func._schema.name for func, *_ in self._calls]

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        """Of every call of the operation `name`."""
        return [args for func, args, *_ in self._calls if func._schema.name == name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in _SYNCHRONISES or (
            name.startswith("aten::index") and any(_is_mask(a) for a in tree_leaves(args[1:]))
        ):
            raise HostReads(name)
        out = func(*args, **kwargs)
        if func.namespace not in ("prim", "profiler"):
            self._calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape
                    old.copy_(new)


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() > 0


def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """In the place of `cuda_graph.record`. Recording a graph runs nothing and a tape does: its first replay is that."""
    tape = Tape()
    with tape:
        function()
    replays = iter([lambda: None])
    return lambda: next(replays, tape.replay)()
