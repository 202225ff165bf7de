"""Argument checks of the public ops: each error names op, argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import accumulate_dtype


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}".removeprefix("torch.")
    return f"{value!r} ({type(value).__name__})"


def fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {argument} expected {expected}, got {describe(got)}")


def floating(op: str, argument: str, value: Tensor) -> Tensor:
    """`value`, contiguous, if it is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} expected a tensor, got {describe(value)}")
    if not value.is_floating_point():
        fail(op, argument, "a floating-point tensor (convert with .float())", value)
    return value.contiguous()


def batched(op: str, argument: str, value: Tensor) -> Tensor:
    """`value`, contiguous, if it has a batch dimension."""
    value = floating(op, argument, value)
    if value.dim() < 1:
        fail(op, argument, "a batch (B, *)", value)
    return value


def like(op: str, argument: str, value: Tensor, reference: Tensor, lead: Sequence[int] = ()) -> Tensor:
    """`value`, contiguous, if it has the shape `(*lead, *reference.shape)`, dtype and device of `reference`."""
    value = floating(op, argument, value)
    shape = (*lead, *reference.shape)
    if value.shape != shape or value.dtype != reference.dtype or value.device != reference.device:
        fail(op, argument, describe(reference).replace(str(tuple(reference.shape)), str(shape)), value)
    return value


def per_sample(op: str, argument: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A coefficient per sample, `(B,)` in the accumulation dtype of `x`; one number stands for all samples."""
    dtype = accumulate_dtype(x.dtype)
    if isinstance(value, (int, float)):
        return torch.full((x.shape[0],), float(value), dtype=dtype, device=x.device)
    if not isinstance(value, Tensor) or value.shape != x.shape[:1] or value.device != x.device:
        fail(op, argument, f"one number per sample, ({x.shape[0]},) on {x.device}", value)
    return value.to(dtype).contiguous()


def noise_state(op: str, state: Tensor, device: torch.device) -> Tensor:
    """`state` if it is an int64 `(2,)` tensor on `device`, as `NoiseStream.draw()` returns it."""
    if (
        not isinstance(state, Tensor)
        or state.dtype != torch.int64
        or state.shape != (2,)
        or state.device != device
    ):
        fail(op, "state", f"int64 (2,) on {device}, as NoiseStream.draw() returns it", state)
    return state
