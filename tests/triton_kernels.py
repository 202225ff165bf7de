"""The Triton launchers' results on CPU tensors, for a process of its own with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cases import TABLE, arguments, outputs
from qcsbm_fast.ops.registry import OPS

NAMES = [name for name, op in OPS.items() if op.triton]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES = ((0, 0), (2**63 - 1, 2**63 - 1), (-1, -1), (1, -(2**63)), (2**32, 2**32 - 1))
SCORES = {"zero": 0.0, "nan": torch.nan, "inf": torch.inf}
DRAW = 100_000
# The interpreter is slow: several pieces of a row, and rows that end within a tile, need no more.
SIZES = {"large": (2, 9001)}


def interpreted() -> Iterator[tuple[str, str, str, torch.dtype]]:
    """(op, variant, size, dtype) of the cases, in every dtype where rows are odd or whole."""
    for name in NAMES:
        for variant in TABLE[name].variants:
            for size in TABLE[name].sizes:
                for dtype in DTYPES if size in ("odd", "image") else DTYPES[:1]:
                    yield name, variant, size, dtype


def call_of(name: str, variant: str, size: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return arguments(TABLE[name], variant, SIZES.get(size) or TABLE[name].sizes[size], dtype)


def key(*parts: object) -> str:
    return " ".join(map(str, parts))


def bad_score(value: float) -> Tensor:
    return torch.ones(4, 6).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(value)) * (value != 0)


def save_results(path: str) -> None:
    launch = {name: getattr(import_module(f"qcsbm_fast.kernels.{OPS[name].triton}"), name) for name in NAMES}
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, variant, size, dtype in interpreted():
        results[key(name, variant, size, dtype)] = outputs(launch[name](*call_of(name, variant, size, dtype)))
    for name in NAMES[:3]:
        for state in STATES:
            results[key(name, state)] = outputs(launch[name](torch.tensor(state), [1000], torch.float32))
    for offset in (0, 1):
        state = torch.tensor([31, offset])
        results[key("draw", offset)] = (launch["philox_normal"](state, [DRAW], torch.float32),)
    for score, value in SCORES.items():
        call = (torch.ones(4, 6), bad_score(value), 0.16, torch.ones(4), torch.tensor([3, 1]))
        results[key("langevin", score)] = launch["langevin_step"](*call)
    torch.save(results, path)
