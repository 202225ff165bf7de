"""A Langevin step (qcsbm_fast/ops/langevin_step.py): the norms' squares, the coefficients, then `sde_step`.

The noise is drawn twice and never stored: three reads and two writes per element. Squares are summed in float32
(float64 for float64) within a tile and in float64 over tiles, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import normals
from .sde_step import sde_step
from .tiles import SUM_BLOCK, SUM_WARPS, Tiles, accumulate_dtype, require_contiguous, row_sums, tile

CHUNK = 512


@triton.jit
def squares(score, state, parts, rows, cols, span, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`||s||^2` and `||z||^2` of each row of this tile, at parts `(2, pieces, rows)`."""
    row, first, column, mask, piece = tile(rows, cols, span, WIDTH, BLOCK)
    s = tl.load(score + first + column, mask=mask).to(parts.dtype.element_ty)
    z = normals(state, first, column.shape[1]).to(s.dtype)
    at = parts + piece * rows + row
    pieces = tl.cdiv(span, column.shape[1])
    tl.store(at, row_sums(s * s, mask), mask=row < rows)
    tl.store(at + pieces * rows, row_sums(z * z, mask), mask=row < rows)


@triton.jit
def coefficients(parts, alpha, out, snr, rows, pieces, CHUNK: tl.constexpr):
    """One program: `1`, `step` and `sqrt(2 step)` of each row, at out `(3, rows)`."""
    lane = tl.arange(0, CHUNK)
    score_norms, noise_norms = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float64)
    for start in range(0, rows, CHUNK):
        row = start + lane
        s, z = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float64)
        for piece in range(pieces):
            at = parts + piece * rows + row
            s += tl.load(at, mask=row < rows, other=0.0)
            z += tl.load(at + pieces * rows, mask=row < rows, other=0.0)
        score_norms += tl.sqrt(s)
        noise_norms += tl.sqrt(z)
    score_norm = tl.sum(score_norms, 0)
    ratio = tl.where(score_norm == 0, 0.0, snr * tl.sum(noise_norms, 0) / score_norm)
    for start in range(0, rows, CHUNK):
        row = start + lane
        step = 2.0 * tl.load(alpha + row, mask=row < rows).to(tl.float64) * ratio * ratio
        dtype = out.dtype.element_ty
        tl.store(out + row, tl.full((CHUNK,), 1.0, dtype), mask=row < rows)
        tl.store(out + rows + row, step.to(dtype), mask=row < rows)
        tl.store(out + 2 * rows + row, tl.sqrt(2.0 * step).to(dtype), mask=row < rows)


def langevin_step(
    x: Tensor, score: Tensor, snr: float, alpha: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    require_contiguous("langevin_step", x=x, score=score, alpha=alpha, state=state)
    if not x.numel():
        return torch.empty_like(x), torch.empty_like(x)
    tiles, dtype = Tiles(x), accumulate_dtype(x)
    parts = x.new_empty((2, tiles.pieces(), tiles.rows), dtype=dtype)
    steps = x.new_empty((3, tiles.rows), dtype=dtype)
    squares[tiles.grid({"BLOCK": SUM_BLOCK})](
        score,
        state,
        parts,
        *tiles.arguments,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,  # pyright: ignore[reportCallIssue]
    )
    coefficients[(1,)](
        parts,
        alpha,
        steps,
        snr,
        tiles.rows,
        tiles.pieces(),
        CHUNK=CHUNK,
        num_warps=SUM_WARPS,  # pyright: ignore[reportCallIssue]
    )
    return sde_step(x, score, steps[0], steps[1], steps[2], state)
