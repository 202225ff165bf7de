"""Samplers on Gaussian data, whose score, reverse chains and probability flow are known in closed form.

Statistical bounds are 5 standard errors (two-sided error rate 6e-7 per figure), seeds fixed.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gaussian import COVARIANCE, MEAN, GaussianScore
from qcsbm_fast.nn import ImageMLP, ToyMLP
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.correctors import langevin
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.sampling.pc import predictor_corrector
from qcsbm_fast.sampling.predictors import PREDICTORS
from qcsbm_fast.score import Kind, Score
from qcsbm_fast.sde import OU, SDE, VE, VP, SubVP

SDES: dict[str, SDE] = {
    "ve": VE(0.01, 10.0),
    "vp": VP(0.1, 20.0),
    "sub-vp": SubVP(0.1, 20.0),
    "ou": OU(3.0, 1.5),
}
HAVE = {"ancestral": ("ve", "vp"), "exponential": ("vp", "ou")}
PAIRS = [(sde, name) for sde in SDES for name in PREDICTORS if sde in HAVE.get(name, SDES)]


def isotropic(dim: int, variance: float) -> tuple[Tensor, Tensor]:
    return torch.zeros(dim, dtype=torch.float64), variance * torch.eye(dim, dtype=torch.float64)


def table(sde: SDE, predictor: str, steps: int) -> tuple[list[list[float]], list[float], list[float]]:
    """The predictor's (a, b, c) and the marginals (m, std) at the sampler's times."""
    t = torch.linspace(1.0, 1e-5, steps, dtype=torch.float64)
    mean, std = sde.marginal(t)
    return torch.stack(PREDICTORS[predictor](sde, t, steps), 1).tolist(), mean.tolist(), std.tolist()


def chain_law(sde: SDE, predictor: str, steps: int, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance at the end of the predictor's chain from the true x_1, for data N(mean, variance)."""
    rows, m, std = table(sde, predictor, steps)
    chain_mean, chain_variance = m[0] * mean, m[0] ** 2 * variance + std[0] ** 2
    for (a, b, c), m_t, std_t in zip(rows, m, std, strict=True):
        variance_t = m_t**2 * variance + std_t**2
        factor = a - b / variance_t
        chain_mean = factor * chain_mean + b * m_t * mean / variance_t
        chain_variance = factor**2 * chain_variance + c**2
    return chain_mean, chain_variance


@pytest.mark.parametrize(("name", "predictor"), PAIRS)
def test_predictors_converge_at_first_order(name: str, predictor: str) -> None:
    mean, variance = 0.7, 0.5
    errors = []
    for steps in (250, 500, 1000):
        law = chain_law(SDES[name], predictor, steps, mean, variance)
        errors.append((abs(law[0] - mean), abs(law[1] - variance)))
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            # halving the step halves the error; 3e-6 is for the end at 1e-5 and not at 0
            assert 1.7 < a / b < 2.3 if a > 3e-6 else b <= 3e-6
    assert max(errors[-1]) < 8e-3


@pytest.mark.parametrize("sde", [VP(0.1, 20.0), OU(3.0, 1.5)])
def test_exponential_integrator_is_exact_where_the_score_is_constant(sde: SDE) -> None:
    """The law after any step is then Gaussian, and two steps are as good as one of twice the length."""
    coarse, fine = (
        torch.stack(PREDICTORS["exponential"](sde, torch.linspace(1, 0, n, dtype=torch.float64), n), 1)
        for n in (11, 21)
    )
    (a1, b1, c1), (a2, b2, c2) = fine[:20:2].T, fine[1:20:2].T
    two = torch.stack((a2 * a1, a2 * b1 + b2, (a2.square() * c1.square() + c2.square()).sqrt()), 1)
    torch.testing.assert_close(two, coarse[:10], rtol=1e-12, atol=0)
    # one step over the whole of [0, 1]: the reverse drift undoes the mean, the noise is that of the way back
    a, b, c = PREDICTORS["exponential"](sde, torch.tensor([1.0]).double(), 2)
    mean, std = sde.marginal(torch.tensor([1.0]).double())
    torch.testing.assert_close(a, 1 / mean)
    torch.testing.assert_close(c, std / mean)
    torch.testing.assert_close(b, 2 * sde.prior_std**2 * (1 / mean - 1))


