"""Scores from networks: unconstrained, conservative (the gradient of an energy), quasi-conservative."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dual import Dual, V
from .foreign import rewinder
from .linearize import push
from .ops.registry import gradient_wanted
from .sde import SDE

Kind = Literal["unconstrained", "conservative", "quasi-conservative"]


def _column(values: Tensor, x: Any) -> Tensor:
    """`(B,)` values to broadcast over the samples of `x`."""
    return values.reshape(-1, *(1,) * (len(x.shape) - 1)).to(x.dtype)


class _EnergyScore(torch.autograd.Function):
    """`s = -grad ||f||^2 / (2 sigma) = -J_f^T f / sigma`, first-order differentiable without double backward.

    `J_s` is symmetric, so for a cotangent `g` both `J_s^T g` and the parameters' gradient of `<g, s>` are gradients
    of the scalar `-<J_f g, f> / sigma`: one dual pass and one ordinary backward.
    """

    @staticmethod
    def forward(ctx: Any, score: Score, x: Tensor, sigma: Tensor, *parameters: Tensor) -> Tensor:
        ctx.score, ctx.rewind = score, rewinder(x.device)
        ctx.save_for_backward(x, sigma)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            field = score.field(leaf, sigma)
            (product,) = torch.autograd.grad(field, leaf, field.detach())
        return -product / _column(sigma, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, sigma = ctx.saved_tensors
        parameters = [p for p in ctx.score.parameters() if p.requires_grad]
        wanted = [gradient_wanted(ctx, 2 + index) for index in range(len(parameters))]  # none for a J v alone
        ctx.rewind()
        with torch.enable_grad():
            field = push(lambda y: ctx.score.field(y, sigma), x, g.contiguous()[None])
            slope = -(field.jv[0] * field.value / _column(sigma, x)).sum()
            inputs = [p for p, needed in zip(parameters, wanted, strict=True) if needed]
            gx, *rest = torch.autograd.grad(slope, (field.x, *inputs), allow_unused=True)
        gradients = iter(rest)
        return None, gx, None, *(next(gradients) if needed else None for needed in wanted)


class Score(nn.Module):
    """The score `s(x, t)` `(B, *), (B,) -> (B, *)` of a network `f(x, sigma)` under a forward process.

    With `sigma` the standard deviation of the noise at time `t`: `s = f / sigma` for "unconstrained" and
    "quasi-conservative" (the two differ in their training only), `s = -grad ||f||^2 / (2 sigma)` for "conservative".
    Takes a `Dual` in place of `x`. First-order differentiable in `x` and in the parameters.

    Args:
        network: `f(x, sigma)`, `(B, *), (B,) -> (B, *)`; one that takes no duals goes the slower way of `foreign`.
        sde: the forward process.
        kind: one of the three above.
        autocast: dtype of the network's activations and tangents, such as `torch.bfloat16`, by `torch.autocast`; None
            for those of `x` and the weights. The score is in the dtype of `x` either way. May be set later.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(
        self,
        network: nn.Module,
        sde: SDE,
        kind: Kind = "unconstrained",
        *,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {get_args(Kind)}, got {kind!r}")
        self.network = network
        self.sde = sde
        self.kind: Kind = kind
        self.autocast = autocast

    def forward(self, x: V, t: Tensor) -> V:
        sigma = self.sde.marginal(t)[1]
        if self.kind != "conservative":
            return self.field(x, sigma) / _column(sigma, x)
        if isinstance(x, Dual):
            return self._push_energy(x, sigma)
        return self._energy_score(x, sigma)

    def field(self, x: V, sigma: Tensor) -> V:
        """The network's output `f(x, sigma)`, `(B, *)`; under `autocast` brought back to the dtype of `x`."""
        if self.autocast is None:
            return self.network(x, sigma)
        with torch.autocast(x.device.type, self.autocast):
            field = self.network(x, sigma)
        return field.map(lambda value: value.to(x.dtype)) if isinstance(x, Dual) else field.to(x.dtype)

    def _energy_score(self, x: Tensor, sigma: Tensor) -> Tensor:
        return _EnergyScore.apply(  # pyright: ignore[reportReturnType]
            self, x, sigma, *(p for p in self.parameters() if p.requires_grad)
        )

    def _push_energy(self, x: Dual, sigma: Tensor) -> Dual:
        """The Jacobian is symmetric, so `J v` is the VJP of `v`; its tangents carry no graph."""
        with torch.enable_grad():
            leaf = x.primal if x.primal.requires_grad else x.primal.detach().requires_grad_()
            score = self._energy_score(leaf, sigma)
            tangents = [torch.autograd.grad(score, leaf, v, retain_graph=True)[0] for v in x.tangents]
        return Dual(score if torch.is_grad_enabled() else score.detach(), torch.stack(tangents))
