"""The probability-flow ODE and its solvers: closed forms, orders, torchdiffeq as an oracle."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gaussian import MEAN, GaussianScore
from mixture import MixtureScore
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling import dormand_prince, heun
from qcsbm_fast.sampling.noise import SampleNoise
from qcsbm_fast.sampling.ode import levels, log_noise, probability_flow
from qcsbm_fast.sde import OU, SDE, VE, VP, FunctionScore, SubVP

SDES: dict[str, SDE] = {
    "ve": VE(0.01, 10.0),
    "vp": VP(0.1, 20.0),
    "sub-vp": SubVP(0.1, 20.0),
    "ou": OU(3.0, 1.5),
}


@pytest.mark.parametrize("name", SDES)
def test_noise_coordinate_is_the_inverse(name: str) -> None:
    sde = SDES[name]
    t = torch.logspace(-5, 0, 40, dtype=torch.float64)
    mean, std = sde.marginal(t)
    found, m, s = levels(sde, torch.log(std / mean))
    torch.testing.assert_close(found, t, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(m, mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(s, std, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SDES)
def test_probability_flow_transports_each_sample(name: str) -> None:
    sde, t_min = SDES[name], 1e-3
    score = GaussianScore(sde)
    prior = sde.prior_sample((500, 2), NoiseStream(3))
    expected = score.transport(prior, 1.0, t_min)

    def draw(**options: object) -> Tensor:
        return probability_flow(score, (500, 2), stream=NoiseStream(3), t_min=t_min, **options).double()  # pyright: ignore

    torch.testing.assert_close(draw(rtol=1e-6, atol=1e-6, denoise=False), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(draw(denoise=False), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(draw(steps=400, denoise=False), expected, rtol=0, atol=5e-3)
    # the posterior mean of Gaussian data: mean + C m (m^2 C + std^2)^-1 (x - m mean)
    t = torch.tensor([t_min], dtype=torch.float64)
    gain = sde.marginal(t)[0] * score.eigenvalues / score.spectrum(t)[0]
    posterior = MEAN + ((expected - score.centre(t)) @ score.basis * gain) @ score.basis.T
    torch.testing.assert_close(draw(rtol=1e-6, atol=1e-6), posterior, rtol=0, atol=1e-4)


def oscillator(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """y'' = -w^2 y with a frequency per sample, 1 + row."""
    w = 1.0 + rows[:, None]
    return torch.cat((y[:, 1:], -w.square() * y[:, :1]), 1)


START = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(20, 2)
END = torch.stack(
    [torch.tensor([math.cos(w * 2.0), -w * math.sin(w * 2.0)], dtype=torch.float64) for w in range(1, 21)]
)


def test_dormand_prince_meets_its_tolerance_at_order_five() -> None:
    """The error follows the tolerance, and the work grows like its fifth root."""
    errors, work = [], []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        calls = [0]

        def counted(t: Tensor, y: Tensor, rows: Tensor, calls: list[int] = calls) -> Tensor:
            calls[0] += len(y)
            return oscillator(t, y, rows)

        end = dormand_prince.solve(counted, START, 0.0, 2.0, rtol=tolerance, atol=tolerance)
        errors.append((end - END).abs().max().item())
        work.append(calls[0])
    for tolerance, error in zip((1e-4, 1e-6, 1e-8, 1e-10), errors, strict=True):
        assert error < 500 * tolerance  # forty radians of phase, at amplitude twenty
    for fewer, more in pairwise(work[1:]):
        assert 2.2 < more / fewer < 2.8  # 100^(1/5) = 2.51


def test_each_sample_has_steps_of_its_own() -> None:
    """Alone or among faster ones, a sample's path is the same."""
    together = dormand_prince.solve(oscillator, START, 0.0, 2.0, rtol=1e-5, atol=1e-5)
    for row in (0, 7, 19):
        alone = dormand_prince.solve(
            lambda t, y, rows, row=row: oscillator(t, y, rows + row),
            START[:1],
            0.0,
            2.0,
            rtol=1e-5,
            atol=1e-5,
        )
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (2.0, 0.0)])
def test_progress_is_that_of_the_slowest_sample(start: float, end: float) -> None:
    """It goes to the end step by step, and no sample's last evaluation lies behind it."""
    sign = math.copysign(1.0, end - start)
    latest, seen, behind = torch.full((20,), start, dtype=torch.float64), [], []

    def watched(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        latest[rows] = t
        return oscillator(t, y, rows)

    def reached(at: float) -> None:
        seen.append(at)
        behind.append(bool((sign * latest < sign * at - 1e-12).any()))

    dormand_prince.solve(watched, START, start, end, rtol=1e-6, atol=1e-6, reached=reached)
    assert all(sign * b >= sign * a for a, b in pairwise(seen))
    assert len(set(seen)) > 20
    assert seen[-1] == end
    assert not any(behind)


def test_bar_of_the_flow(capsys: pytest.CaptureFixture[str]) -> None:
    score = GaussianScore(VE(0.01, 10.0))
    for options in ({}, {"steps": 9}, {"watch": lambda i, x: None}):
        probability_flow(score, (20, 2), stream=NoiseStream(0), progress=True, **options)  # pyright: ignore
        assert "log-noise 6.9/6.9" in capsys.readouterr().err
        probability_flow(score, (20, 2), stream=NoiseStream(0), **options)  # pyright: ignore
        assert not capsys.readouterr().err


def test_dormand_prince_against_torchdiffeq() -> None:
    """The flow of a mixture, both solvers to 1e-9: the same points to 1e-7."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    score = MixtureScore(VE(0.05, 8.0))
    x = 8.0 * NoiseStream(0).normal((30, 2)).double()

    def velocity(noise: Tensor, y: Tensor) -> Tensor:
        t, mean, std = levels(score.sde, noise.expand(len(y)))
        return -(std.square() / mean)[:, None] * score(y * mean[:, None], t)

    span = (log_noise(score.sde, 1.0), log_noise(score.sde, 0.0))
    ours = dormand_prince.solve(lambda t, y, _: velocity(t, y), x, *span, rtol=1e-9, atol=1e-9)
    theirs = torchdiffeq.odeint(velocity, x, torch.tensor(span).double(), rtol=1e-9, atol=1e-9)[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_heun_is_of_order_two() -> None:
    def error(steps: int) -> float:
        times = torch.linspace(0.0, 2.0, steps + 1, dtype=torch.float64)
        return (heun.solve(oscillator, START[:3], times) - END[:3]).abs().max().item()

    for coarse, fine in ((error(200), error(400)), (error(400), error(800))):
        assert 3.7 < coarse / fine < 4.3


def test_solver_fails_loudly() -> None:
    state = torch.tensor([[1.0, 2.0]])
    with pytest.raises(RuntimeError, match=r"not finite at t = 0\.0"):
        dormand_prince.solve(lambda t, y, _: y / 0.0, state, 0.0, 1.0, rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"stopped at t = 0\.[45]\d* between 0 and 2"):
        # the second entry blows up at t = 1/2
        dormand_prince.solve(lambda t, y, _: y.square(), state, 0.0, 2.0, rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match="the velocity is not finite; check the score"):
        dormand_prince.solve(
            lambda t, y, _: (0.7 - t)[:, None].sqrt() * y, state, 0.0, 2.0, rtol=1e-3, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"t_min: .* got 0\.0, where std is 0"):
        probability_flow(GaussianScore(VP()), (2, 2), stream=NoiseStream(0), t_min=0.0)


def test_any_function_is_a_score_and_is_watched() -> None:
    sde = VE(0.01, 10.0)
    score, frames = FunctionScore(lambda x, t: -x / (1.0 + sde.sigma(t)[:, None].square()), sde), []
    for options in ({}, {"steps": 50}):
        frames.clear()
        samples = probability_flow(
            score,
            (4000, 2),
            stream=SampleNoise(0, 0),
            watch=lambda i, x: frames.append((i, x)),
            **options,  # pyright: ignore
        )
        assert [i for i, _ in frames] == list(range(len(frames)))
        spreads = [x.std().item() for _, x in frames]
        assert all(a > b for a, b in pairwise(spreads))
        # second moments of 8000 normals: 5 standard errors
        assert abs(samples.square().mean().item() - 1.0) < 5 * math.sqrt(2 / 8000) + 0.01
