"""Likelihood by the probability-flow ODE against the closed form for Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gaussian import COVARIANCE, MEAN, GaussianScore
from qcsbm_fast.likelihood import bits_per_dim, dequantized_bits_per_dim, log_likelihood
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import OU, SDE, VE, VP, SubVP

SDES: dict[str, SDE] = {
    "ve": VE(0.1, 3.0),
    "vp": VP(0.1, 20.0),
    "sub-vp": SubVP(0.1, 20.0),
    "ou": OU(3.0, 1.5),
}
T_MIN = 1e-2  # below it the variance of VP, sub-VP and OU data barely changes


def samples(count: int) -> Tensor:
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (MEAN + z @ torch.linalg.cholesky(COVARIANCE).T).float()


def closed_form(score: GaussianScore, x: Tensor) -> Tensor:
    """The model's own density: log prior of where the flow takes x, plus the log volume factor."""
    return score.sde.prior_log_prob(score.transport(x, T_MIN, 1.0)) + score.log_stretch(T_MIN, 1.0)


@pytest.mark.parametrize("name", SDES)
def test_exact_divergence_gives_the_closed_form(name: str) -> None:
    score, x = GaussianScore(SDES[name]), samples(50)
    tight = log_likelihood(score, x.double(), rtol=1e-6, atol=1e-6, t_min=T_MIN, exact=True)
    assert tight.shape == (50,)
    assert tight.dtype == torch.float64
    torch.testing.assert_close(tight, closed_form(score, x), rtol=0, atol=1e-4)
    default = log_likelihood(score, x, t_min=T_MIN, exact=True)
    torch.testing.assert_close(default, closed_form(score, x), rtol=0, atol=2e-2)


def test_it_is_the_density_of_the_noised_data_up_to_the_prior() -> None:
    """VE from 0.1 to 50, centred data: the prior errs by C / 50^2, so the density is that of x at t_min."""
    centre = torch.zeros(2, dtype=torch.float64)
    score, x = GaussianScore(VE(0.1, 50.0), centre), samples(50)
    value = log_likelihood(score, x, rtol=1e-6, atol=1e-6, t_min=1e-5, exact=True)
    covariance = COVARIANCE + 0.1**2 * torch.eye(2, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(centre, covariance).log_prob(x.double())
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-3)


def test_hutchinson_is_unbiased() -> None:
    """400 probes against the exact divergence: within 5 standard errors (error rate 6e-7)."""
    score = GaussianScore(SDES["ve"])
    x = samples(1).repeat(400, 1)
    exact = log_likelihood(score, x[:1], rtol=1e-5, atol=1e-6, t_min=T_MIN, exact=True)
    estimates = log_likelihood(score, x, rtol=1e-5, atol=1e-6, t_min=T_MIN, generator=NoiseStream(0))
    spread = estimates.std().item()
    assert spread > 0.05  # the Jacobian is not diagonal, so the probes matter
    assert abs(estimates.mean() - exact).item() < 5 * spread / math.sqrt(400)
    again = log_likelihood(score, x, rtol=1e-5, atol=1e-6, t_min=T_MIN, generator=NoiseStream(0))
    torch.testing.assert_close(again, estimates, rtol=0, atol=0)


def test_batches_make_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    score, x = GaussianScore(SDES["ve"]), samples(12)
    whole = log_likelihood(score, x, t_min=T_MIN, probes=2, generator=NoiseStream(1))
    parts = log_likelihood(score, x, t_min=T_MIN, probes=2, generator=NoiseStream(1), batch_size=5)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert not capsys.readouterr().err
    options = {"t_min": T_MIN, "probes": 2, "batch_size": 5, "progress": True}
    assert torch.equal(log_likelihood(score, x, generator=NoiseStream(1), **options), parts)
    assert "log-noise 10.1/10.1" in capsys.readouterr().err  # three batches of 0.99 log 30
    with pytest.raises(ValueError, match="probes: expected at least 1, got 0"):
        log_likelihood(score, x, probes=0)


def test_bits_per_dim_of_uniform_noise() -> None:
    """The uniform density on the unit cube is 0 nats: 8 bits a dimension for 256 values, 4 for 16."""
    nats = torch.tensor([0.0, 12 * math.log(2.0)], dtype=torch.float64)
    assert bits_per_dim(nats, 12).tolist() == pytest.approx([8.0, 7.0])
    assert bits_per_dim(nats, 12, levels=16).tolist() == pytest.approx([4.0, 3.0])


def test_dequantized_bits_of_a_gaussian() -> None:
    """For wide Gaussian data the repeats give the closed form, and their spread is what the standard errors say.

    The mean over samples and repeats lies within 5 standard errors of the expected negative log-density of
    the spread values (error rate 6e-7); with an exact divergence only dequantisation is random, so repeats
    hardly differ.
    """
    centre, covariance = torch.full((2,), 0.5).double(), 0.04 * torch.eye(2, dtype=torch.float64)
    score = GaussianScore(VE(0.01, 10.0), centre, covariance)
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
    x = ((0.5 + 0.2 * z).clamp(0.0, 1.0) * 15).round() / 15
    options = {"quantization": 16, "rtol": 1e-3, "atol": 1e-4}
    exact = dequantized_bits_per_dim(score, x, NoiseStream(0), repeats=3, exact=True, **options)
    assert exact.repeats.shape == (3,)
    assert exact.mean == pytest.approx(exact.repeats.mean().item())
    law = torch.distributions.MultivariateNormal(centre, covariance + 0.01**2 * torch.eye(2).double())
    spread = (15 * x + NoiseStream(5).uniform((200, *x.shape))) / 16
    bits = bits_per_dim(law.log_prob(spread.double()), 2, 16)
    # the model's own density falls short of the law by the prior's error, 0.04 / 10^2
    assert abs(exact.mean - bits.mean().item()) < 5 * exact.repeat_error + 0.02
    assert exact.error == pytest.approx(bits.mean(0).std().item() / math.sqrt(60), rel=0.2)
    assert 0 < exact.repeat_error < exact.error
    rough = dequantized_bits_per_dim(score, x, NoiseStream(0), repeats=3, probes=1, **options)
    assert abs(rough.mean - exact.mean) < 5 * math.hypot(rough.repeat_error, exact.repeat_error)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\], got 0 to 255"):
        dequantized_bits_per_dim(score, torch.tensor([[0.0, 255.0]]), NoiseStream(0))
