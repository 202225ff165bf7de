"""Sampling and likelihood under the authors' names, against Gaussians in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcsbm_fast import sde
from qcsbm_fast.compat import likelihood, sampling, sde_lib

MEAN, STD = 0.3, 0.4  # of the data, in every dimension
SHAPE = (2000, 1, 1, 2)


class GaussianScore(nn.Module):
    """What a network trained on N(MEAN, STD^2) would return, in the conventions of its process."""

    def __init__(self, process: sde.SDE) -> None:
        super().__init__()
        self.process = process

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        exploding = isinstance(self.process, sde.VE)
        t = self.process.time_of_sigma(labels) if isinstance(self.process, sde.VE) else labels / 999
        m, s = (value[:, None, None, None] for value in self.process.marginal(t))
        score = -(x - m * MEAN) / (m**2 * STD**2 + s**2)
        return score if exploding else -score * s


class Foreign:
    """A script's own SDE: the class name and the methods, nothing of ours."""

    def __init__(self, inner: Any) -> None:
        for name in ("N", "marginal_prob", "sde", "discretize", "prior_sampling", "prior_logp"):
            setattr(self, name, getattr(inner, name))


PROCESSES = {
    "ve": sde_lib.VESDE(0.01, 10.0, 100),
    "vp": sde_lib.VPSDE(N=200),
    "sub-vp": sde_lib.subVPSDE(N=200),
}


def samples(name: str, *arguments: Any, foreign: bool = False, **settings: Any) -> Tensor:
    torch.manual_seed(0)
    process: Any = PROCESSES[name]
    model = GaussianScore(process.process)
    if foreign:
        process = type(type(process).__name__, (Foreign,), {})(process)
    settings = {"continuous": True, "eps": 1e-3, "device": "cpu", **settings}
    draw = sampling.get_pc_sampler(process, SHAPE, *arguments, lambda x: x, 0.16, **settings)
    result, evaluations = draw(model)
    assert evaluations == 2 * process.N
    return result


def assert_gaussian(x: Tensor, bias: float, std: float = STD) -> None:
    """Mean and deviation within `bias` and 5 standard errors of 4000 independent numbers."""
    error = 5 * std / math.sqrt(x.numel())
    assert x.mean().item() == pytest.approx(MEAN, abs=bias + error)
    assert x.std().item() == pytest.approx(std, abs=bias + error)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"])
