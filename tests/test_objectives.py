"""The objective: its gradient against double backward, and the sub-batch's against the full batch's."""

from __future__ import annotations

import pytest
import torch

from oracles import exact_penalty, parameter_gradient
from qcsbm_fast import NoiseStream, ops
from qcsbm_fast.nn import ToyMLP
from qcsbm_fast.objectives import DenoisingObjective, inclusion_probabilities, systematic_order
from qcsbm_fast.score import Score
from qcsbm_fast.sde import VE
from test_penalty import PlainToy


def make(**arguments):
    torch.manual_seed(0)
    net = ToyMLP().double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    score = Score(net, VE(0.1, 3.0), "quasi-conservative")
    return net, DenoisingObjective(score, stream=NoiseStream(1), **arguments)


def test_loss_and_gradient_equal_the_formula():
    """Same noise, exact penalty: loss and gradient of sigma^2-weighted sums written out with double backward."""
    net, objective = make(balancing_factor=0.1, exact=True, half=False, t_min=0.0)
    x0 = torch.randn(7, 2, dtype=torch.float64)
    result = objective(x0)
    stream = NoiseStream(1)
    sigma = 0.1 * 30 ** stream.uniform((7,), dtype=torch.float64)
    x, z = ops.perturb(x0, 1.0, sigma, stream.draw())
    plain = PlainToy(net)

    def score(x):
        return plain(x, sigma) / sigma[:, None]

    dsm = (sigma[:, None] * score(x) + z).square().sum(1).mean()
    penalty = (sigma**2 * exact_penalty(score, x)).mean()
    torch.testing.assert_close(result.stats["dsm"], dsm.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.stats["penalty"], penalty.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.loss.detach(), (dsm + 0.1 * penalty).detach(), rtol=1e-10, atol=0)
    ours = parameter_gradient(result.loss, net)
    theirs = parameter_gradient(dsm + 0.1 * penalty, net)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()


def test_inclusion_probabilities():
    weight = torch.tensor([1.0, 2.0, 100.0, 3.0, 50.0])
    p = inclusion_probabilities(weight, 3)
    torch.testing.assert_close(p, torch.tensor([1 / 6, 1 / 3, 1.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        inclusion_probabilities(torch.ones(8), 2), torch.full((8,), 0.25, dtype=torch.float64)
    )
    torch.testing.assert_close(inclusion_probabilities(weight, 5), torch.ones(5, dtype=torch.float64))
    for seed in range(20):
        w = torch.rand(97, generator=torch.Generator().manual_seed(seed)) ** 6 + 1e-4
        p = inclusion_probabilities(w, 24)
        assert p.max() <= 1
        torch.testing.assert_close(p.sum(), torch.tensor(24.0, dtype=torch.float64), rtol=1e-9, atol=0)
        free = p < 1
        ratio = p[free] / w[free].double()
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-9, atol=0)


def test_systematic_sampling_includes_with_the_given_probabilities():
    """Over an even grid of offsets the frequencies equal the probabilities to the grid's width; no repetition."""
    w = torch.rand(40, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-3
    p = inclusion_probabilities(w, 10)
    frequency = torch.zeros(40, dtype=torch.float64)
    for i in range(2000):
        order = systematic_order(p, 10, torch.tensor([(i + 0.5) / 2000]))
        assert torch.equal(order.sort().values, torch.arange(40))
        frequency[order[:10]] += 1 / 2000
    torch.testing.assert_close(frequency, p, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("density", ["uniform", "inverse-sigma"])
def test_the_sub_batch_is_unbiased(density):
    """Mean weighted penalty over 300 objectives at one batch of data: within 5 standard errors of the full batch's."""
    _, full = make(balancing_factor=0.1, exact=True, half=False)
    _, part = make(balancing_factor=0.1, exact=True, half=False, fraction=0.25, time_density=density)
    x0 = torch.randn(16, 2, dtype=torch.float64)

    def draw(objective):
        stats = objective(x0).stats
        return torch.stack([stats[key] for key in ("dsm", "penalty", "asym")])

    with torch.no_grad():
        totals = {
            name: torch.stack([draw(objective) for _ in range(300)])
            for name, objective in (("full", full), ("part", part))
        }
    difference = totals["part"].mean(0) - totals["full"].mean(0)
    error = (totals["part"].var(0) / 300 + totals["full"].var(0) / 300).sqrt()
    assert (difference.abs() < 5 * error).all()


def test_without_penalty_nothing_is_pushed():
    net, objective = make(balancing_factor=0.0)
    result = objective(torch.randn(5, 2, dtype=torch.float64))
    assert set(result.stats) == {"loss", "dsm"}
    assert parameter_gradient(result.loss, net).norm() > 0


def test_conservative_score_gives_the_gradients_asked_for() -> None:
    """By `x` alone, as a product with the Jacobian needs them, by some parameters or by all."""
    torch.manual_seed(0)
    score = Score(ToyMLP("elu"), VE(0.1, 3.0), "conservative").double()
    x, t = torch.randn(7, 2, dtype=torch.float64, requires_grad=True), torch.rand(7, dtype=torch.float64)
    value = score(x, t)
    g, inputs = torch.randn_like(value), [x, *score.parameters()]
    together = torch.autograd.grad(value, inputs, g, retain_graph=True, allow_unused=True)
    for chosen in ([0], [3], [1, 4]):
        some = torch.autograd.grad(value, [inputs[i] for i in chosen], g, retain_graph=True)
        for i, gradient in zip(chosen, some, strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, together[i], rtol=1e-12, atol=1e-12)


def test_conservative_training_gradient_equals_double_backward():
    torch.manual_seed(0)
    net = ToyMLP("elu").double()
    objective = DenoisingObjective(Score(net, VE(0.1, 3.0), "conservative"), stream=NoiseStream(1), t_min=0.0)
    x0 = torch.randn(7, 2, dtype=torch.float64)
    ours = parameter_gradient(objective(x0).loss, net)
    stream = NoiseStream(1)
    sigma = 0.1 * 30 ** stream.uniform((7,), dtype=torch.float64)
    x, z = ops.perturb(x0, 1.0, sigma, stream.draw())
    x.requires_grad_()
    energy = PlainToy(net)(x, sigma).square().sum(1) / (2 * sigma)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    loss = 0.5 * (z - sigma[:, None] * gradient).square().sum(1).mean()
    theirs = parameter_gradient(loss, net)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction: expected"),
        ({"fraction": 1.5}, "fraction: expected"),
        ({"balancing_factor": -1.0}, "balancing_factor: expected"),
        ({"time_density": "cosine"}, "time_density: expected"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
