"""One step of a stochastic sampler, `x' = a x + b s + c z`, and its mean `a x + b s`, in one pass.

Euler-Maruyama, reverse diffusion, ancestral sampling and DDIM are this step with different coefficients (Song
et al. 2021, appendix E). Computed in float32 (float64 for float64) with the float32-valued `z` of
`philox_normal`; deterministic; error below 2e-7 of the largest value (in float64 too, from the normals), in
bfloat16 its rounding.
"""

from __future__ import annotations

from torch import Tensor

from .check import batched, like, noise_state, per_sample
from .philox import normal
from .registry import Op, accumulate_dtype, per_row


def _reference(
    x: Tensor, score: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    z = normal(state, x.shape, accumulate_dtype(x.dtype))
    mean = per_row(a, x) * x + per_row(b, x) * score
    return (mean + per_row(c, x) * z).to(x.dtype), mean.to(x.dtype)


_op = Op(
    "sde_step(Tensor x, Tensor score, Tensor a, Tensor b, Tensor c, Tensor state) -> (Tensor, Tensor)",
    _reference,
)
_op.set_triton("sde_step")


def sde_step(
    x: Tensor,
    score: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    c: Tensor | float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`(x', mean)` with `mean = a x + b score` and `x' = mean + c z`, both `(B, *)`; not differentiable.

    Args:
        x: `(B, *)`, any floating dtype.
        score: shape, dtype and device of `x`.
        a, b, c: `(B,)` or one number.
        state: int64 `(2,)`, as `NoiseStream.draw()` returns it.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype or device.
    """
    x = batched("sde_step", "x", x)
    score = like("sde_step", "score", score, x)
    a, b, c = (per_sample("sde_step", name, v, x) for name, v in (("a", a), ("b", b), ("c", c)))
    return _op(x, score, a, b, c, noise_state("sde_step", state, x.device))
