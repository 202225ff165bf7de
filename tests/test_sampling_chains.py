"""Samplers beyond Gaussian data: noise by index, chains and their laws, given parts.

Statistical bounds are 5 standard errors (two-sided error rate 6e-7 per figure), seeds fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gaussian import COVARIANCE, MEAN, GaussianScore
from mixture import CENTRES, SPREAD, WEIGHTS, MixtureScore
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.annealed import annealed_langevin_dynamics
from qcsbm_fast.sampling.conditional import colorisation, inpainting
from qcsbm_fast.sampling.mcmc import line_integral, metropolis_langevin, unadjusted_langevin
from qcsbm_fast.sampling.noise import SampleNoise
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.sampling.pc import predictor_corrector
from qcsbm_fast.sampling.predictors import PREDICTORS
from qcsbm_fast.sde import VE, VP, FunctionScore


@pytest.mark.parametrize(
    "dim", [(2,), (3, 7, 11), (70_001,)]
)  # several samples a block, and several blocks a sample
@pytest.mark.parametrize("kind", ["normal", "uniform", "rademacher"])
def test_noise_is_the_samples_own(kind: str, dim: tuple[int, ...]) -> None:
    def draw(first: int, count: int, seed: int = 3, skip: int = 0) -> Tensor:
        noise = SampleNoise(seed, first)
        for _ in range(skip):
            noise.draw()
        return getattr(noise, kind)((count, *dim))

    whole = draw(0, 900 if len(dim) > 1 else 10)
    cuts = (0, 1, 5, 8, len(whole))
    parts = [draw(a, b - a) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert draw(4, 0).shape == (0, *dim)
    for other in (draw(0, 10, seed=4), draw(0, 10, skip=1), draw(10, 10)):
        assert (other != whole[:10]).double().mean() > 0.2


def test_noise_is_white() -> None:
    """Over samples, draws and blocks: second moments within 5 standard errors."""
    noise = SampleNoise(0, 7)
    draws = torch.stack([noise.normal((400, 500)) for _ in range(2)]).double()
    assert abs(draws.mean().item()) < 5 / math.sqrt(draws.numel())
    assert abs(draws.square().mean().item() - 1) < 5 * math.sqrt(2 / draws.numel())
    for lagged in ((draws[0] * draws[1]), draws[0][1:] * draws[0][:-1]):
        assert abs(lagged.mean().item()) < 5 / math.sqrt(lagged.numel())
    state, other = noise.draw(), SampleNoise(0, 8).draw()
    assert not torch.equal(state, other)


VE_SCORE, VP_SCORE = MixtureScore(VE(0.1, 8.0)), MixtureScore(VP())


def at_rest(field: str) -> Callable[[SampleNoise, int], Tensor]:
    """A chain for the mixture's own score, from the normal law."""
    t = torch.zeros(1)

    def draw(stream: SampleNoise, count: int) -> Tensor:
        x = stream.normal((count, 2))
        score = lambda y: VE_SCORE(y, t.expand(len(y)))  # noqa: E731
        if field == "metropolis":
            return metropolis_langevin(score, x, [0.1] * 10, stream=stream).x
        return unadjusted_langevin(score, x, [0.1] * 10, stream=stream)

    return draw


