"""The asymmetry penalty `1/2 ||J - J^T||_F^2` of a vector field (Chao et al. 2023), without double backward.

With `A = J - J^T` and probes `E v v^T = I`, `1/2 ||A v||^2` is unbiased for the penalty and never negative. One dual
pass gives `J v`, one plain VJP `J^T v`; with `r = A v` held constant the gradient is that of a surrogate linear in `J`:

* one-sided, `2 <r, J v>`: unbiased, since `d(1/2 ||A||_F^2) = 2 tr(A^T dJ)` for antisymmetric `A`;
* symmetric, `<r, J v> - <v, J r>`: the exact gradient of `1/2 ||A v||^2`, of lower variance, with a second dual pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
from .foreign import rewinder
from .linearize import pull, push
from .random import NoiseStream, as_stream

Estimator = Literal["one_sided", "symmetric"]
Distribution = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class Asymmetry:
    """What `asymmetry` returns: per-sample estimates, and a surrogate to differentiate.

    Attributes:
        penalty: `(B,)`, `1/2 ||J v - J^T v||^2`, mean over probes (the paper's Asym); no graph.
        nasym: `(B,)` in [0, 1], `1/2` of the squared norm of `A v` over that of `J v` and `J^T v`: the paper's NAsym,
            `1/2 (tr J J^T - tr J J) / tr J J^T`, exactly so with `exact=True`; no graph.
        score: `(B, *)`, the value of the function, with its graph.
        surrogate: `(B,)`; `surrogate.sum().backward()` gives an unbiased estimate of the gradient of
            `penalty.sum()` (exact for `exact=True`). Its value is not the penalty's.
    """

    penalty: Tensor
    nasym: Tensor
    score: Tensor
    surrogate: Tensor


def draw_probes(x: Tensor, probes: int, distribution: Distribution, stream: NoiseStream) -> Tensor:
    """`(K, *x.shape)` independent entries of mean 0 and variance 1."""
    if distribution not in get_args(Distribution):
        raise ValueError(f"distribution: expected one of {get_args(Distribution)}, got {distribution!r}")
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")
    draw = stream.rademacher if distribution == "rademacher" else stream.normal
    return draw((probes, *x.shape), dtype=x.dtype)


def unit_tangents(x: Tensor) -> Tensor:
    """All `D` unit directions of a sample, `(D, *x.shape)`, a view that repeats them over the batch."""
    dim = x[0].numel()
    basis = torch.eye(dim, dtype=x.dtype, device=x.device).reshape(dim, 1, *x.shape[1:])
    return basis.expand(-1, *x.shape)


def check_batch(x: Tensor, v: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a non-empty floating-point batch (B, *), got {got}")
    if v is not None and (v.shape[1:] != x.shape or v.shape[0] < 1 or v.dtype != x.dtype):
        raise ValueError(
            f"v: expected (K, {', '.join(map(str, x.shape))}) of {x.dtype}, got {tuple(v.shape)} of {v.dtype}"
        )


def asymmetry(
    fn: Callable[[Any], Any],
    x: Tensor,
    *,
    probes: int = 1,
    estimator: Estimator = "one_sided",
    distribution: Distribution = "rademacher",
    v: Tensor | None = None,
    exact: bool = False,
    generator: NoiseStream | torch.Generator | None = None,
    probe_chunk: int | None = None,
) -> Asymmetry:
    """Asymmetry of the Jacobian of `fn` at each sample of `x`, and a surrogate with its gradient.

    Args:
        fn: `(B, *) -> (B, *)`, each sample by itself: one of our scores, or a closure over any `nn.Module`. Called with
            a `Dual` first; what cannot push it goes through PyTorch's forward mode (see `foreign`).
        x: `(B, *)`, held constant.
        probes: number `K` of probes.
        estimator: "one_sided" (cheaper; the default) or "symmetric" (less variance of the gradient).
        distribution: "rademacher" or "gaussian".
        v: `(K, B, *)`, fixes the probes.
        exact: all unit vectors in place of probes: the exact penalty, for low dimension.
        generator: a `NoiseStream`, or a `torch.Generator` (None: torch's own) from which a seed is drawn.
        probe_chunk: probes that go through `fn` at once; fewer than `K` save memory and cost time, for `backward` runs
            each chunk's pass again. The result is the same up to rounding. None: all.

    Under `torch.no_grad()` nothing keeps a graph.

    Raises:
        ValueError: naming the argument that does not fit.
        NotImplementedError, RuntimeError: where a derivative of `fn` is missing or would be wrong.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator: expected one of {get_args(Estimator)}, got {estimator!r}")
    if probe_chunk is not None and (probe_chunk < 1 or exact):
        expected = "None beside exact, which takes all unit vectors" if exact else "at least 1"
        raise ValueError(f"probe_chunk: expected {expected}, got {probe_chunk}")
    check_batch(x, v)
    if exact:
        v = unit_tangents(x)
    elif v is None:
        v = draw_probes(x, probes, distribution, as_stream(generator, x.device))
    differentiable = torch.is_grad_enabled()
    twice = estimator == "symmetric" and not exact and differentiable
    with torch.enable_grad():
        if probe_chunk is not None and probe_chunk < v.shape[0]:
            found = _in_chunks(fn, x, v, probe_chunk, twice, differentiable)
        else:
            rewind = rewinder(x.device) if twice else None
            at = push(fn, x, v)
            jv = _wide(at.jv)
            jtv = _transpose(jv.detach(), x) if exact else balance(v, jv.detach(), at.vjp(v).to(jv.dtype))
            penalty, nasym, surrogate, seed = ops.asymmetry(jv, jtv)
            if rewind is not None:
                surrogate = _symmetric(surrogate, fn, x, v, seed, rewind)
            found = Asymmetry(penalty, nasym, at.value, surrogate)
    penalty, nasym, score, surrogate = found.penalty, found.nasym, found.score, found.surrogate
    if exact:  # the op takes means over probes; over unit vectors the trace is the sum
        penalty, surrogate = penalty * v.shape[0], surrogate * v.shape[0]
    if not differentiable:
        return Asymmetry(penalty.detach(), nasym.detach(), score.detach(), surrogate.detach())
    return Asymmetry(penalty.detach(), nasym.detach(), score, surrogate)


def _symmetric(
    surrogate: Tensor,
    fn: Callable[[Any], Any],
    x: Tensor,
    v: Tensor,
    seed: Tensor,
    rewind: Callable[[], None],
) -> Tensor:
    """The symmetric surrogate from the one-sided one and its seed, by a second dual pass."""
    residual = (seed.detach() * (v.shape[0] / 2)).to(x.dtype)
    rewind()  # both passes see one dropout mask
    back = push(fn, x, residual).jv.to(surrogate.dtype)
    return (surrogate - (v * back).mean(0).flatten(1).sum(1) * 2) / 2


def _in_chunks(
    fn: Callable[[Any], Any], x: Tensor, v: Tensor, size: int, twice: bool, differentiable: bool
) -> Asymmetry:
    """As above with `size` probes at a time, of which nothing is kept: `backward` runs them again, one by one.

    `J^T v` of all probes comes first, from one graph of the value, which then goes.
    """
    rewind = rewinder(x.device)
    leaf = x.detach().clone().requires_grad_()
    transposed = pull(fn(leaf), leaf, v)

    def estimate(v: Tensor, transposed: Tensor) -> tuple[Tensor, ...]:
        rewind()  # all passes see one dropout mask
        at = push(fn, x, v)
        jv = _wide(at.jv)
        jtv = balance(v, jv.detach(), transposed.to(jv.dtype))
        *_, surrogate, seed = ops.asymmetry(jv, jtv)
        if twice:
            surrogate = _symmetric(surrogate, fn, x, v, seed, rewind)
        return at.value, jv.detach(), jtv, surrogate * v.shape[0]

    run = partial(checkpoint, estimate, use_reentrant=False) if differentiable else torch.no_grad()(estimate)
    chunks = [run(*part) for part in zip(v.split(size), transposed.split(size), strict=True)]
    values, jv, jtv, surrogates = zip(*chunks, strict=True)
    penalty, nasym, *_ = ops.asymmetry(torch.cat(jv), torch.cat(jtv))
    return Asymmetry(penalty, nasym, values[0], torch.stack(surrogates).sum(0) / v.shape[0])


def _wide(jv: Tensor) -> Tensor:
    """The difference from `J^T v` is taken in float32 at least."""
    return jv.float() if jv.dtype in (torch.bfloat16, torch.float16) else jv


def balance(v: Tensor, jv: Tensor, jtv: Tensor) -> Tensor:
    """`J^T v` corrected so that `<v, J v> = <v, J^T v>`, as it is but for rounding.

    In bfloat16 the component of `J v - J^T v` along `v` is all rounding, and what the backward pass amplifies most.
    """
    v, jv, flat = (value.flatten(2) for value in (v.to(jv.dtype), jv, jtv))
    excess = (v * (jv - flat)).sum(2, keepdim=True) / v.square().sum(2, keepdim=True)
    return (flat + excess * v).view_as(jtv)


def _transpose(jv: Tensor, x: Tensor) -> Tensor:
    """`J^T e_k` from all `J e_k`, `(D, B, *)`."""
    dim, batch = jv.shape[:2]
    return jv.reshape(dim, batch, dim).permute(2, 1, 0).reshape(dim, *x.shape)
