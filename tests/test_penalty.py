"""The penalty against the full second-order autograd oracle, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oracles import exact_penalty, jacobians, nested_penalty, parameter_gradient, probe_penalty
from qcsbm_fast import NoiseStream
from qcsbm_fast.divergence import divergence
from qcsbm_fast.dual import linear
from qcsbm_fast.nn import ImageMLP, ToyMLP
from qcsbm_fast.penalty import asymmetry
from qcsbm_fast.score import Score
from qcsbm_fast.sde import VE


class PlainToy(nn.Module):
    """ToyMLP in ordinary torch functions over the same parameters: the oracle needs a double backward."""

    def __init__(self, toy: ToyMLP):
        super().__init__()
        self.toy = toy

    def forward(self, x, sigma):
        toy = self.toy

        def swish(x, p):
            return x * torch.sigmoid(p * x)

        def layers(x, sequence):
            for layer in sequence:
                x = nn.functional.linear(x, layer.weight, layer.bias)
                x = swish(x, layer.p) if hasattr(layer, "p") else x
            return x

        h = torch.cat([layers(x, toy.trunk), layers(sigma[:, None], toy.noise)], 1)
        o = toy.head(swish(h, toy.join))
        kind = getattr(toy.output, "kind", None)
        if kind == "elu":
            o = nn.functional.elu(o)
        elif kind == "leaky_relu":
            o = nn.functional.leaky_relu(o, 0.1)
        return x - o


@pytest.fixture
def toy():
    torch.manual_seed(3)
    net = ToyMLP().double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    sigma = torch.rand(6, dtype=torch.float64) + 0.3
    plain = PlainToy(net)
    x = torch.randn(6, 2, dtype=torch.float64)
    return net, (lambda x: net(x, sigma)), (lambda x: plain(x, sigma)), x


def test_values_equal_the_explicit_jacobian(toy):
    _, fn, plain, x = toy
    v = torch.randn(3, *x.shape, dtype=torch.float64)
    result = asymmetry(fn, x, v=v)
    j = jacobians(plain, x)
    jv = torch.einsum("bij,kbj->kbi", j, v)
    jtv = torch.einsum("bij,kbi->kbj", j, v)
    r = jv - jtv
    torch.testing.assert_close(result.score, plain(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.penalty, 0.5 * r.square().sum(2).mean(0), rtol=1e-11, atol=0)
    norms = (jv.square() + jtv.square()).sum((0, 2))
    torch.testing.assert_close(result.nasym, 0.5 * r.square().sum((0, 2)) / norms, rtol=1e-11, atol=0)


def test_exact_mode_equals_traces_of_the_explicit_jacobian(toy):
    net, fn, plain, x = toy
    result = asymmetry(fn, x, exact=True)
    j = jacobians(plain, x)
    penalty = exact_penalty(plain, x)
    torch.testing.assert_close(result.penalty, penalty, rtol=1e-11, atol=0)
    torch.testing.assert_close(result.nasym, 0.5 * penalty / (j * j).sum((1, 2)), rtol=1e-11, atol=0)
    weight = torch.rand(6, dtype=torch.float64)
    ours = parameter_gradient((weight * result.surrogate).sum(), net)
    theirs = parameter_gradient((weight * penalty).sum(), net)
    assert (ours - theirs).norm() < 1e-11 * theirs.norm()


@pytest.mark.parametrize("probes", [1, 4])
def test_symmetric_gradient_equals_full_second_order(toy, probes):
    net, fn, plain, x = toy
    v = torch.randn(probes, *x.shape, dtype=torch.float64)
    weight = torch.rand(6, dtype=torch.float64)
    result = asymmetry(fn, x, v=v, estimator="symmetric")
    ours = parameter_gradient((weight * result.surrogate).sum(), net)
    theirs = parameter_gradient((weight * probe_penalty(plain, x, v)).sum(), net)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()


def test_symmetric_gradient_of_an_image_network():
    """High-dimensional case, the oracle by the generic path's double VJP on a plain twin of one block."""
    torch.manual_seed(0)
    first, second = nn.Linear(12, 20).double(), nn.Linear(20, 12).double()
    net = nn.Sequential(first, nn.Tanh(), second)
    x = torch.randn(4, 12, dtype=torch.float64)
    v = torch.randn(2, 4, 12, dtype=torch.float64)
    result = asymmetry(net, x, v=v, estimator="symmetric")
    ours = parameter_gradient(result.surrogate.sum(), net)
    theirs = parameter_gradient(probe_penalty(net, x, v).sum(), net)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()