SAMPLERS: dict[str, Callable[[SampleNoise, int], Tensor]] = {
    **{
        f"{predictor}-{corrector}": lambda stream, n, predictor=predictor, corrector=corrector: (
            predictor_corrector(
                VP_SCORE, (n, 2), steps=25, predictor=predictor, corrector=corrector, stream=stream
            )
        )
        for predictor in (*PREDICTORS, "none")
        for corrector in ("annealed-langevin", "none")
        if (predictor, corrector) != ("none", "none")
    },
    "inpainting": lambda stream, n: predictor_corrector(
        VE_SCORE,
        (n, 2),
        steps=20,
        corrector="none",
        known=inpainting(torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 0.0]])),
        stream=stream,
    ),
    "annealed": lambda stream, n: annealed_langevin_dynamics(
        VE_SCORE, (n, 2), steps_per_level=3, eps=1e-3, stream=stream
    ),
    "ode": lambda stream, n: probability_flow(VE_SCORE, (n, 2), stream=stream),
    "heun": lambda stream, n: probability_flow(VE_SCORE, (n, 2), stream=stream, steps=20),
    "langevin": at_rest("unadjusted"),
    "metropolis": at_rest("metropolis"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    whole = SAMPLERS[name](SampleNoise(5, 0), 9)
    parts = [SAMPLERS[name](SampleNoise(5, first), count) for first, count in ((0, 2), (2, 6), (8, 1))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert whole.std(0).min() > 0.01 or name == "inpainting"


def wasserstein2(a: Tensor, b: Tensor) -> float:
    ot = pytest.importorskip("ot")
    return math.sqrt(ot.emd2([], [], ot.dist(a.double().numpy(), b.double().numpy())))


@pytest.mark.parametrize("name", ["pc", "pc-annealed", "vp-exponential", "ode", "annealed"])
def test_samplers_draw_the_mixture(name: str) -> None:
    """Three modes of different weight: W2 to the data at most 0.1 above that of two draws of the data."""
    score = MixtureScore(VP() if name.startswith("vp") else VE(0.05, 8.0))
    size, stream = (1000, 2), NoiseStream(1)
    samples = {
        "pc": lambda: predictor_corrector(score, size, steps=200, stream=stream),
        "pc-annealed": lambda: predictor_corrector(
            score, size, steps=200, corrector="annealed-langevin", stream=stream
        ),
        "vp-exponential": lambda: predictor_corrector(
            score, size, steps=300, predictor="exponential", corrector="none", stream=stream
        ),
        "ode": lambda: probability_flow(score, size, stream=stream),
        "annealed": lambda: annealed_langevin_dynamics(
            score, size, levels=20, steps_per_level=40, eps=3e-4, stream=stream
        ),
    }[name]()
    data, again = score.sample(1000, 1), score.sample(1000, 2)
    assert wasserstein2(samples, data) < wasserstein2(again, data) + 0.1
    share = (samples[:, 0] < -0.9).double().mean().item()  # the first mode's
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(1000) + 0.02


def test_annealed_langevin_follows_its_recursion() -> None:
    """On Gaussian data every level is a variance recursion with alpha_i = eps sigma_i^2 / sigma_L^2."""
    sde, eps, variance = VE(0.2, 4.0), 0.02, 0.5
    score = GaussianScore(sde, torch.zeros(2).double(), variance * torch.eye(2).double())
    samples = annealed_langevin_dynamics(
        score, (20_000, 2), levels=5, steps_per_level=7, eps=eps, stream=NoiseStream(2), denoise=False
    )
    expected = 4.0**2
    for sigma in torch.logspace(math.log10(4.0), math.log10(0.2), 5, dtype=torch.float64).tolist():
        alpha = eps * sigma**2 / 0.2**2
        for _ in range(7):
            expected = (1 - alpha / 2 / (variance + sigma**2)) ** 2 * expected + alpha
    assert abs(samples.double().square().mean().item() / expected - 1) < 5 * math.sqrt(2 / samples.numel())
    for changes, message in (
        ({"levels": 1}, "levels: expected at least 2"),
        ({"eps": 0.2}, r"eps: expected 0 < eps < 4 sigma_min\^2 = 0\.16, got 0\.2"),
    ):
        with pytest.raises(ValueError, match=message):
            annealed_langevin_dynamics(score, (2, 2), stream=NoiseStream(0), **changes)  # pyright: ignore
    with pytest.raises(ValueError, match="process VE, got VP"):
        annealed_langevin_dynamics(GaussianScore(VP()), (2, 2), stream=NoiseStream(0))


def test_unadjusted_langevin_has_its_known_bias() -> None:
    """On N(0, v) the chain with size h is at rest at variance v / (1 - h / (4 v)), and starts from there stay there."""
    v, h, count = 0.5, 0.6, 200_000
    rest = v / (1 - h / (4 * v))
    x = math.sqrt(rest) * NoiseStream(3).normal((count, 1))
    x = unadjusted_langevin(lambda y: -y / v, x, [h] * 5, stream=NoiseStream(4))
    assert abs(x.double().square().mean().item() / rest - 1) < 5 * math.sqrt(2 / count)
    # falling sizes with a noisy score (SGLD): the bias falls too
    noise = NoiseStream(5)
    sizes = [0.3 / (1 + i) ** 0.6 for i in range(150)]
    x = unadjusted_langevin(
        lambda y: -y / v + noise.normal(y.shape), x[:20_000], sizes, stream=NoiseStream(6)
    )
    assert abs(x.double().square().mean().item() / v - 1) < 5 * math.sqrt(2 / 20_000) + 0.02


def test_metropolis_langevin_leaves_the_mixture_alone() -> None:
    """From exact draws, forty long steps later: means, second moments and weights within 5 standard errors.

    The unadjusted chain with the same sizes is off by more than 10.
    """
    score, t = MixtureScore(VE()), torch.zeros(1).double()
    field = lambda x: score(x, t.expand(len(x)) - 1.0)  # noqa: E731  # noise of 2e-6: the data's own score
    start = score.sample(20_000, 7)
    result = metropolis_langevin(field, start, [0.25] * 40, stream=NoiseStream(8))
    assert 0.5 < result.accepted.mean() < 0.9
    free = unadjusted_langevin(field, start, [0.25] * 40, stream=NoiseStream(8))

    def z_scores(x: Tensor) -> Tensor:
        x = x.double()
        values = torch.cat((x, x.square(), x[:, :1] * x[:, 1:], (x[:, :1] < -0.9).double()), 1)
        truth = torch.cat(
            (
                WEIGHTS @ CENTRES,
                WEIGHTS @ CENTRES.square() + SPREAD**2,
                (WEIGHTS @ (CENTRES[:, 0] * CENTRES[:, 1]))[None],
                (WEIGHTS * torch.special.ndtr((-0.9 - CENTRES[:, 0]) / SPREAD)).sum()[None],
            )
        )
        return (values.mean(0) - truth).abs() / (values.std(0) / math.sqrt(len(x)))

    assert z_scores(start).max() < 5
    assert z_scores(result.x).max() < 5
    assert z_scores(free).max() > 10


def test_line_integral_of_a_score_is_the_log_ratio() -> None:
    score, t = MixtureScore(VE(0.1, 5.0)), torch.full((50,), 0.6).double()
    a, b = (2.0 * NoiseStream(seed).normal((50, 2)).double() for seed in (1, 2))
    found = line_integral(lambda x: score(x, t), a, b, points=64)
    torch.testing.assert_close(found, score.log_prob(b, t) - score.log_prob(a, t), rtol=0, atol=1e-6)
    # points of the rule n are exact for polynomials of degree 2n - 1
    cubic = line_integral(lambda x: 4 * x**3, a, b, points=2)
    torch.testing.assert_close(cubic, (b**4 - a**4).sum(1), rtol=1e-12, atol=1e-10)


def test_inpainting_draws_the_rest() -> None:
    """Independent coordinates: the given one comes out as it is, the other has its own law. Correlated ones:
    its conditional law, to a fifth of the deviation, with six corrector steps."""
    diagonal = torch.diag(COVARIANCE.diagonal())
    given, mask = torch.tensor([[1.3, 0.0]]), torch.tensor([[1.0, 0.0]])
    for covariance, bias in ((diagonal, 0.03), (COVARIANCE, 0.12)):
        samples = predictor_corrector(
            GaussianScore(VE(0.01, 10.0), MEAN, covariance),
            (2000, 2),
            steps=150,
            corrector="annealed-langevin",
            corrector_steps=1 if bias < 0.1 else 6,
            snr=0.3,
            known=inpainting(given, mask),
            stream=NoiseStream(9),
        ).double()
        assert torch.equal(samples[:, 0], torch.full((2000,), 1.3).double())
        slope = covariance[0, 1] / covariance[0, 0]
        mean = (MEAN[1] + slope * (1.3 - MEAN[0])).item()
        variance = (covariance[1, 1] - slope * covariance[0, 1]).item()
        free = samples[:, 1]
        assert abs(free.mean().item() - mean) < 5 * math.sqrt(variance / 2000) + bias
        assert abs(free.var().item() / variance - 1) < 5 * math.sqrt(2 / 2000) + 2 * bias


def test_colorisation_keeps_the_grey() -> None:
    """Channels independent and normal: their mean is what was given, their differences are free."""
    sde = VE(0.01, 10.0)
    score = FunctionScore(lambda x, t: -x / (1 + sde.sigma(t).view(-1, 1, 1, 1).square()), sde)
    grey = NoiseStream(0).uniform((50, 1, 4, 4))
    samples = predictor_corrector(
        score, (50, 3, 4, 4), steps=100, known=colorisation(grey), stream=NoiseStream(1)
    )
    torch.testing.assert_close(samples.mean(1, keepdim=True), grey, rtol=0, atol=1e-5)
    difference = (samples[:, 0] - samples[:, 1]).double()
    assert abs(difference.var().item() / 2 - 1) < 5 * math.sqrt(2 / 800) + 0.05
    with pytest.raises(ValueError, match=r"grey: expected \(B, 1, H, W\)"):
        colorisation(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="zeros and ones only"):
        inpainting(torch.zeros(2, 4), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match=r"broadcasts to \(2, 4\), got \(3,\)"):
        inpainting(torch.zeros(2, 4), torch.ones(3))
