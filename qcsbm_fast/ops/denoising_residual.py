"""The denoising loss `w ||std s + z||^2` per sample and its gradient `2 w std (std s + z)`, in one pass.

Denoising score matching (Vincent 2011; Song et al. 2021, eq. 7) at `x_t = m x_0 + std z`, with `z` given or
drawn again from the state that `perturb` took. The residual is taken in float32 (float64 for float64) and
its square summed in float64 over fixed pieces (on a GPU in float32 within a piece): deterministic, whatever the
number of threads; error below 2e-7 of the largest value (in float64 1e-7 where `z` is drawn), in bfloat16 its rounding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .check import batched, like, noise_state, per_sample
from .philox import normal
from .registry import Op, accumulate_dtype, per_row, rows


def _reference(
    score: Tensor, std: Tensor, weight: Tensor, z: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(score.dtype)
    if z is None:
        assert state is not None
        z = normal(state, score.shape, dtype)
    residual = per_row(std, score) * score + z
    gradient = per_row(2 * weight * std, score) * residual
    return weight * rows(residual).square().sum(1), gradient.to(score.dtype)


_op = Op(
    "denoising_residual(Tensor score, Tensor std, Tensor weight, Tensor? z, Tensor? state) "
    "-> (Tensor, Tensor)",
    _reference,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, loss: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is not None:  # a second derivative: the saved gradient is an output of this node
        raise NotImplementedError(
            "denoising_residual has no second derivative; use its reference in plain torch"
        )
    if any(ctx.needs_input_grad[1:]):
        raise NotImplementedError(
            "denoising_residual is differentiable in score only: detach std, weight and z"
        )
    if loss is None:
        return (None,) * 5
    (saved,) = ctx.saved_tensors
    return (per_row(loss, saved) * saved).to(saved.dtype), None, None, None, None


_op.set_backward(_backward, _save)
_op.set_triton("denoising_residual")


def denoising_residual(
    score: Tensor,
    std: Tensor | float,
    weight: Tensor | float,
    *,
    z: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """`weight ||std score + z||^2` per sample, `(B,)` in float32 (float64 for float64); differentiable in
    `score`, once.

    Args:
        score: `(B, *)`, any floating dtype.
        std, weight: `(B,)` or one number.
        z: shape, dtype and device of `score`; or
        state: int64 `(2,)`, what `perturb` was called with: exactly one of the two.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype or device.
        NotImplementedError: from a second backward, or a backward to `std`, `weight` or `z`.
    """
    score = batched("denoising_residual", "score", score)
    std, weight = (
        per_sample("denoising_residual", name, v, score) for name, v in (("std", std), ("weight", weight))
    )
    if (z is None) == (state is None):
        raise ValueError(
            "denoising_residual: expected exactly one of z and state, got "
            + ("none" if z is None else "both")
        )
    if z is not None:
        z = like("denoising_residual", "z", z, score)
    if state is not None:
        state = noise_state("denoising_residual", state, score.device)
    return _op(score, std, weight, z, state)[0]
