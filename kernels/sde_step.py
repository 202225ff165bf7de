"""`mean = a x + b s`, `x' = mean + c z` (qcsbm_fast/ops/sde_step.py): two reads and two writes per element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import normals
from .tiles import Tiles, per_row, require_contiguous, tile, tuned


@tuned("WIDTH")
@triton.jit
def kernel(x, score, a, b, c, state, after, mean, rows, cols, span, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, first, column, mask, _ = tile(rows, cols, span, WIDTH, BLOCK)
    a_ = per_row(a, row, rows)
    b_, c_ = per_row(b, row, rows), per_row(c, row, rows)
    x_ = tl.load(x + first + column, mask=mask).to(a_.dtype)
    score_ = tl.load(score + first + column, mask=mask).to(a_.dtype)
    m = a_ * x_ + b_ * score_
    value = m + c_ * normals(state, first, column.shape[1])
    tl.store(mean + first + column, m.to(mean.dtype.element_ty), mask=mask)
    tl.store(after + first + column, value.to(after.dtype.element_ty), mask=mask)


def sde_step(
    x: Tensor, score: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    require_contiguous("sde_step", x=x, score=score, a=a, b=b, c=c, state=state)
    after, mean = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        tiles = Tiles(x)
        kernel[tiles.grid](x, score, a, b, c, state, after, mean, *tiles.arguments)
    return after, mean
