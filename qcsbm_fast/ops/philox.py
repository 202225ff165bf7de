"""Counter-based random tensors: element `i` of a draw is a function of `(seed, offset, i)`, on any device.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) with key `seed` and counter `(block, offset)`. Normals and
uniforms take word `i % 4` of block `i // 4`, signs take bit `i % 128` of block `i // 128`. Two words make
two normals (Box & Muller 1958): radius `sqrt(-2 ln u)` from 31 bits, angle `pi t` from 25 bits. Draws are
float32-valued: float64 holds them exactly, smaller dtypes round normals and take fewer bits for uniforms.

Deterministic; compiled normals agree with the reference to 4e-7 of their size (tests/test_noise.py), the
rest exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .check import KERNEL_DTYPES, fail, noise_state
from .registry import Op

_MASK = 0xFFFFFFFF


def words(state: Tensor, blocks: int) -> Tensor:
    """The four 32-bit words of blocks 0, 1, ..., as int64 `(blocks, 4)`."""

    def split(value: Tensor) -> tuple[Tensor, Tensor]:
        return value & _MASK, (value >> 32) & _MASK

    k0, k1 = split(state[0])
    c0, c1 = split(torch.arange(blocks, device=state.device))
    c2, c3 = (half.expand_as(c0) for half in split(state[1]))
    for _ in range(10):
        # The products need 64 unsigned bits; int64 wraps around to the same bits.
        (low0, high0), (low1, high1) = split(c0 * 0xD2511F53), split(c2 * 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def _draw(values: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return values.flatten()[: math.prod(size)].reshape(tuple(size)).to(dtype)


def normal(state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Reference of `philox_normal`, also for the references of ops that add noise."""
    pairs = words(state, (math.prod(size) + 3) // 4).unflatten(-1, (2, 2))
    a, b = pairs.unbind(-1)
    u = ((a >> 1).float() + 0.5) * 2.0**-31  # rounded to float32 here, by definition
    radius = (-2 * u.double().log()).sqrt()
    t = ((b << 32) >> 39).double() * 2.0**-24  # the upper 25 bits of a signed word: in [-1, 1)
    angle = math.pi * t
    return _draw(torch.stack((radius * angle.cos(), radius * angle.sin()), -1).float(), size, dtype)


def _uniform(state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    # As many bits as `dtype` (at most float32) resolves: rounding could give 1.
    bits = min(24, 1 - int(math.log2(torch.finfo(dtype).eps)))
    w = words(state, (math.prod(size) + 3) // 4)
    return _draw((w >> (32 - bits)).double() * 2.0**-bits, size, dtype)


def _rademacher(state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    w = words(state, (math.prod(size) + 127) // 128)
    bits = (w.unsqueeze(-1) >> torch.arange(32, device=state.device)) & 1
    return _draw(1 - 2 * bits, size, dtype)


_SIGNATURE = "(Tensor state, SymInt[] size, ScalarType dtype) -> Tensor"
_normal_op = Op(f"philox_normal{_SIGNATURE}", normal)
_uniform_op = Op(f"philox_uniform{_SIGNATURE}", _uniform)
_rademacher_op = Op(f"rademacher{_SIGNATURE}", _rademacher)
for _op in (_normal_op, _uniform_op, _rademacher_op):
    _op.set_triton("philox")


def _call(op: Op, state: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    state = noise_state(op.name, state)
    if any(n < 0 for n in size):
        fail(op.name, "size", "non-negative lengths", tuple(size))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{op.name}: dtype expected a floating-point type, got {dtype}")
    if state.device.type == "cpu" and dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op.name}: dtype expected float32, float64 or bfloat16 on the CPU, got {dtype}")
    return op(state, list(size), dtype)


def philox_normal(state: Tensor, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals of shape `size` on the device of `state`; `|z| <= 6.7`.

    Args:
        state: int64 `(2,)`, seed and offset, as `NoiseStream.draw()` returns it.
        size: lengths; elements count in row-major order, so a shorter draw is a prefix of a longer one.
        dtype: a floating-point type.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong state, size or dtype.
    """
    return _call(_normal_op, state, size, dtype)


def philox_uniform(state: Tensor, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniforms in [0, 1), in steps of 2^-24 (bfloat16: 2^-8). Arguments as `philox_normal`."""
    return _call(_uniform_op, state, size, dtype)


def rademacher(state: Tensor, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs, -1 or 1 with equal probability. Arguments as `philox_normal`."""
    return _call(_rademacher_op, state, size, dtype)
