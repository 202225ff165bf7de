"""The op contract: a schema, a reference in plain torch, and derivatives that are ops themselves.

The reference is the implementation wherever no compiled kernel is registered, the shape rule for
`torch.compile`, and the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend

LIBRARY = torch.library.Library("qcsbm", "DEF")
OPS: dict[str, Op] = {}


class Op:
    """One registered op `qcsbm::<name>`, called like a function.

    Raises:
        NotImplementedError: inside forward-mode AD, where a custom op's tangent would silently be zero; or
            where `QCSBM_BACKEND=native` and the tensors' device has no compiled kernel.
    """

    def __init__(self, schema: str, reference: Callable[..., Any]):
        self.name = schema.partition("(")[0]
        self.reference = reference
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qcsbm::{self.name}", reference, lib=LIBRARY)
        self.overload = getattr(torch.ops.qcsbm, self.name).default
        self.set_backward(None)
        OPS[self.name] = self

    def set_backward(
        self, backward: Callable[..., Any] | None, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Registers the derivative; None means that asking for one raises instead of dropping a term."""
        torch.library.register_autograd(
            f"qcsbm::{self.name}", backward or self._refuse, setup_context=setup_context, lib=LIBRARY
        )

    def _refuse(self, ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{self.name} has no derivative of this order: detach its inputs, or use the plain-torch "
            f"reference qcsbm_fast.ops.registry.OPS[{self.name!r}].reference"
        )

    def __call__(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{self.name}: forward-mode AD (torch.func.jvp) gives a custom op's result a zero tangent; "
                "push a qcsbm_fast.Dual instead"
            )
        if backend.WANTED == "native":
            backend.require_native(self.name, next(a for a in args if isinstance(a, Tensor)).device.type)
        return self.overload(*args)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and coefficients beside tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """`(B,)` values shaped to multiply `x` `(B, *)`."""
    return values.reshape(-1, *(1,) * (x.dim() - 1))


def rows(x: Tensor) -> Tensor:
    """`x` `(B, *)` as `(B, D)`."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