def test_ancestral_steps_are_exact_where_their_posterior_is() -> None:
    """VE: for one data point, level i goes to level i - 1. VP: the standard normal stays as it is."""
    rows, _, std = table(VE(0.1, 10.0), "ancestral", 40)
    levels = [*VE(0.1, 10.0).noise_levels(torch.linspace(1, 0, 40, dtype=torch.float64), 40)[0].tolist(), 0.0]
    for (a, b, c), sigma, below in zip(rows, levels[:-1], levels[1:], strict=True):
        assert ((a - b / sigma**2) * sigma) ** 2 + c**2 == pytest.approx(below**2, rel=1e-10)
    assert std[0] == pytest.approx(levels[0])
    for a, b, c in table(VP(0.1, 20.0), "ancestral", 40)[0]:
        assert (a - b) ** 2 + c**2 == pytest.approx(1.0, rel=1e-12)


def moment_z_scores(samples: Tensor, mean: Tensor, covariance: Tensor, bias: float = 0.0) -> Tensor:
    """Distances of the sample's mean and second moments from the given, less `bias`, in standard errors."""
    deviation = samples.double() - mean
    products = torch.cat((deviation, (deviation[:, :, None] * deviation[:, None, :]).flatten(1)), 1)
    expected = torch.cat((torch.zeros_like(mean), covariance.flatten()))
    gap = ((products.mean(0) - expected).abs() - bias).clamp(min=0)
    return gap / (products.std(0) / math.sqrt(len(samples)))


@pytest.mark.parametrize(("name", "predictor"), PAIRS)
def test_predictor_alone_follows_its_chain(name: str, predictor: str) -> None:
    """Without a corrector the sampler is a linear recursion: its samples have the recursion's moments."""
    sde, steps, variance = SDES[name], 60, 0.5
    score = GaussianScore(sde, *isotropic(2, variance))
    expected = sde.prior_std**2
    rows, m, std = table(sde, predictor, steps)
    for (a, b, c), m_t, std_t in zip(rows, m, std, strict=True):
        expected = (a - b / (m_t**2 * variance + std_t**2)) ** 2 * expected + c**2
    for denoise in (False, True):
        samples = predictor_corrector(
            score,
            (20_000, 2),
            steps=steps,
            stream=NoiseStream(0),
            predictor=predictor,
            corrector="none",
            denoise=denoise,
        )
        last_noise = rows[-1][2] ** 2 if denoise else 0.0
        assert moment_z_scores(samples, *isotropic(2, expected - last_noise)).max() < 5


def test_langevin_step_size() -> None:
    """2 alpha (snr mean||z|| / mean||s||)^2, and for VP alpha is the 1 - beta_i of the forward chain."""
    steps, snr, batch, dim = 30, 0.3, 50_000, 4
    for sde, t, alpha in ((VE(0.01, 10.0), 0.7, 1.0), (VP(0.1, 20.0), 1.0, 1 - 20 / steps)):
        score = GaussianScore(sde, *isotropic(dim, 0.5))
        x, times = 3.0 * NoiseStream(8).normal((batch, dim)), torch.full((batch,), t)
        s = score(x, times)
        moved, mean = langevin(score, x, times, snr=snr, steps=steps, stream=NoiseStream(9))
        noise_norm = math.sqrt(2.0) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)
        step = 2 * alpha * (snr * noise_norm / s.double().norm(dim=1).mean().item()) ** 2
        # 50,000 norms with a spread of a third of their mean: 5 standard errors of the squared mean are 1.6%
        found = ((mean - x) * s).double().sum().item() / s.double().square().sum().item()
        assert found == pytest.approx(step, rel=0.016)
        z = ((moved - mean) / math.sqrt(2 * found)).double()
        assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("predictor", ["none", "reverse-diffusion"])
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_correctors_come_first_and_follow_their_law(name: str, predictor: str) -> None:
    """With the mean norms of a large batch, Langevin steps and predictor are a variance recursion."""
    sde, steps, dim, snr = SDES[name], 30, 8, 0.16
    score = GaussianScore(sde, *isotropic(dim, 0.5))
    mean_norm = math.sqrt(2.0) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)
    rows, m, std = table(sde, "reverse-diffusion", steps)
    t = torch.linspace(1.0, 1e-5, steps, dtype=torch.float64)
    alphas = (1.0 - sde.step_beta(t, steps)).tolist() if isinstance(sde, VP) else [1.0] * steps
    expected = expected_mean = sde.prior_std**2
    for (a, b, c), m_t, std_t, alpha in zip(rows, m, std, alphas, strict=True):
        variance = m_t**2 * 0.5 + std_t**2
        for _ in range(2):
            score_norm = math.sqrt(expected) / variance * mean_norm
            step = 2 * alpha * (snr * mean_norm / score_norm) ** 2
            expected_mean = (1 - step / variance) ** 2 * expected
            expected = expected_mean + 2 * step
        if predictor != "none":
            expected_mean = (a - b / variance) ** 2 * expected
            expected = expected_mean + c**2
    for denoise, value in ((False, expected), (True, expected_mean)):
        samples = predictor_corrector(
            score,
            (20_000, dim),
            steps=steps,
            stream=NoiseStream(1),
            predictor=predictor,
            corrector_steps=2,
            snr=snr,
            denoise=denoise,
        )
        # 0.2% for the fluctuation of the step size, which 20,000 norms leave at 0.3% a step
        assert moment_z_scores(samples, *isotropic(dim, value), bias=2e-3 * value).max() < 5


