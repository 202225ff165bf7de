"""CUDA kernels' PTX, made by nvcc and executed on the CPU by ptxsim with bounds, poison and race checks."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_static

CSRC = Path(__file__).parents[1] / "csrc"
# How a type appears in a kernel's mangled name, as the first template argument.
MANGLED = {
    torch.float32: "f",
    torch.float64: "d",
    torch.bfloat16: "NS_8bfloat16E",
    torch.float16: "NS_7float16E",
}
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def has_nvcc() -> bool:
    return gpu_static.find_nvcc() is not None


@functools.cache
def ptx_of(source: str) -> str:
    return gpu_static.cuda_ptx(CSRC / "cuda" / source, 90)


@functools.cache
def module_of(source: str) -> Any:
    import ptxsim

    return ptxsim.Module(ptx_of(source))


def kernel_name(source: str, kernel: str, *template: str) -> str:
    """The mangled name of `kernel<template...>`, each argument as it is mangled."""
    names = re.findall(rf"\.entry (\w*?\d+{kernel}I\w*)", ptx_of(source))
    return next(n for n in names if n.partition(f"{kernel}I")[2].startswith("".join(template) + "E"))


def launch(
    source: str,
    kernel: str,
    template: tuple[str, ...],
    grid: int,
    block: int,
    args: list[Any],
    shared: int = 0,
) -> None:
    """Runs one kernel; races and reads of unwritten shared memory fail."""
    run = module_of(source).launch(
        kernel_name(source, kernel, *template), grid=grid, block=block, args=args, shared_bytes=shared
    )
    assert not run.races
    assert not run.warnings
    assert not run.uninitialised


def body_of(source: str, kernel: str, *template: str) -> str:
    ptx = ptx_of(source)
    body = ptx[ptx.index(f".entry {kernel_name(source, kernel, *template)}(") :]
    return body[: body.index("\n}")]


def poisoned(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.full(size, torch.nan, dtype=dtype)


def accesses_of(source: str, kernel: str, *template: str) -> list[int]:
    """Bytes of each global access of a kernel, in the order of its PTX."""
    return gpu_static.global_accesses(body_of(source, kernel, *template))