def all_rademacher(x):
    """Every sign pattern as a probe: averaging over them is the exact expectation."""
    dim = x[0].numel()
    bits = torch.arange(2**dim)[:, None] >> torch.arange(dim) & 1
    return (2.0 * bits.to(x.dtype) - 1).reshape(2**dim, 1, *x.shape[1:]).expand(-1, *x.shape)


@pytest.mark.parametrize("estimator", ["one_sided", "symmetric"])
def test_rademacher_expectation_is_exact(estimator):
    """Averaged over all 2^4 sign vectors each estimator is the exact gradient, no statistics needed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    result = asymmetry(net, x, v=all_rademacher(x), estimator=estimator)
    exact = exact_penalty(net, x)
    torch.testing.assert_close(result.penalty, exact.detach(), rtol=1e-11, atol=0)
    ours, theirs = parameter_gradient(result.surrogate.sum(), net), parameter_gradient(exact.sum(), net)
    assert (ours - theirs).norm() < 1e-11 * theirs.norm()


@pytest.mark.parametrize("estimator", ["one_sided", "symmetric", "nested"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_unbiased_with_drawn_probes(estimator, distribution):
    """Value and gradient along a direction over 4000 draws: |mean - exact| < 5 standard errors (error rate 6e-7)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x = torch.randn(1, 5, dtype=torch.float64).expand(4000, -1)
    stream = NoiseStream(11)
    exact = exact_penalty(net, x[:1])
    gradient = parameter_gradient(exact.sum(), net)
    v = (stream.rademacher if distribution == "rademacher" else stream.normal)((1, 4000, 5), dtype=x.dtype)
    if estimator == "nested":
        penalty = nested_penalty(net, x, v)
        surrogate = penalty
    else:
        result = asymmetry(net, x, v=v, estimator=estimator)
        penalty, surrogate = result.penalty, result.surrogate
    deviation = penalty.detach() - exact.detach()
    assert abs(deviation.mean()) < 5 * deviation.std() / 4000**0.5
    # One scalar per draw: the weights' gradient along the exact gradient, by a tangent in the parameters.
    samples = []
    for part in surrogate.reshape(40, 100).sum(1):
        grads = torch.autograd.grad(part, list(net.parameters()), retain_graph=True, allow_unused=True)
        pairs = zip(net.parameters(), grads, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        samples.append(flat @ gradient / gradient.square().sum() / 100)
    samples = torch.stack(samples)
    assert abs(samples.mean() - 1) < 5 * samples.std() / 40**0.5


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_in_bfloat16_the_residual_has_no_component_along_the_probe(distribution):
    """`<v, (J - J^T) v>` is zero; for a linear field `x W^T` the surrogate's gradient is `2 r v^T` (one sample)."""
    generator = torch.Generator().manual_seed(0)
    size = 96
    random = torch.randn(size, size, generator=generator)
    weight = (random + random.mT + 0.05 * (random - random.mT)).requires_grad_()
    x = torch.randn(1, size, generator=generator)

    def field(value):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(value, weight)

    v = torch.randn(1, 1, size, generator=generator)
    if distribution == "rademacher":
        v = v.sign()
    asymmetry(field, x, v=v).surrogate.sum().backward()
    exact = 2 * (weight - weight.mT).detach() @ v[0, 0]
    got = weight.grad @ v[0, 0] / v.square().sum()
    assert (v[0, 0] @ got).abs() < 0.006 * got.norm()  # 0.013 and 0.027 without; the gradient is rounded too
    assert torch.cosine_similarity(got, exact, 0) > 0.99


def test_a_conservative_field_has_exactly_no_asymmetry():
    torch.manual_seed(0)
    net, sde = ToyMLP("elu").double(), VE(0.1, 3.0)
    score = Score(net, sde, "conservative")
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    result = asymmetry(lambda x: score(x, t), x, probes=2)
    assert (result.penalty == 0).all()
    assert (result.nasym == 0).all()


@pytest.mark.parametrize("output", ["elu", "leaky_relu", "identity"])
def test_energy_score_and_its_gradients_equal_double_backward(output):
    torch.manual_seed(0)
    net, sde = ToyMLP(output).double(), VE(0.1, 3.0)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    score, plain = Score(net, sde, "conservative"), PlainToy(net)
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    sigma = sde.marginal(t)[1]

    def oracle(x):
        energy = plain(x, sigma).square().sum(1) / (2 * sigma)
        return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = score(leaf, t), oracle(other)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(x)
    mine, full = parameter_gradient((ours * g).sum(), net), parameter_gradient((theirs * g).sum(), net)
    assert (mine - full).norm() < 1e-11 * full.norm()
    gx = torch.autograd.grad((score(leaf, t) * g).sum(), leaf)[0]
    torch.testing.assert_close(
        gx, torch.autograd.grad((oracle(other) * g).sum(), other)[0], rtol=1e-11, atol=1e-12
    )
    j = jacobians(oracle, x)
    value, div = divergence(lambda x: score(x, t), x, exact=True)
    torch.testing.assert_close(value, theirs.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(div, j.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-11, atol=1e-12)


def test_no_graph_under_no_grad(toy):
    _, fn, _, x = toy
    with torch.no_grad():
        result = asymmetry(fn, x, exact=True)
    assert not result.score.requires_grad
    assert not result.surrogate.requires_grad
    torch.testing.assert_close(result.penalty, asymmetry(fn, x, exact=True).penalty)


def test_probes_are_reproducible_and_follow_torch(toy):
    _, fn, _, x = toy
    torch.manual_seed(5)
    first = asymmetry(fn, x, probes=2, distribution="gaussian").penalty
    second = asymmetry(fn, x, probes=2, distribution="gaussian").penalty
    torch.manual_seed(5)
    torch.testing.assert_close(
        first, asymmetry(fn, x, probes=2, distribution="gaussian").penalty, rtol=0, atol=0
    )
    assert not torch.equal(first, second)


def test_hutchinson_divergence_in_expectation_over_all_signs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    trace = jacobians(net, x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence(net, x, exact=True)[1], trace, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(divergence(net, x, v=all_rademacher(x))[1], trace, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "nested"}, "estimator: expected one of"),
        ({"distribution": "cauchy"}, "distribution: expected one of"),
        ({"probes": 0}, "probes: expected at least 1, got 0"),
        ({"v": torch.ones(3, 2)}, r"v: expected \(K, 3, 2\)"),
        ({"v": torch.ones(1, 3, 2, dtype=torch.float64)}, "v: expected"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        asymmetry(nn.Linear(2, 2), torch.ones(3, 2), **arguments)


def test_bad_batches_and_functions_are_named():
    with pytest.raises(ValueError, match=r"x: expected a non-empty floating-point batch"):
        asymmetry(nn.Linear(2, 2), torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected a map \(3, 2\) -> \(3, 2\), got the value \(3, 5\)"):
        asymmetry(nn.Linear(2, 5), torch.ones(3, 2))


def test_image_network_symmetric_equals_finite_difference_of_the_penalty():
    torch.manual_seed(0)
    net = ImageMLP(9, width=16, depth=1).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    x, sigma = torch.randn(3, 1, 3, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.2
    v = torch.randn(2, *x.shape, dtype=torch.float64)
    result = asymmetry(lambda x: net(x, sigma), x, v=v, estimator="symmetric")
    gradient = parameter_gradient(result.surrogate.sum(), net)
    direction = gradient / gradient.norm()
    weights = nn.utils.parameters_to_vector(net.parameters()).detach()
    values = []
    with torch.no_grad():
        for step in (1e-4, -1e-4):
            nn.utils.vector_to_parameters(weights + step * direction, net.parameters())
            values.append(asymmetry(lambda x: net(x, sigma), x, v=v).penalty.sum())
    difference = (values[0] - values[1]) / 2e-4
    assert abs(difference - gradient @ direction) < 1e-6 * abs(difference)
