"""Duals carry the derivative: every rule against torch.func.jvp in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcsbm_fast.dual import Dual, cat
from qcsbm_fast.nn import Activation, Autoencoder, ImageMLP, LinearSwish, ToyMLP

W = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)
C = torch.linspace(0.5, 2, 3, dtype=torch.float64)[:, None]

RULES = {
    "add": lambda x: x + x + C,
    "add_scalar": lambda x: 2.0 + x + 1.0,
    "sub": lambda x: (C - x) - (x - 3.0) - (2.0 - x),
    "mul": lambda x: (C * x) * x * 2.0,
    "div": lambda x: x / C,
    "neg": lambda x: -x,
    "linear": lambda x: nn.functional.linear(x, W, torch.ones(5, dtype=torch.float64)),
    "cat": lambda x: torch.cat([x, C, x * x], 1),
    "cat_method": lambda x: cat([x * x, C], -1),
    "reshape": lambda x: x.reshape(3, 2, 2).flatten(1) * x,
    "torch_functions": lambda x: torch.flatten(torch.mul(torch.add(x, C), torch.sub(C, x)), 1),
}


def torch_jvp(fn, x, tangents):
    pairs = [torch.func.jvp(fn, (x,), (t,)) for t in tangents]
    return pairs[0][0], torch.stack([t for _, t in pairs])


@pytest.mark.parametrize("name", RULES)
def test_rule_equals_forward_mode(name):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=gen)
    tangents = torch.randn(2, 3, 4, dtype=torch.float64, generator=gen)
    out = RULES[name](Dual(x, tangents))
    value, jv = torch_jvp(RULES[name], x, tangents)
    torch.testing.assert_close(out.primal, value, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(out.tangents, jv, rtol=1e-14, atol=1e-14)


NETWORKS = {
    "toy": (lambda: ToyMLP(), (2,)),
    "toy_elu": (lambda: ToyMLP("elu"), (2,)),
    "toy_leaky": (lambda: ToyMLP("leaky_relu"), (2,)),
    "image": (lambda: ImageMLP(16, width=24, depth=2), (1, 4, 4)),
    "autoencoder": (lambda: Autoencoder(), (2,)),
    "layers": (lambda: nn.Sequential(LinearSwish(2, 7), Activation(7, "elu"), nn.Linear(7, 2)), (2,)),
}


def network(name):
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    net = make().double()
    for p in net.parameters():  # ordinary weights: a freshly initialised network may be nearly linear
        p.data += 0.3 * torch.randn_like(p)
    sigma = torch.rand(5, dtype=torch.float64) + 0.3
    fn = (lambda x: net(x)) if name in ("autoencoder", "layers") else (lambda x: net(x, sigma))
    return net, fn, torch.randn(5, *shape, dtype=torch.float64)


def jacobian_rows(fn, x):
    """`(B, D, D)` from reverse mode, independent of duals."""
    full = torch.autograd.functional.jacobian(lambda x: fn(x).flatten(1).sum(0), x)
    return full.flatten(2).permute(1, 0, 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_push_their_jacobian(name):
    _, fn, x = network(name)
    v = torch.randn(3, *x.shape, dtype=torch.float64)
    out = fn(Dual(x, v))
    expected = torch.einsum("bij,kbj->kbi", jacobian_rows(fn, x), v.flatten(2))
    torch.testing.assert_close(out.primal, fn(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.tangents.flatten(2), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_tangents_are_differentiable_in_the_parameters(name):
    net, fn, x = network(name)
    v, w = torch.randn(2, 2, *x.shape, dtype=torch.float64)
    params = [p for p in net.parameters() if p.requires_grad]
    out = fn(Dual(x, v))
    loss = (out.tangents * w).sum() + out.primal.square().sum()
    ours = torch.autograd.grad(
        loss, params, allow_unused=True
    )  # against a central difference of fourth order
    direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in params]

    def at(step):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p += step * d
            out = fn(Dual(x, v))
            result = (out.tangents * w).sum() + out.primal.square().sum()
            for p, d in zip(params, direction, strict=True):
                p -= step * d
        return result

    h = 2e-4
    difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    product = sum((g * d).sum() for g, d in zip(ours, direction, strict=True) if g is not None)
    torch.testing.assert_close(product, difference, rtol=1e-7, atol=1e-7)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"tangents expected \(K, 3, 4\), got \(3, 4\)"):
        Dual(torch.ones(3, 4), torch.ones(3, 4))