@pytest.mark.parametrize(("name", "predictor"), [p for p in PAIRS if p[0] != "ou"])
def test_predictor_corrector_samples_the_data(name: str, predictor: str) -> None:
    """The whole sampler, against the data's mean and covariance: bias at most 0.03 at 300 steps."""
    samples = predictor_corrector(
        GaussianScore(SDES[name]), (10_000, 2), steps=300, stream=NoiseStream(2), predictor=predictor
    )
    assert samples.dtype == torch.float32
    assert moment_z_scores(samples, MEAN, COVARIANCE, bias=0.03).max() < 5


@pytest.mark.parametrize("kind", ["unconstrained", "conservative"])
def test_samples_depend_on_the_stream_alone_and_hold_no_graph(
    kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    score = Score(ToyMLP(), VE(0.1, 3.0), kind)

    def draw(seed: int, progress: bool = False) -> list[Tensor]:
        pc = predictor_corrector(score, (64, 2), steps=10, stream=NoiseStream(seed), progress=progress)
        return [pc, probability_flow(score, (64, 2), stream=NoiseStream(seed))]

    first = draw(5)
    assert "sampling" not in capsys.readouterr().err
    torch.manual_seed(1)
    again, other = draw(5, progress=True), draw(6)
    assert "10/10" in capsys.readouterr().err
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.isclose(a, c).all()
        assert not a.requires_grad
    assert all(p.grad is None for p in score.parameters())


def test_bad_names() -> None:
    score = GaussianScore(VE(0.1, 3.0))
    with pytest.raises(ValueError, match=r"predictor: expected one of euler-maruyama, .*none, got 'heun'"):
        predictor_corrector(score, (2, 2), steps=10, stream=NoiseStream(0), predictor="heun")
    with pytest.raises(
        ValueError, match="corrector: expected one of langevin, annealed-langevin, none, got 'mala'"
    ):
        predictor_corrector(score, (2, 2), steps=10, stream=NoiseStream(0), corrector="mala")
    with pytest.raises(ValueError, match="defined for VE and VP and not for OU"):
        predictor_corrector(
            GaussianScore(OU()), (2, 2), steps=10, stream=NoiseStream(0), predictor="ancestral"
        )


class CountCasts(TorchDispatchMode):
    """How many matrices have been turned from float32 into bfloat16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dim() == 2 and args[0].shape[0] != 3:
            self.count += (kwargs or {}).get("dtype") is torch.bfloat16
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["pc", "heun"])
def test_weights_are_cast_once_for_all_steps(sampler: str) -> None:
    score = Score(ImageMLP(4, 8, 2), SDES["ve"], autocast=torch.bfloat16)
    counts, samples = [], []
    for steps in (2, 6):
        with CountCasts() as casts:
            stream = NoiseStream(0)
            if sampler == "pc":
                samples.append(predictor_corrector(score, (3, 4), steps=steps, stream=stream))
            else:
                samples.append(probability_flow(score, (3, 4), steps=steps, stream=stream))
        counts.append(casts.count)
    assert 0 < counts[0] == counts[1]
    with torch.no_grad():  # nothing is kept afterwards: the weights may change
        for p in score.parameters():
            p.zero_()
        where = samples[0], torch.full((3,), 0.5)
        assert torch.equal(score(*where), copy.deepcopy(score)(*where))
