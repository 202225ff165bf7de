"""Forward processes against the published code's numbers, closed forms and the ODEs of their moments."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qcsbm_fast.sde import OU, SDE, VE, VP, SubVP, sde_from_name

GOLDEN = np.load(Path(__file__).parent / "data" / "sde.npz")
STEPS = 1000
CASES: dict[str, SDE] = {"ve": VE(0.01, 50.0), "vp": VP(0.1, 20.0), "subvp": SubVP(0.1, 20.0)}
ALL = [*CASES.values(), OU(5.0, 1.5)]
IDS = ["ve", "vp", "sub-vp", "ou"]
TIMES = torch.linspace(1e-5, 1.0, 101, dtype=torch.float64)


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name]).double()


def rows(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return factor.view(-1, *[1] * (x.ndim - 1)) * x


def quantities(case: str) -> dict[str, torch.Tensor]:
    """Everything the golden file records, from this package in float64."""
    sde, x, t = CASES[case], golden("x"), golden("t")
    mean, std = sde.marginal(t)
    f, g = sde.discretize(t, STEPS)
    out = {
        "mean": rows(mean, x),
        "std": std,
        "drift": rows(sde.drift(t), x),
        "diffusion": sde.diffusion(t),
        "disc_f": rows(f, x),
        "disc_G": g,
        "prior_logp": sde.prior_log_prob(x),
    }
    score = rows(-1.0 / (1.0 + std**2), x)
    for key, flow in (("rev0", False), ("rev1", True)):
        drift, weight, _ = sde.reverse(t, probability_flow=flow)
        out[f"{key}_drift"] = rows(drift, x) + rows(weight, score)
        drift, weight, g = sde.reverse_discretize(t, STEPS, probability_flow=flow)
        out[f"{key}_disc_f"], out[f"{key}_disc_G"] = rows(drift, x) + rows(weight, score), g
    return out


def published(case: str) -> dict[str, np.ndarray]:
    """The same, in float64 numpy, by the formulas and tables of the published code."""
    x, t = golden("x").numpy(), golden("t").numpy()
    index = (t * (STEPS - 1)).astype(int)
    wide = lambda v: v[:, None, None, None]  # noqa: E731
    r2, dim = (x**2).sum((1, 2, 3)), x[0].size
    prior_std = 1.0
    if case == "ve":
        levels = np.exp(np.linspace(np.log(0.01), np.log(50.0), STEPS))
        below = np.where(index == 0, 0.0, levels[index - 1])
        mean, std, prior_std = x, 0.01 * 5000.0**t, 50.0
        drift, diffusion = 0.0 * x, std * np.sqrt(2 * np.log(5000.0))
        disc_f, disc_g = 0.0 * x, np.sqrt(levels[index] ** 2 - below**2)
    else:
        beta = 0.1 + t * 19.9
        log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        mean, drift = wide(np.exp(log_mean)) * x, -0.5 * wide(beta) * x
        if case == "vp":
            step_beta = np.linspace(0.1 / STEPS, 20.0 / STEPS, STEPS)[index]
            std, diffusion = np.sqrt(1 - np.exp(2 * log_mean)), np.sqrt(beta)
            disc_f, disc_g = (np.sqrt(1 - wide(step_beta)) - 1) * x, np.sqrt(step_beta)
        else:
            std = 1 - np.exp(2 * log_mean)
            diffusion = np.sqrt(beta * (1 - np.exp(-2 * 0.1 * t - 19.9 * t**2)))
            disc_f, disc_g = drift / STEPS, diffusion / np.sqrt(STEPS)
    out = {
        "mean": mean,
        "std": std,
        "drift": drift,
        "diffusion": diffusion,
        "disc_f": disc_f,
        "disc_G": disc_g,
    }
    out["prior_logp"] = -dim / 2 * np.log(2 * np.pi * prior_std**2) - r2 / (2 * prior_std**2)
    score = -x / (1 + wide(std) ** 2)
    for key, half in (("rev0", 1.0), ("rev1", 0.5)):
        out[f"{key}_drift"] = drift - half * wide(diffusion**2) * score
        out[f"{key}_disc_f"] = disc_f - half * wide(disc_g**2) * score
        out[f"{key}_disc_G"] = disc_g if key == "rev0" else 0.0 * disc_g
    return out


@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_published_formulas(case: str) -> None:
    ours, theirs = quantities(case), published(case)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value.numpy(), theirs[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_golden_values(case: str) -> None:
    # The golden file was recorded in float32, so it is met to the rounding of the run that made it: 8 ulp of
    # the largest term of the quantity. That run cancelled in three places: the reverse drift and step against
    # the forward ones; sqrt(1 - beta_i) - 1, which is an ulp of x; and sigma_i^2 - sigma_{i-1}^2 of two close
    # levels, which costs a factor of about 60 = 1 / (1 - (sigma_{i-1} / sigma_i)^2).
    for name, value in quantities(case).items():
        expected = golden(f"{case}/{name}")
        terms = (
            [expected, golden(f"{case}/{name.split('_', 1)[1]}")] if name.startswith("rev") else [expected]
        )
        if case == "vp" and "disc_f" in name:
            terms.append(golden("x"))
        ulps = 8 * 60 if case == "ve" and "disc" in name else 8
        error = (value - expected).abs().max().item()
        assert error <= ulps * 2.0**-24 * max(term.abs().max().item() for term in terms), name


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_marginals_solve_the_moment_equations(sde: SDE) -> None:
    """dm/dt = f m and d(std^2)/dt = 2 f std^2 + g^2, the derivatives by autograd."""
    t = TIMES.clone().requires_grad_()
    mean, std = sde.marginal(t)
    (mean_rate,) = torch.autograd.grad((mean + 0 * t).sum(), t, retain_graph=True)
    (variance_rate,) = torch.autograd.grad(std.square().sum(), t)
    mean, std = mean.detach(), std.detach()
    f, g = sde.drift(TIMES), sde.diffusion(TIMES)
    torch.testing.assert_close(mean_rate, f * mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(variance_rate, 2 * f * std**2 + g**2, rtol=1e-8, atol=1e-9)


def chain_moments(sde: SDE, steps: int) -> tuple[float, float]:
    """Mean coefficient and variance of the whole discretised chain, from x_0 fixed."""
    t = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    mean, variance = 1.0, 0.0
    for f, g in torch.stack(sde.discretize(t, steps), 1).tolist():
        mean, variance = (1 + f) * mean, (1 + f) ** 2 * variance + g * g
    return mean, variance


def test_ve_and_ou_chains_are_exact() -> None:
    ve, ou = CASES["ve"], OU(3.0, 1.5)
    mean, variance = chain_moments(ve, 50)
    assert (mean, variance) == pytest.approx((1.0, 50.0**2), rel=1e-12)
    mean, variance = chain_moments(ou, 50)
    assert mean == pytest.approx(math.exp(-3.0), rel=1e-12)
    assert variance == pytest.approx(1.5**2 * -math.expm1(-6.0), rel=1e-12)


@pytest.mark.parametrize("case", ["vp", "subvp"])
def test_other_chains_converge_at_first_order(case: str) -> None:
    sde = CASES[case]
    mean, std = (v.item() for v in sde.marginal(torch.ones(1, dtype=torch.float64)))
    errors = []
    for steps in (500, 1000, 2000):
        chain_mean, chain_variance = chain_moments(sde, steps)
        errors.append((abs(chain_mean / mean - 1), abs(chain_variance - std**2)))
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert (
                1.8 < a / b < 2.2 or a < 1e-12
            )  # halving the step halves the error (VP's variance is exact)
    assert errors[-1][0] < 0.05


def test_float32_times_on_the_grid_keep_their_own_level() -> None:
    """The plain floor(t (N - 1)) of a float32 i/(N - 1) repeats some levels and skips others."""
    for steps in (10, 1000, 10_000):
        t = torch.linspace(0, 1, steps)
        assert steps == 10 or (t * (steps - 1)).floor().unique().numel() < steps
        sigma, below = VE(0.01, 50.0).noise_levels(t, steps)
        torch.testing.assert_close(below[1:], sigma[:-1], rtol=2e-6, atol=0)
        assert below[0] == 0
        assert (sigma.diff() > 0).all()


def test_ve_times_and_levels_are_inverse() -> None:
    ve = VE(0.1, 3.0)
    torch.testing.assert_close(ve.time_of_sigma(ve.sigma(TIMES)), TIMES, rtol=1e-12, atol=1e-14)
    assert ve.sigma(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == pytest.approx(
        [0.1, math.sqrt(0.3), 3.0], rel=1e-14
    )


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_small_times_lose_no_digits_in_float32(sde: SDE) -> None:
    t = torch.logspace(-6, 0, 50)
    for low, high in zip(sde.marginal(t), sde.marginal(t.double()), strict=True):
        torch.testing.assert_close(low.double(), high, rtol=3e-6, atol=0)


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_prior_density_is_the_gaussians(sde: SDE) -> None:
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sde.prior_std
    unit = torch.ones((), dtype=torch.float64)
    expected = torch.distributions.Normal(0 * unit, sde.prior_std * unit).log_prob(x).sum((1, 2))
    torch.testing.assert_close(sde.prior_log_prob(x), expected, rtol=1e-12, atol=0)


def test_names_and_bad_arguments() -> None:
    assert sde_from_name("sub-vp", beta_min=0.2, beta_max=10.0) == SubVP(0.2, 10.0)
    assert {type(sde_from_name(n)) for n in ("ve", "vp", "sub-vp", "ou")} == {VE, VP, SubVP, OU}
    with pytest.raises(ValueError, match="one of ve, vp, sub-vp, ou, got 'edm'"):
        sde_from_name("edm")
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max, got 3\.0 and 0\.1"):
        VE(3.0, 0.1)
    with pytest.raises(ValueError, match="theta: expected a positive number"):
        OU(-1.0)
    with pytest.raises(ValueError, match="more than beta_max"):
        VP().discretize(TIMES, 20)
    with pytest.raises(ValueError, match="steps: expected at least 2, got 1"):
        VE().discretize(TIMES, 1)
