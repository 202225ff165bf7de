"""Per-sample asymmetry of a Jacobian from `J v` and `J^T v`, with the seed of its gradient, in one pass.

With `r_k = J v_k - J^T v_k` over `K` probes: penalty `1/(2K) sum ||r_k||^2` (unbiased for `1/2 ||J - J^T||_F^2` when
`E v v^T = I`; Chao et al. 2023, Asym), normalised asymmetry `1/2 sum ||r_k||^2 / sum (||J v_k||^2 + ||J^T v_k||^2)` in
[0, 1] (NAsym), surrogate `2/K sum <r_k, J v_k>` and seed `2/K r_k`, the surrogate's derivative with respect to `J v_k`
when `r_k` is held constant: the one-sided gradient, unbiased since `d(1/2 ||A||^2) = 2 tr(A^T dJ)` for `A = J - J^T`.

The difference is taken and summed in float32 (float64 for float64), probes and samples in float64; deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .check import fail, floating, like
from .registry import Op, accumulate_dtype


def _reference(jv: Tensor, vjp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, probes = accumulate_dtype(jv.dtype), jv.shape[0]
    a, b = jv.to(dtype), vjp.to(dtype)
    r = a - b

    def total(x: Tensor) -> Tensor:
        return x.flatten(2).sum((0, 2)) if x.dim() > 2 else x.sum(0)

    difference, norms = total(r * r), total(a * a + b * b)
    nasym = torch.where(norms == 0, 0.0, 0.5 * difference / norms)
    return 0.5 * difference / probes, nasym, 2 * total(r * a) / probes, (2 / probes * r).to(jv.dtype)


_op = Op("asymmetry(Tensor jv, Tensor vjp) -> (Tensor, Tensor, Tensor, Tensor)", _reference)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, penalty: Tensor | None, nasym: Tensor | None, surrogate: Tensor | None, seed: Any
) -> Any:
    if penalty is not None or nasym is not None or seed is not None:
        raise NotImplementedError(
            "asymmetry: only the surrogate has a gradient; call surrogate.sum().backward()"
        )
    if surrogate is None:
        return None, None
    (saved,) = ctx.saved_tensors
    scale = surrogate.to(saved.dtype).reshape(1, -1, *(1,) * (saved.dim() - 2))
    return saved * scale, None


_op.set_backward(_backward, _save)


def asymmetry(jv: Tensor, vjp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Penalty, NAsym, surrogate, each `(B,)`, and the seed `(K, B, *)`; the gradient flows from the surrogate to `jv`.

    Args:
        jv: `J v_k`, `(K, B, *)` with `K >= 1`.
        vjp: `J^T v_k`, same shape, dtype and device; held constant.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device.
    """
    jv = floating("asymmetry", "jv", jv)
    if jv.dim() < 2 or jv.shape[0] < 1:
        fail("asymmetry", "jv", "(K, B, *) with K >= 1", jv)
    return _op(jv, like("asymmetry", "vjp", vjp, jv))
