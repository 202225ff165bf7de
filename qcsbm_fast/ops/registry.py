"""The op contract: a schema, a reference in plain torch, and derivatives that are ops themselves.

The reference is the implementation wherever no compiled kernel is registered, the shape rule for
`torch.compile`, and the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
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
        self.triton: str | None = None
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qcsbm::{self.name}", reference, lib=LIBRARY)
        self.overload = getattr(torch.ops.qcsbm, self.name).default
        self._backward: Callable[..., Any] = self._refuse
        self._setup_context: Callable[..., None] | None = None
        torch.library.register_autograd(
            f"qcsbm::{self.name}",
            lambda ctx, *grads: self._backward(ctx, *grads),
            setup_context=self._save,
            lib=LIBRARY,
        )
        # what register_autograd makes, in half the time of a call; it serves eager mode only
        methods = {
            "forward": staticmethod(self._forward),
            "backward": staticmethod(lambda ctx, *grads: self._backward(ctx, *grads)),
        }
        self._function = type(f"{self.name}_function", (torch.autograd.Function,), methods)
        OPS[self.name] = self

    def set_backward(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Gives the derivative; without one, asking for it raises instead of dropping a term."""
        self._backward, self._setup_context = backward, setup_context

    def set_triton(self, module: str) -> None:
        """Runs the launcher of the op's name in `qcsbm_fast.kernels.<module>` on CUDA tensors, where triton is
        installed; it is imported at the first call."""
        self.triton = module
        if backend.HAS_TRITON:
            LIBRARY.impl(self.name, self._launch, "CUDA")

    def _launch(self, *args: Any) -> Any:
        launcher = getattr(import_module(f"..kernels.{self.triton}", __package__), self.name)
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launcher(*args)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _forward(self, ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = self.overload(*args)
        self._save(ctx, args, output)
        return output

    def _refuse(self, ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{self.name} has no derivative of this order: detach its inputs, or use the plain-torch reference "
            f"qcsbm_fast.ops.registry.OPS[{self.name!r}].reference"
        )

    def __call__(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{self.name}: forward-mode AD (torch.func.jvp) gives a custom op's result a zero tangent; "
                "push a qcsbm_fast.Dual instead"
            )
        if backend.WANTED == "native":
            backend.require_native(self.name, next(a for a in args if isinstance(a, Tensor)).device.type)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def gradient_wanted(ctx: Any, *tensors: int) -> bool:
    """Whether the backward pass under way uses the gradient of any of these inputs, counted among the tensors.

    `ctx.needs_input_grad` only tells whether it could: `torch.autograd.grad(score, x)` needs no weight's gradient.
    """
    nodes = ctx.next_functions
    return any(_will_run(nodes[tensor][0]) for tensor in tensors)


def _will_run(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for a leaf that torch.autograd.grad was asked for
        return True


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and coefficients beside tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """`(B,)` values shaped to multiply `x` `(B, *)`."""
    return values.reshape(-1, *(1,) * (x.dim() - 1))


def rows(x: Tensor) -> Tensor:
    """`x` `(B, *)` as `(B, D)`."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))
