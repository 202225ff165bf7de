"""`x_t = mean x_0 + std z` with `z` drawn inside (qcsbm_fast/ops/perturb.py): one read, one write, or two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import normals
from .tiles import Tiles, per_row, require_contiguous, tile, tuned


@tuned("WIDTH")
@triton.jit
def kernel(
    x0,
    mean,
    std,
    state,
    x,
    noise,
    rows,
    cols,
    span,
    WIDTH: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first, column, mask, _ = tile(rows, cols, span, WIDTH, BLOCK)
    m, s = per_row(mean, row, rows), per_row(std, row, rows)
    z = normals(state, first, column.shape[1])
    value = m * tl.load(x0 + first + column, mask=mask).to(m.dtype) + s * z
    tl.store(x + first + column, value.to(x.dtype.element_ty), mask=mask)
    if STORE:
        tl.store(noise + first + column, z.to(noise.dtype.element_ty), mask=mask)


def perturb(x0: Tensor, mean: Tensor, std: Tensor, state: Tensor, store_noise: bool) -> tuple[Tensor, Tensor]:
    require_contiguous("perturb", x0=x0, mean=mean, std=std, state=state)
    x = torch.empty_like(x0)
    noise = torch.empty_like(x0) if store_noise else x0.new_empty(0)
    if x0.numel():
        tiles = Tiles(x0)
        kernel[tiles.grid](x0, mean, std, state, x, noise, *tiles.arguments, store_noise)
    return x, noise
