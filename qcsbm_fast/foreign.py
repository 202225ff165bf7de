"""`J v` of functions that do not push duals: PyTorch's forward mode, else two nested VJPs.

`u -> J^T u` is linear, so the VJP of that map with any `u` turns `v` into `J v` (Townsend 2017). This is the package's
only double backward, for modules that forward mode cannot push through.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
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
    """A function that sets torch's generators back to where they stand now: one dropout mask for several calls.

    A GPU's generator has no state to read while a CUDA graph is captured: it is left alone then, and what draws masks
    twice must not be captured.
    """
    cpu = torch.get_rng_state()
    reads_cuda = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    cuda = torch.cuda.get_rng_state(device) if reads_cuda else None

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)

    return rewind


class _LayerNormInFull(TorchFunctionMode):
    """Layer norm by means and products: the gradient of torch's own through two nested VJPs is wrong (torch 2.14)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _layer_norm(*args, **kwargs) if func is functional.layer_norm else func(*args, **kwargs)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level of PyTorch's forward mode in which custom ops raise, and attention has a derivative."""
    # the fused attention kernels have neither forward mode nor a second derivative
    with forward_ad.dual_level(), _CustomOpGuard(), sdpa_kernel(SDPBackend.MATH):
        yield


def push(fn: Callable[[Any], Any], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Value `(B, *)` and `J v` `(K, B, *)` of `fn` at the leaf `x`, differentiable if grad mode is on.

    Raises:
        RuntimeError: where neither forward mode nor nested VJPs get through `fn`, or its derivatives contradict each
            other, as when a custom backward drops terms.
    """
    rewind = rewinder(x.device)
    try:
        return _forward_mode(fn, x, v, rewind)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:160]
    rewind()
    with sdpa_kernel(SDPBackend.MATH), _LayerNormInFull():
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
        with forward_mode(), no_hooks:
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