@pytest.mark.parametrize("corrector", ["none", "langevin", "ald"])
def test_samples_of_a_gaussian(name: str, predictor: str, corrector: str) -> None:
    parts = sampling.get_predictor(predictor), sampling.get_corrector(corrector)
    if name == "sub-vp" and predictor == "ancestral_sampling":
        with pytest.raises(ValueError, match="defined for VE and VP"):
            samples(name, *parts)
        return
    x = samples(name, *parts)
    assert_gaussian(x, bias=0.04)  # of first order in the step
    if corrector == "none" and predictor != "ancestral_sampling":
        assert torch.equal(samples(name, *parts), x)  # torch's seed governs the noise
        torch.testing.assert_close(samples(name, *parts, foreign=True), x, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_flow_keeps_ranks_and_counts_evaluations(name: str) -> None:
    """dx/dt of a Gaussian is linear: x(eps) is the affine map of z with the marginals' moments."""
    process = PROCESSES[name]
    draw = sampling.get_ode_sampler(
        process, (5, 1, 1, 2), lambda x: 2 * x, rtol=1e-6, atol=1e-8, device="cpu"
    )
    z = torch.randn(5, 1, 1, 2)
    x, evaluations = draw(GaussianScore(process.process), z)
    (m0, m1), (s0, s1) = process.process.marginal(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    ratio = ((m0 * STD) ** 2 + s0**2).sqrt() / ((m1 * STD) ** 2 + s1**2).sqrt()
    torch.testing.assert_close(x, 2 * (m0 * MEAN + ratio * (z - m1 * MEAN)).float(), rtol=2e-3, atol=2e-3)
    assert 20 < evaluations < 2000


def test_without_denoising_noise_comes_last() -> None:
    settings: dict[str, Any] = {"n_steps": 1, "last_step_snr": 1.0, "denoise": False}
    x = samples("ve", sampling.get_predictor("reverse_diffusion"), None, **settings)
    assert_gaussian(x, bias=0.05, std=math.sqrt(STD**2 + 2**2))


def test_probability_flow_of_the_predictors_draws_no_noise() -> None:
    process, x = PROCESSES["ve"], torch.randn(3, 1, 1, 2)
    score = lambda y, t: -y  # noqa: E731
    for make in (sampling.EulerMaruyamaPredictor, sampling.ReverseDiffusionPredictor):
        after, mean = make(process, score, True).update_fn(x, torch.full((3,), 0.5))
        assert torch.equal(after, mean)
        assert (after != x).all()
    with pytest.raises(ValueError, match="probability_flow: expected False"):
        sampling.AncestralSamplingPredictor(process, score, True).update_fn(x, torch.ones(3))


def config(**changes: Any) -> Any:
    settings = {
        "method": "pc", "predictor": "Reverse_Diffusion", "corrector": "Langevin", "snr": 0.16, "n_steps_each": 1,
        "probability_flow": False, "noise_removal": True, **changes,
    }  # fmt: skip
    return SimpleNamespace(
        sampling=SimpleNamespace(**settings),
        training=SimpleNamespace(continuous=True),
        model=SimpleNamespace(),
        device="cpu",
    )


def test_the_configured_sampler() -> None:
    process = PROCESSES["ve"]
    model = GaussianScore(process.process)
    for method in ("pc", "ODE"):
        torch.manual_seed(1)
        draw = sampling.get_sampling_fn(config(method=method), process, SHAPE, lambda x: x, 1e-3)
        assert_gaussian(draw(model)[0], bias=0.04)
    for changes, message in (
        ({"method": "mcmc"}, "expected 'pc' or 'ode', got 'mcmc'"),
        ({"predictor": "heun"}, "predictor: expected one of euler_maruyama, .*, got 'heun'"),
        ({"corrector": "mala"}, "corrector: expected one of langevin, ald, none, got 'mala'"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.get_sampling_fn(config(**changes), process, SHAPE, lambda x: x, 1e-3)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", ["Rademacher", "Gaussian"])
def test_likelihood_of_a_gaussian(name: str, kind: str) -> None:
    """Closed form; a multiple of the identity as Jacobian makes Rademacher probes exact."""
    process = PROCESSES[name]
    eps = 1e-3
    evaluate = likelihood.get_likelihood_fn(process, lambda x: (x + 1) / 2, kind, 1e-6, 1e-8, eps=eps)
    torch.manual_seed(0)
    count = 4 if kind == "Rademacher" else 400
    x = torch.randn(1, 1, 1, 2).expand(count, -1, -1, -1) * STD + MEAN
    bits, z, evaluations = evaluate(GaussianScore(process.process), x)
    times = torch.tensor([eps, 1.0], dtype=torch.float64)
    (m0, m1), (s0, s1) = process.process.marginal(times)
    v0, v1 = (m0 * STD) ** 2 + s0**2, (m1 * STD) ** 2 + s1**2
    expected_z = m1 * MEAN + (v1 / v0).sqrt() * (x[0].double() - m0 * MEAN)
    torch.testing.assert_close(z[0].double(), expected_z, rtol=1e-3, atol=1e-3)
    # the model's density at eps, with the prior in place of the law at time 1
    nats = process.process.prior_log_prob(expected_z[None]) + (v1 / v0).log()
    expected = (-nats / (2 * math.log(2)) + 7).item()
    spread = 0.0 if kind == "Rademacher" else 5 * bits.std().item() / math.sqrt(count)
    assert bits.mean().item() == pytest.approx(expected, abs=2e-3 + spread)
    assert evaluations > 20
    with pytest.raises(NotImplementedError, match="expected one of Rademacher, Gaussian, got 'Sign'"):
        likelihood.get_likelihood_fn(process, lambda x: x, "Sign")


class EnergyField(nn.Module):
    """f with -grad ||f||^2 / (2 sigma) the score of the noised Gaussian data."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (x - MEAN) * (sigma / (STD**2 + sigma**2)).sqrt()[:, None, None, None]


def test_an_energy_is_sampled_and_measured_as_its_score() -> None:
    process = PROCESSES["ve"]
    field, score = EnergyField(), GaussianScore(process.process)
    z = torch.randn(6, 1, 1, 2)
    flows = [
        sampling.get_ode_sampler(process, z.shape, lambda x: x, True, device="cpu", energy=energy)(model, z)[
            0
        ]
        for model, energy in ((field, True), (score, False))
    ]
    torch.testing.assert_close(*flows, rtol=1e-4, atol=1e-5)
    bits = []
    for model, energy in ((field, True), (score, False)):
        torch.manual_seed(0)
        bits.append(likelihood.get_likelihood_fn(process, lambda x: x, energy=energy)(model, z)[0])
    torch.testing.assert_close(*bits, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"continuous": True, "device": "cpu", "energy": True}
    euler = sampling.get_predictor("euler_maruyama")
    draw = sampling.get_pc_sampler(process, SHAPE, euler, None, lambda x: x, 0.16, **settings)
    assert_gaussian(draw(field)[0], bias=0.04)
