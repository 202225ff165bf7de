"""float32 products in three of bfloat16, where the processor has matrix registers for these (AMX), and who allows them.

A float32 value is taken as the sum of two bfloat16, and of the product of two such sums the smallest of the four terms
is left out: relative errors of 2^-16 per product, some 5e-6 in a sum, at a multiple of the speed of float32 (Henry,
Tang and Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision Computations, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from . import backend
from .registry import LIBRARY

# Whether products of float32 would be split.
HAS_REGISTERS = backend.WHY_NOT_NATIVE is None and import_module("qcsbm_fast._host").active_isa() == "amx"
LIBRARY.define("allow_split(bool allow) -> bool")


@contextmanager
def split_float32(allow: bool = True) -> Iterator[None]:
    """Whatever runs within it, `backward` too, in whatever thread: on such a CPU float32 convolutions, the blocks that
    hold some, and `swish_mlp` take products in three.

    Off elsewhere: a library has no business to round behind its user's back. The command line runs within it.
    """
    if not HAS_REGISTERS:
        yield
        return
    before = torch.ops.qcsbm.allow_split(allow)
    try:
        yield
    finally:
        torch.ops.qcsbm.allow_split(before)
