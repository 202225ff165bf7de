"""`J v` of functions that do not push duals: PyTorch's forward mode, else two nested VJPs.

`u -> J^T u` is linear, so the VJP of that map with any `u` turns `v` into `J v` (Townsend 2017). This is the package's
only double backward, for modules that forward mode cannot push through.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

# Relative difference of <v, J v> and <J^T v, v> beyond rounding, by the number of bits in a mantissa.
_ADJOINT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class _CustomOpGuard(TorchDispatchMode):
    """Stops at the first custom op: forward mode would pass through it with a zero tangent, silently."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims", "profiler"):
            raise NotImplementedError(f"the custom op {func._schema.name} has no tangent rule")
        return func(*args, **(kwargs or {}))


def rewinder(device: torch.device) -> Callable[[], None]:
    """A function that sets torch's generators back to where they stand now: one dropout mask for several calls."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return rewind


def push(fn: Callable[[Any], Any], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Value `(B, *)` and `J v` `(K, B, *)` of `fn` at the leaf `x`, differentiable if grad mode is on.

    Raises:
        RuntimeError: where neither forward mode nor nested VJPs get through `fn`, or its derivatives contradict each
            other, as when a custom backward drops terms.
    """
    rewind = rewinder(x.device)
    with sdpa_kernel(
        SDPBackend.MATH
    ):  # the fused attention kernels have neither forward mode nor a second derivative
        try:
            return _forward_mode(fn, x, v, rewind)
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0][:160]
        rewind()
        value, jv = _nested_vjp(fn, x, v)
    warnings.warn(f"J v comes from two nested VJPs, right but slower: {reason}", stacklevel=3)
    return value, jv


def _forward_mode(
    fn: Callable[[Any], Any], x: Tensor, v: Tensor, rewind: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    values, tangents = [], []
    for tangent in v:
        rewind()
        # what checkpointing runs again in the backward pass is outside this level, and would save other tensors
        no_hooks = disable_saved_tensors_hooks("checkpointing runs again outside forward mode")
        with forward_ad.dual_level(), _CustomOpGuard(), no_hooks:
            out = forward_ad.unpack_dual(fn(forward_ad.make_dual(x, tangent)))
        values.append(out.primal)
        tangents.append(torch.zeros_like(out.primal) if out.tangent is None else out.tangent)
    return values[0], torch.stack(tangents)


def _nested_vjp(fn: Callable[[Any], Any], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        value = fn(leaf)
        u = torch.zeros_like(value, requires_grad=True)
        (transposed,) = torch.autograd.grad(value, leaf, u, create_graph=True)
        jv = torch.stack(
            [
                torch.autograd.grad(transposed, u, tangent, create_graph=differentiable, retain_graph=True)[0]
                for tangent in v
            ]
        )
        (check,) = torch.autograd.grad(value, leaf, v[0], retain_graph=True)
    forward, backward = (v[0] * jv[0]).sum(), (check * v[0]).sum()
    scale = v[0].norm() * (jv[0].norm() + check.norm())
    if (forward - backward).abs() > _ADJOINT_TOLERANCE.get(value.dtype, 5e-2) * scale:
        raise RuntimeError(
            f"fn: <v, J v> = {forward.item():.6g} but <J^T v, v> = {backward.item():.6g}: a custom backward in fn "
            "drops second-order terms; write it with differentiable torch functions"
        )
    return (value, jv) if differentiable else (value.detach(), jv)
