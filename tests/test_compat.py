"""The authors' losses: against plain nested gradients and float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import jacobians, parameter_gradient
from qcsbm_fast import Score, ops, sde
from qcsbm_fast.compat import losses, sde_lib
from qcsbm_fast.compat.models.utils import get_score_fn
from qcsbm_fast.nn import ToyMLP
from qcsbm_fast.random import NoiseStream
from script_objects import VESDE, Renamed, column, network


def nested_loss(model: nn.Module, process: VESDE, batch: Tensor, factor: float, likelihood: bool) -> tuple:
    """The published loss, plainly: nested vector-Jacobian products and full second-order gradients."""
    t = torch.rand(len(batch), dtype=batch.dtype) * (1 - 1e-5) + 1e-5
    z, v = torch.randn_like(batch), torch.randn_like(batch).sign()
    std = process.marginal_prob(batch, t)[1]
    x = (batch + column(std) * z).requires_grad_()
    score = model(x, std)
    loss = 0.5 * (column(std) * score + z).square().flatten(1).sum(1)
    if likelihood:
        loss = loss * (process.sde(batch, t)[1] / std) ** 2
    (once,) = torch.autograd.grad(score, x, v, create_graph=True)
    (twice,) = torch.autograd.grad(score, x, once, create_graph=True)
    reg = std**2 * (once.square() - twice * v).flatten(1).sum(1)
    (loss + factor * reg).mean().backward()
    return loss.mean().detach(), reg.mean().detach()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # pyright: ignore


@pytest.mark.parametrize("likelihood", [False, True])
def test_loss_penalty_and_gradient_agree_in_expectation(likelihood: bool) -> None:
    """Means over 40 draws of 32 samples; 4.5 standard errors of the difference: below 1e-4 of false alarms."""
    process, draws = VESDE(), 40
    batch = torch.rand(32, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours = losses.get_sde_loss_fn(process, True, False, True, likelihood, 1e-5, 0.5, 2, False)
    rows: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    directions = torch.randn(6, sum(p.numel() for p in network().parameters()))
    for name in rows:
        model = network(scale=2.0)
        torch.manual_seed(5)
        for _ in range(draws):
            model.zero_grad()
            loss, reg = (
                ours(model, batch) if name == "ours" else nested_loss(model, process, batch, 0.5, likelihood)
            )
            rows[name].append(torch.cat([torch.stack([loss, reg]), directions @ gradient(model)]))
    a, b = (torch.stack(rows[name]).double() for name in ("ours", "theirs"))
    assert (a[:, 1] >= 0).all()
    assert a[:, 1].mean() > 0.05  # there is a penalty to agree on
    error = ((a.var(0) + b.var(0)) / draws).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all()
    assert (error[:2] < 0.1 * b.mean(0)[:2].abs()).all()


@pytest.mark.parametrize("energy", [False, True])
def test_gradients_are_float64_autograds_for_the_same_draws(
    energy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times, noise and probes fixed: the loss's gradient, and the penalty's by all unit vectors."""
    torch.manual_seed(0)
    process, model = VESDE(), network().double()
    batch = torch.rand(3, 2, 2, 2, dtype=torch.float64)
    factor = 0.0 if energy else 0.7
    monkeypatch.setattr(losses, "as_stream", lambda *_: NoiseStream(3))
    if not energy:
        inner = losses.DenoisingObjective
        monkeypatch.setattr(losses, "DenoisingObjective", lambda *a, **k: inner(*a, **k, exact=True))
    loss, reg = losses.get_sde_loss_fn(process, True, balancing_fac=factor, energy=energy)(model, batch)
    ours = gradient(model)

    stream = NoiseStream(3)
    t = 1e-5 + (1 - 1e-5) * stream.uniform((3,), dtype=torch.float64)
    std = process.marginal_prob(batch, t)[1]
    x, z = ops.perturb(batch, 1.0, std, stream.draw())

    def score(y: Tensor) -> Tensor:
        if not energy:
            return model(y, std)
        y = y if y.requires_grad else y.detach().requires_grad_()
        value = (model(y, std).square().flatten(1).sum(1) / (2 * std)).sum()
        return -torch.autograd.grad(value, y, create_graph=True)[0]

    weight = (process.sde(batch, t)[1] / std) ** 2
    expected = (0.5 * weight * (column(std) * score(x) + z).square().flatten(1).sum(1)).mean()
    penalty = torch.zeros((), dtype=torch.float64)
    if not energy:
        j = jacobians(score, x)
        penalty = (std**2 * 0.5 * (j - j.transpose(1, 2)).square().sum((1, 2))).mean()
    theirs = parameter_gradient(expected + factor * penalty, model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert reg.item() == pytest.approx(penalty.item(), rel=1e-12)
    assert (ours - theirs).norm() < 1e-11 * theirs.norm()
    assert not loss.requires_grad
    assert not reg.requires_grad


def test_gradients_accumulate_and_evaluation_takes_none() -> None:
    process, model, batch = VESDE(), network(), torch.rand(4, 2, 4, 4)
    train, evaluate = (losses.get_sde_loss_fn(process, mode, slices=1) for mode in (True, False))
    torch.manual_seed(2)
    values = train(model, batch)
    once = gradient(model)
    torch.manual_seed(2)
    again = train(model, batch)
    torch.testing.assert_close(gradient(model), 2 * once)
    assert model.training
    torch.manual_seed(2)
    assert values == again == evaluate(model, batch)
    assert not model.training
    torch.testing.assert_close(gradient(model), 2 * once)


def test_our_objects_take_the_same_place() -> None:
    """A Score is its own answer; one of our networks, which returns sigma times the score, is taken as such."""
    torch.manual_seed(0)
    net, batch = ToyMLP("identity"), torch.randn(6, 2)
    values = []
    for process in (sde.VE(0.1, 3.0), sde_lib.VESDE(0.1, 3.0, 10)):
        for model in (net, Score(net, sde.VE(0.1, 3.0), "quasi-conservative")):
            torch.manual_seed(1)
            values.append(losses.get_sde_loss_fn(process, True, slices=2)(model, batch))
    assert all(value == values[0] for value in values)
    with pytest.raises(ValueError, match="energy: expected False for a quasi-conservative Score, got True"):
        losses.get_sde_loss_fn(process, True, energy=True)(model, batch)


def test_what_is_not_an_sde_is_named() -> None:
    with pytest.raises(
        TypeError, match="sde: expected marginal_prob, sde, discretize and N, got Linear without"
    ):
        sde_lib.as_process(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="expected a class named VESDE"):
        get_score_fn(Renamed(), network())
