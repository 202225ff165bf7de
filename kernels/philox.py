"""Counter-based noise (csrc/math/philox.h): element `i` of a draw is a function of `(seed, offset, i)`.

The state is read from device memory, so that a replayed CUDA graph draws fresh noise. The polynomials are those of
csrc/math/elementary.h: normals agree with the CPU kernels to a few ulp, uniforms and signs exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import require_contiguous, tuned

# 1.5 * 2^23: adding it rounds a float of magnitude below 2^22 to an integer in the low mantissa bits.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def words(state, block):
    """The four 32-bit words of Philox4x32-10 with key `seed` and counter `(block, offset)`."""
    seed, offset = tl.load(state), tl.load(state + 1)
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    return tl.philox(seed, c0, c1, c0 * 0 + c2, c1 * 0 + c3)


@triton.jit
def logarithm(x):
    """ln x of normal positive floats."""
    ix = x.to(tl.int32, bitcast=True)
    e = (ix - 0x3F3504F3) >> 23
    f = (ix - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    n = e.to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    f2 = f * f
    y = f * f2 * p - n * 2.12194440e-4 - 0.5 * f2
    return (f + y) + n * 0.693359375


@triton.jit
def sincospi(t):
    """sin(pi t) and cos(pi t) for |t| <= 1."""
    shifted = 2.0 * t + ROUND
    quadrant = shifted.to(tl.int32, bitcast=True) - ROUND_BITS
    x = (t - 0.5 * (shifted - ROUND)) * 3.14159265358979
    x2 = x * x
    s = -1.9515295891e-4 * x2 + 8.3321608736e-3
    s = s * x2 - 1.6666654611e-1
    s = s * x2 * x + x
    c = 2.443315711809948e-5 * x2 - 1.388731625493765e-3
    c = c * x2 + 4.166664568298827e-2
    c = c * x2 * x2 - 0.5 * x2 + 1.0
    swap = (quadrant & 1) != 0
    sine, cosine = tl.where(swap, c, s), tl.where(swap, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def box_muller(a, b):
    """Two standard normals from two words (Box & Muller 1958)."""
    u = ((a >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    radius = tl.sqrt(-2.0 * logarithm(u))
    sine, cosine = sincospi((b.to(tl.int32, bitcast=True) >> 7).to(tl.float32) * 5.9604644775390625e-8)
    return radius * cosine, radius * sine


@triton.jit
def interleave(w0, w1, w2, w3):
    """`(R, N)` each as `(R, 4 N)`: w0[0], w1[0], w2[0], w3[0], w0[1], ..."""
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(joined, (w0.shape[0], 4 * w0.shape[1]))


@triton.jit
def normals(state, first, COLS: tl.constexpr):
    """Normals first, first + 1, ..., `(R, COLS)` in float32; `first` `(R, 1)`, multiples of 4."""
    w0, w1, w2, w3 = words(state, first // 4 + tl.arange(0, COLS // 4)[None, :])
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return interleave(z0, z1, z2, z3)


@tuned()
@triton.jit
def fill_normal(out, state, n, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    z = normals(state, tl.full((1, 1), 0, tl.int64) + first, BLOCK)
    tl.store(out + first + column, z.to(out.dtype.element_ty), mask=column < n - first)


@tuned()
@triton.jit
def fill_uniform(out, state, n, scale, BITS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    w0, w1, w2, w3 = words(state, first // 4 + tl.arange(0, BLOCK // 4)[None, :])
    w = interleave(w0, w1, w2, w3) >> (32 - BITS)
    u = w.to(tl.int32).to(tl.float32) * scale
    tl.store(out + first + column, u.to(out.dtype.element_ty), mask=column < n - first)


@tuned()
@triton.jit
def fill_sign(out, state, n, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, 32)[None, :]
    w0, w1, w2, w3 = words(state, first // 128 + tl.arange(0, BLOCK // 128)[None, :])
    word = tl.reshape(interleave(w0, w1, w2, w3), (BLOCK // 32, 1))
    at = tl.arange(0, BLOCK // 32)[:, None] * 32 + column
    # A set bit is a sign of -1: 1.0 with the bit moved to its sign.
    sign = (0x3F800000 | ((word >> column) << 31)).to(tl.float32, bitcast=True)
    tl.store(out + first + at, sign.to(out.dtype.element_ty), mask=at < n - first)


def _out(op: str, state: Tensor, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, int]:
    require_contiguous(op, state=state)
    out = torch.empty(tuple(size), dtype=dtype, device=state.device)
    return out, out.numel()


def philox_normal(state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    out, n = _out("philox_normal", state, size, dtype)
    if n:
        fill_normal[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](out, state, n)
    return out


def philox_uniform(state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    out, n = _out("philox_uniform", state, size, dtype)
    # As many bits as `dtype` (at most float32) resolves: rounding could give 1.
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24)
    if n:
        fill_uniform[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](out, state, n, 2.0**-bits, bits)
    return out


def rademacher(state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    out, n = _out("rademacher", state, size, dtype)
    if n:
        fill_sign[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](out, state, n)
    return out
