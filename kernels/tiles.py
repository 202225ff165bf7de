"""How a batch `(B, D)` is cut into tiles `(R, C)`: several short rows, or a piece of a long one.

A coefficient per sample is loaded once per row of a tile. Rows of a tile begin at multiples of ALIGN elements, at or
before the sample's first, so that accesses move 16 bytes at once where `D` is a multiple of 16, and a Philox block
lies in one tile. Offsets of rows are 64-bit, within a row 32-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

ALIGN = tl.constexpr(8)
# The longest piece of a row, and the tile of kernels that sum: there the order must not depend on a timing.
LONGEST = 4096
SUM_BLOCK, SUM_WARPS = 2048, 4
CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
]


def tuned(*key: str) -> Any:
    """Decorates a kernel whose result does not depend on BLOCK: the fastest of CONFIGS is found once per `key`."""
    return triton.autotune(CONFIGS[-1:] if knobs.runtime.interpret else CONFIGS, key=list(key))


@triton.jit
def tile(rows, cols, span, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows `(R,)`, the first element of each `(R, 1)`, columns `(1, C)`, mask `(R, C)`, and piece."""
    COLS: tl.constexpr = WIDTH if WIDTH < BLOCK else BLOCK
    ROWS: tl.constexpr = BLOCK // COLS
    pieces = tl.cdiv(span, COLS)
    piece = tl.program_id(0) % pieces
    row = tl.program_id(0) // pieces * ROWS + tl.arange(0, ROWS)
    start = row[:, None].to(tl.int64) * cols
    first = start // ALIGN * ALIGN + piece * COLS
    column = tl.arange(0, COLS)[None, :]
    mask = (column >= start - first) & (column < start - first + cols) & (row < rows)[:, None]
    return row, first, column, mask, piece


@triton.jit
def per_row(values, row, rows):
    """A coefficient per row, `(R, 1)`: loaded once per row, not per element."""
    return tl.load(values + row, mask=row < rows)[:, None]


@triton.jit
def row_sums(values, mask):
    """Sums of `(R, C)` over the columns, `(R,)`.

    The selection also keeps the compiler from fusing a product into the additions between threads, where the lanes
    of a warp would round the same sum differently.
    """
    return tl.sum(tl.where(mask, values, 0.0), 1)


class Tiles:
    """The cut of a contiguous `(B, *)` tensor: what `tile` takes, and how many programs that makes."""

    def __init__(self, x: Tensor):
        self.rows = x.shape[0]
        self.cols = x.numel() // max(self.rows, 1)
        self.span = self.cols if self.cols % ALIGN.value == 0 else self.cols + ALIGN.value - 1
        self.width = min(max(triton.next_power_of_2(self.span), ALIGN.value), LONGEST)

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return self.rows, self.cols, self.span, self.width

    def pieces(self, block: int = SUM_BLOCK) -> int:
        return triton.cdiv(self.span, min(self.width, block))

    def grid(self, meta: dict[str, Any]) -> tuple[int]:
        block = meta["BLOCK"]
        return (triton.cdiv(self.rows, block // min(self.width, block)) * self.pieces(block),)


def require_contiguous(op: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and not value.is_contiguous():
            raise RuntimeError(f"{op}: {name} expected contiguous, got strides {value.stride()}")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
