"""`w ||std s + z||^2` per sample and its gradient (qcsbm_fast/ops/denoising_residual.py), `z` given or drawn again.

One or two reads and one write per element. Squares are summed in float32 (float64 for float64) within a tile and in
float64 over tiles, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import normals
from .tiles import SUM_BLOCK, SUM_WARPS, Tiles, accumulate_dtype, per_row, require_contiguous, row_sums, tile


@triton.jit
def kernel(
    score, std, weight, z, state, parts, gradient, rows, cols, span, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Exactly one of `z` and `state` is None; parts is `(pieces, rows)`."""
    row, first, column, mask, piece = tile(rows, cols, span, WIDTH, BLOCK)
    s, w = per_row(std, row, rows), per_row(weight, row, rows)
    value = tl.load(score + first + column, mask=mask).to(s.dtype)
    if z is None:  # noqa: SIM108 (only the branch taken is compiled)
        noise = normals(state, first, column.shape[1])
    else:
        noise = tl.load(z + first + column, mask=mask).to(s.dtype)
    residual = s * value + noise
    slope = 2.0 * w * s
    tl.store(gradient + first + column, (slope * residual).to(gradient.dtype.element_ty), mask=mask)
    loss = tl.load(weight + row, mask=row < rows) * row_sums(residual * residual, mask)
    tl.store(parts + piece * rows + row, loss, mask=row < rows)


def denoising_residual(
    score: Tensor, std: Tensor, weight: Tensor, z: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    require_contiguous("denoising_residual", score=score, std=std, weight=weight, z=z, state=state)
    gradient, dtype = torch.empty_like(score), accumulate_dtype(score)
    if not score.numel():
        return score.new_zeros(score.shape[0], dtype=dtype), gradient
    tiles = Tiles(score)
    parts = score.new_empty((tiles.pieces(), tiles.rows), dtype=dtype)
    kernel[tiles.grid({"BLOCK": SUM_BLOCK})](
        score,
        std,
        weight,
        z,
        state,
        parts,
        gradient,
        *tiles.arguments,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,  # pyright: ignore[reportCallIssue]
    )
    loss = parts[0] if len(parts) == 1 else parts.sum(0, dtype=torch.float64).to(dtype)
    return loss, gradient
