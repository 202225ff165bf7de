"""float32 products in three of bfloat16, where the processor has matrix registers for these (AMX), and who allows them.

A float32 value is taken as the sum of two bfloat16, and of the product of two such sums the smallest of the four terms
is left out: relative errors of 2^-16 per product, some 5e-6 in a sum, at a multiple of the speed of float32 (Henry,
Tang and Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision Computations, 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from . import backend

# Whether float32 convolutions would be split; their kernels for other processors, with AVX-512, take float32 as it is.
HAS_REGISTERS = backend.WHY_NOT_NATIVE is None and import_module("qcsbm_fast._host").active_isa() == "amx"
allowed = False


@contextmanager
def split_float32(allow: bool = True) -> Iterator[None]:
    """Within it, float32 convolutions and `swish_mlp` on such a CPU take products in three.

    Off elsewhere: a library has no business to round behind its user's back. The command line runs within it.
    """
    global allowed
    before, allowed = allowed, allow
    try:
        yield
    finally:
        allowed = before
