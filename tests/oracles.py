"""Slow, plain-torch ways to the same quantities, in float64: the tests' oracles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def jacobians(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All per-sample Jacobians `(B, D, D)`, differentiable, by one VJP per output component."""
    x = x.detach().requires_grad_()
    value = fn(x).flatten(1)
    rows = [
        torch.autograd.grad(value[:, i].sum(), x, create_graph=True, retain_graph=True)[0].flatten(1)
        for i in range(value.shape[1])
    ]
    return torch.stack(rows, 1)


def exact_penalty(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`tr(J J^T) - tr(J J)` `(B,)`, differentiable."""
    j = jacobians(fn, x)
    return (j * j).sum((1, 2)) - (j * j.transpose(1, 2)).sum((1, 2))


def probe_penalty(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """`1/2 ||J v - J^T v||^2` `(B,)`, mean over the probes `v` `(K, B, *)`, differentiable."""
    j = jacobians(fn, x)
    flat = v.flatten(2)
    r = torch.einsum("bij,kbj->kbi", j, flat) - torch.einsum("bij,kbi->kbj", j, flat)
    return 0.5 * r.square().sum(2).mean(0)


def nested_penalty(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The paper's estimator of `tr(J J^T) - tr(J J)` by two nested VJPs, `||J^T v||^2 - <J^T (J^T v), v>`, `(B,)`."""
    x = x.detach().requires_grad_()
    value = fn(x)
    terms = []
    for probe in v:
        (once,) = torch.autograd.grad(value, x, probe, create_graph=True)
        (twice,) = torch.autograd.grad(value, x, once, create_graph=True)
        terms.append((once.square() - twice * probe).flatten(1).sum(1))
    return torch.stack(terms).mean(0)


def parameter_gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """The gradient of a scalar with respect to all parameters, as one vector."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )
