"""Predictor-corrector and probability-flow sampling: `get_sampling_fn`, `get_pc_sampler`, `get_ode_sampler`.

A predictor or corrector is a class with `update_fn(x, t) -> (x, mean)`, found by `get_predictor` and `get_corrector`;
a script's own classes with the same constructor serve as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.compat.models.utils import get_score_fn
from qcsbm_fast.compat.ode import flow, integrate
from qcsbm_fast.compat.sde_lib import ScoreFn, as_process
from qcsbm_fast.random import as_stream
from qcsbm_fast.sampling.predictors import ancestral
from qcsbm_fast.sde import SDE

Sampler = Callable[..., tuple[Tensor, int]]


class Predictor:
    """One step of the reverse-time process of `sde`, or of its probability-flow ODE; noise from torch's generator."""

    def __init__(self, sde: Any, score_fn: ScoreFn, probability_flow: bool = False) -> None:
        self.sde, self.score_fn, self.probability_flow = sde, score_fn, probability_flow
        self.process = _process(sde, score_fn)

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The next `x (B, *)` from the one at `t (B,)`, and its mean before the noise."""
        a, b, c = self._coefficients(t)
        return ops.sde_step(x, self.score_fn(x, t), a, b, c, as_stream(None, x.device).draw())

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(a, b, c)` of the step `a x + b s + c z`."""
        raise NotImplementedError


class EulerMaruyamaPredictor(Predictor):
    """x' = x - (f x - g^2 s) / N + g / sqrt(N) z."""

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drift, weight, noise = self.process.reverse(t, probability_flow=self.probability_flow)
        return 1.0 - drift / self.sde.N, -weight / self.sde.N, noise / math.sqrt(self.sde.N)


class ReverseDiffusionPredictor(Predictor):
    """x' = x - (f x - G^2 s) + G z, with f and G of the forward chain (Song et al. 2021, appendix E)."""

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drift, weight, noise = self.process.reverse_discretize(
            t, self.sde.N, probability_flow=self.probability_flow
        )
        return 1.0 - drift, -weight, noise


class AncestralSamplingPredictor(Predictor):
    """The chain's ancestral sampler, for variance-exploding and -preserving processes."""

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.probability_flow:
            raise ValueError("probability_flow: expected False for ancestral sampling")
        return ancestral(self.process, t, self.sde.N)


