"""Noise injection `x_t = m x_0 + std z`, with `z` drawn inside (Vincent 2011; Song et al. 2021, eq. 7).

Computed in float32 (float64 for float64) with the float32-valued `z` of `philox_normal`; deterministic; error
below 2e-7 of the largest value (in float64 too, from the normals), in bfloat16 its rounding.
"""

from __future__ import annotations

from torch import Tensor

from .check import batched, noise_state, per_sample
from .philox import normal
from .registry import Op, accumulate_dtype, per_row


def _reference(
    x0: Tensor, mean: Tensor, std: Tensor, state: Tensor, store_noise: bool
) -> tuple[Tensor, Tensor]:
    z = normal(state, x0.shape, accumulate_dtype(x0.dtype))
    x = per_row(mean, x0) * x0 + per_row(std, x0) * z
    return x.to(x0.dtype), z.to(x0.dtype) if store_noise else x0.new_empty(0)


_op = Op(
    "perturb(Tensor x0, Tensor mean, Tensor std, Tensor state, bool store_noise) -> (Tensor, Tensor)",
    _reference,
)
_op.set_triton("perturb")


def perturb(
    x0: Tensor, mean: Tensor | float, std: Tensor | float, state: Tensor, *, store_noise: bool = True
) -> tuple[Tensor, Tensor]:
    """`(x_t, z)` with `x_t = mean x0 + std z`, both `(B, *)`; not differentiable.

    Args:
        x0: `(B, *)`, any floating dtype.
        mean, std: `(B,)` or one number.
        state: int64 `(2,)`, as `NoiseStream.draw()` returns it.
        store_noise: False leaves `z` empty: `denoising_residual` draws it again from `state`.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype or device.
    """
    x0 = batched("perturb", "x0", x0)
    mean, std = (per_sample("perturb", name, v, x0) for name, v in (("mean", mean), ("std", std)))
    return _op(x0, mean, std, noise_state("perturb", state, x0.device), store_noise)
