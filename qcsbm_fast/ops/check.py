"""Argument checks of the public ops: each error names op, argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .layout import to_channels_last
from .registry import accumulate_dtype

# What the compiled CPU kernels take.
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}".removeprefix("torch.")
    return f"{value!r} ({type(value).__name__})"


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument} expected {expected}, got {describe(got)}")


def any_layout(op: str, argument: str, value: Tensor) -> Tensor:
    """`value`, however it is stored, if it is a floating-point tensor of a dtype that its device computes in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} expected a tensor, got {describe(value)}")
    if not value.is_floating_point():
        fail(op, argument, "a floating-point tensor (convert with .float())", value)
    if value.device.type == "cpu" and value.dtype not in KERNEL_DTYPES:
        fail(op, argument, "float32, float64 or bfloat16 on the CPU (convert with .float())", value)
    return value


def floating(op: str, argument: str, value: Tensor) -> Tensor:
    """`value` as `any_layout` accepts it, contiguous."""
    return any_layout(op, argument, value).contiguous()


def batched(op: str, argument: str, value: Tensor) -> Tensor:
    """`value`, contiguous, if it has a batch dimension."""
    value = floating(op, argument, value)
    if value.dim() < 1:
        fail(op, argument, "a batch (B, *)", value)
    return value


def like(op: str, argument: str, value: Tensor, reference: Tensor, lead: Sequence[int] = ()) -> Tensor:
    """`value`, contiguous, if of shape `(*lead, *reference.shape)`, with `reference`'s dtype and device."""
    value = floating(op, argument, value)
    shape = (*lead, *reference.shape)
    if value.shape != shape or value.dtype != reference.dtype or value.device != reference.device:
        fail(op, argument, describe(reference).replace(str(tuple(reference.shape)), str(shape)), value)
    return value


def image_tangents(op: str, value: Tensor, x: Tensor) -> Tensor:
    """The argument `tangents`, channels-last, if of shape `(K, *x.shape)`, with the dtype and device of `x`."""
    value = any_layout(op, "tangents", value)
    if value.shape[1:] != x.shape or value.dtype != x.dtype or value.device != x.device:
        fail(op, "tangents", f"(K, *) beside x, {describe(x)}", value)
    return to_channels_last(value)


def divisor(op: str, argument: str, value: int, channels: int) -> None:
    """Refuses a number of groups into which the channels do not fall."""
    if value < 1 or channels % value:
        raise ValueError(f"{op}: {argument} expected a divisor of {channels} channels, got {value}")


def per_sample(op: str, argument: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A coefficient per sample, `(B,)` in the accumulation dtype of `x`; one number stands for all."""
    dtype = accumulate_dtype(x.dtype)
    if isinstance(value, (int, float)):
        return torch.full((x.shape[0],), float(value), dtype=dtype, device=x.device)
    if not _is_real(value, x.shape[:1], x.device):
        fail(op, argument, f"one number per sample, ({x.shape[0]},) on {x.device}", value)
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()


def coefficients(op: str, argument: str, value: Tensor, shape: Sequence[int], x: Tensor) -> Tensor:
    """`value`, contiguous, of this shape and on the device of `x`, in the accumulation dtype of `x`."""
    if not _is_real(value, shape, x.device):
        fail(op, argument, f"{tuple(shape)} on {x.device}", value)
    return value.to(accumulate_dtype(x.dtype)).contiguous()


def _is_real(value: object, shape: Sequence[int], device: torch.device) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_complex()
        and value.shape == torch.Size(shape)
        and value.device == device
    )


def noise_state(op: str, state: Tensor, device: torch.device | None = None) -> Tensor:
    """`state` if it is an int64 `(2,)` tensor on `device` (None: any), as `NoiseStream.draw()` returns it."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: state expected a tensor, got {describe(state)}")
    if state.dtype != torch.int64 or state.shape != (2,) or device not in (None, state.device):
        where = "" if device is None else f" on {device}"
        fail(op, "state", f"int64 (2,){where}, as NoiseStream.draw() returns it", state)
    return state.contiguous()