class NonePredictor(Predictor):
    """Leaves x as it is."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Corrector:
    """`n_steps` Langevin steps at a fixed t; `snr` sets their size."""

    def __init__(self, sde: Any, score_fn: ScoreFn, snr: float, n_steps: int) -> None:
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps
        self.process = _process(sde, score_fn)

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The next `x (B, *)`, and the mean of the last step before its noise."""
        kept = (1.0 + self.process.discretize(t, self.sde.N)[0]).square()  # the authors' alpha
        mean = x
        for _ in range(self.n_steps):
            x, mean = self._step(x, self.score_fn(x, t), self.process.marginal(t)[1], kept)
        return x, mean

    def _step(self, x: Tensor, score: Tensor, std: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class LangevinCorrector(Corrector):
    """Steps of size 2 alpha (snr mean||z|| / mean||s||)^2 (Song et al. 2021, algorithms 4 and 5)."""

    def _step(self, x: Tensor, score: Tensor, std: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        return ops.langevin_step(x, score, self.snr, kept, as_stream(None, x.device).draw())


class AnnealedLangevinDynamics(Corrector):
    """Steps of size 2 alpha (snr std)^2 (Song & Ermon 2019)."""

    def _step(self, x: Tensor, score: Tensor, std: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        size = 2.0 * kept * (self.snr * std).square()
        state = as_stream(None, x.device).draw()
        return ops.sde_step(x, score, 1.0, size, torch.sqrt(2.0 * size), state)


class NoneCorrector(Corrector):
    """Leaves x as it is."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


_PREDICTORS: dict[str, type[Predictor]] = {
    "euler_maruyama": EulerMaruyamaPredictor,
    "reverse_diffusion": ReverseDiffusionPredictor,
    "ancestral_sampling": AncestralSamplingPredictor,
    "none": NonePredictor,
}
_CORRECTORS: dict[str, type[Corrector]] = {
    "langevin": LangevinCorrector,
    "ald": AnnealedLangevinDynamics,
    "none": NoneCorrector,
}


def get_predictor(name: str) -> type[Predictor]:
    """The predictor called "euler_maruyama", "reverse_diffusion", "ancestral_sampling" or "none"."""
    return _find("predictor", name, _PREDICTORS)


def get_corrector(name: str) -> type[Corrector]:
    """The corrector called "langevin", "ald" or "none"."""
    return _find("corrector", name, _CORRECTORS)


def _find(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def get_sampling_fn(
    config: Any, sde: Any, shape: Sequence[int], inverse_scaler: Callable[[Any], Any], eps: float
) -> Sampler:
    """The sampler that `config.sampling.method` names, "pc" or "ode", with the settings of `config`.

    Raises:
        ValueError: for another method, predictor or corrector.
    """
    c, energy = config.sampling, getattr(config.model, "energy", False)
    method = c.method.lower()
    if method == "ode":
        tolerances = {name: getattr(c, name) for name in ("rtol", "atol") if hasattr(c, name)}
        return get_ode_sampler(
            sde, shape, inverse_scaler, c.noise_removal, eps=eps, device=config.device, energy=energy, **tolerances
        )  # fmt: skip
    if method != "pc":
        raise ValueError(f"config.sampling.method: expected 'pc' or 'ode', got {c.method!r}")
    return get_pc_sampler(
        sde, shape, get_predictor(c.predictor.lower()), get_corrector(c.corrector.lower()), inverse_scaler, c.snr,
        c.n_steps_each, c.probability_flow, config.training.continuous, c.noise_removal, eps, config.device, energy,
        getattr(c, "last_step_snr", 0.036),
    )  # fmt: skip


def get_pc_sampler(
    sde: Any,
    shape: Sequence[int],
    predictor: type[Any] | None,
    corrector: type[Any] | None,
    inverse_scaler: Callable[[Any], Any],
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
    device: Any = "cuda",
    energy: bool = False,
    last_step_snr: float = 0.036,
) -> Sampler:
    """`pc_sampler(model) -> (samples, evaluations)`, samples of shape `shape` after `inverse_scaler`.

    From the prior, N even times run from 1 to `eps`; at each the corrector comes first, then the predictor. `denoise`
    leaves out the noise of the last step; without it, noise of size `2 last_step_snr^2` is added at the end, as in the
    authors' function. None for a predictor or corrector leaves it out. Arguments as `get_score_fn`.
    """
    predictor, corrector = predictor or NonePredictor, corrector or NoneCorrector

    @torch.no_grad()
    def pc_sampler(model: Any) -> tuple[Tensor, int]:
        score = get_score_fn(sde, model, False, continuous, energy, dims=len(shape))
        predict = predictor(sde, score, probability_flow).update_fn
        correct = corrector(sde, score, snr, n_steps).update_fn
        x = mean = _prior(sde, shape, device)
        for time in torch.linspace(1.0, eps, sde.N, dtype=torch.float64).tolist():
            t = x.new_full((shape[0],), time)
            x, mean = correct(x, t)
            x, mean = predict(x, t)
        sample = mean if denoise else x + torch.randn_like(x) * 2 * last_step_snr**2
        return inverse_scaler(sample), sde.N * (n_steps + 1)

    return pc_sampler


def get_ode_sampler(
    sde: Any,
    shape: Sequence[int],
    inverse_scaler: Callable[[Any], Any],
    denoise: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-3,
    device: Any = "cuda",
    energy: bool = False,
) -> Sampler:
    """`ode_sampler(model, z=None) -> (samples, evaluations)` by the probability-flow ODE from time 1 to `eps`.

    `z` of shape `shape` is the starting point, by default a draw from the prior; `method` is one of
    `scipy.integrate.solve_ivp`. `denoise` ends with a reverse diffusion step without its noise.

    Raises:
        RuntimeError: where the solver fails.
    """

    @torch.no_grad()
    def ode_sampler(model: Any, z: Tensor | None = None) -> tuple[Tensor, int]:
        score = get_score_fn(sde, model, False, True, energy, dims=len(shape))
        start = _prior(sde, shape, device) if z is None else z

        def velocity(time: float, state: Tensor) -> Tensor:
            x = state.to(start.dtype)
            t = x.new_full((shape[0],), time)
            return flow(score.sde, x, t, score(x, t))

        end, evaluations = integrate(velocity, start, 1.0, eps, rtol, atol, method)
        x = end.to(start.dtype)
        if denoise:
            t = x.new_full((shape[0],), eps)
            _, x = ReverseDiffusionPredictor(sde, score).update_fn(x, t)
        return inverse_scaler(x), evaluations

    return ode_sampler


def _process(sde: Any, score_fn: ScoreFn) -> SDE:
    return getattr(score_fn, "sde", None) or as_process(sde)


def _prior(sde: Any, shape: Sequence[int], device: Any) -> Tensor:
    return sde.prior_sampling(shape).to(device)
