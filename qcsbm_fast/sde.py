"""Forward diffusions with linear drift, their marginals, discretisations and time reversals.

Every process here solves `dx = f(t) x dt + g(t) dw` on `t` in [0, 1], so that

    x_t | x_0  ~  N(m(t) x_0, std(t)^2 I),     x_1  ~  N(0, prior_std^2 I) approximately.

Each function of time takes `t (B,)` in float32 or float64 and computes in that dtype; what it returns is
`(B,)` too, one factor per sample of an `x (B, *)`. Discretisations are those of Song et al. 2021 (arXiv
2011.13456, appendices C and E), with the conventions of their code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qcsbm_fast.random import NoiseStream


class SDE(ABC):
    """A diffusion `dx = f(t) x dt + g(t) dw` on t in [0, 1]."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian that stands for the law of x_1."""

    @abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(m, std)`, each `(B,)`: x_t given x_0 is N(m x_0, std^2 I)."""

    @abstractmethod
    def log_mean(self, t: Tensor) -> Tensor:
        """log m(t) `(B,)`."""

    @abstractmethod
    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """The time `(B,)` at which std / m is `ratio (B,)`."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t) `(B,)`, the factor of x in the drift."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) `(B,)`."""

    def discretize(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """`(f, G)`, each `(B,)`: one of `steps` forward steps is x + f x + G z, z standard normal.

        Euler-Maruyama with step 1/steps, unless the process has a rule of its own.
        """
        _check_steps(steps)
        return self.drift(t) / steps, self.diffusion(t) / math.sqrt(steps)

    def reverse(self, t: Tensor, *, probability_flow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """`(f, b, g)`, each `(B,)`: with the score s, time runs backwards by dx = (f x + b s) dt + g dw.

        b = -g^2 for the stochastic reversal (Anderson 1982), b = -g^2/2 and g = 0 for the probability-flow
        ODE (Song et al. 2021, equations 6 and 13).
        """
        drift, diffusion = self.drift(t), self.diffusion(t)
        return drift, *_reverse_noise(diffusion, probability_flow)

    def reverse_discretize(
        self, t: Tensor, steps: int, *, probability_flow: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(f, b, G)`, each `(B,)`: one reverse step is x - (f x + b s) + G z ("reverse diffusion sampling").

        The reversal of `discretize`: b = -G^2, or b = -G^2/2 and G = 0 for the probability flow (Song et al.
        2021, appendix E).
        """
        drift, diffusion = self.discretize(t, steps)
        return drift, *_reverse_noise(diffusion, probability_flow)

    def prior_sample(
        self, size: Sequence[int], stream: NoiseStream, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw x_1 of shape `size` from N(0, prior_std^2 I), on the stream's device."""
        return stream.normal(size, dtype=dtype) * self.prior_std

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of N(0, prior_std^2 I) at each sample of `x (B, *)`: `(B,)`."""
        flat = x.flatten(1)
        log_normaliser = 0.5 * flat.shape[1] * math.log(2.0 * math.pi * self.prior_std**2)
        return -log_normaliser - flat.square().sum(1) / (2.0 * self.prior_std**2)


@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding: f = 0, std(t) = sigma(t) = sigma_min (sigma_max / sigma_min)^t.

    Raises ValueError unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check_increasing("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level at time t, `(B,)`."""
        return self.sigma_min * torch.exp(self._log_ratio * t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which the noise level is `sigma`, `(B,)`; the inverse of `sigma(t)`."""
        return torch.log(sigma / self.sigma_min) / self._log_ratio

    def log_mean(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return self.time_of_sigma(ratio)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma(t)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2.0 * self._log_ratio)

    def noise_levels(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """`(sigma_i, sigma_{i-1})`, each `(B,)`, of the `steps` geometric levels, i the level of time t.

        Below the lowest level lies noise-free data: sigma_{-1} = 0.
        """
        index = _step_index(t, steps)
        sigma, below = self.sigma(index / (steps - 1)), self.sigma((index - 1) / (steps - 1))
        return sigma, torch.where(index == 0, 0.0, below)

    def discretize(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The SMLD chain: f = 0, G^2 = sigma_i^2 - sigma_{i-1}^2."""
        sigma, below = self.noise_levels(t, steps)
        # the ratio of neighbouring levels is constant: no difference of close squares is taken
        growth = math.sqrt(-math.expm1(-2.0 * self._log_ratio / (steps - 1)))
        return torch.zeros_like(t), torch.where(below == 0, sigma, sigma * growth)


@dataclass(frozen=True)
class _LinearBeta(SDE):
    """What VP and sub-VP share: f = -beta(t)/2 with beta(t) = beta_min + t (beta_max - beta_min)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _check_increasing("beta_min", self.beta_min, "beta_max", self.beta_max)

    @property
    def prior_std(self) -> float:
        return 1.0

    def beta(self, t: Tensor) -> Tensor:
        """beta(t), `(B,)`."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def log_mean(self, t: Tensor) -> Tensor:
        return -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _time_of_log_mean(self, log_mean: Tensor) -> Tensor:
        """The inverse of `log_mean`."""
        root = torch.sqrt(self.beta_min**2 - 4.0 * (self.beta_max - self.beta_min) * log_mean)
        return -4.0 * log_mean / (self.beta_min + root)


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving: f = -beta(t)/2, g^2 = beta(t), beta linear from beta_min to beta_max.

    m(t)^2 + std(t)^2 = 1. Raises ValueError unless 0 < beta_min < beta_max.
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_mean = self.log_mean(t)
        return torch.exp(log_mean), torch.sqrt(-torch.expm1(2.0 * log_mean))

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return self._time_of_log_mean(-0.5 * torch.log1p(ratio.square()))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def step_beta(self, t: Tensor, steps: int) -> Tensor:
        """beta_i `(B,)` of the `steps`-step chain (Ho et al. 2020), i the step of time t.

        Raises ValueError unless steps > beta_max: the chain scales by sqrt(1 - beta_i), and beta_i reaches
        beta_max / steps.
        """
        if steps <= self.beta_max:
            raise ValueError(
                f"steps: expected more than beta_max = {self.beta_max} for a variance-preserving chain, "
                f"got {steps}; take more steps"
            )
        return self.beta(_step_index(t, steps) / (steps - 1)) / steps

    def discretize(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The DDPM chain: f = sqrt(1 - beta_i) - 1, G^2 = beta_i."""
        beta = self.step_beta(t, steps)
        # sqrt(1 - beta) - 1 without the cancellation of writing it so
        return -beta / (1.0 + torch.sqrt(1.0 - beta)), torch.sqrt(beta)


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-variance-preserving: VP's drift and mean, std(t) = 1 - m(t)^2 (Song et al. 2021, appendix B).

    g^2 = beta(t) (1 - m(t)^4). Raises ValueError unless 0 < beta_min < beta_max.
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_mean = self.log_mean(t)
        return torch.exp(log_mean), -torch.expm1(2.0 * log_mean)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return self._time_of_log_mean(-torch.asinh(0.5 * ratio))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(4.0 * self.log_mean(t)))


@dataclass(frozen=True)
class OU(SDE):
    """Ornstein-Uhlenbeck: f = -theta, g = stationary_std sqrt(2 theta), at rest N(0, stationary_std^2 I).

    dX = -X ds + sqrt(2) dW on [0, S], as the theory papers write it, is theta = S here, time being scaled to
    [0, 1]. Raises ValueError unless theta and stationary_std are positive.
    """

    theta: float = 5.0
    stationary_std: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("theta", self.theta), ("stationary_std", self.stationary_std)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")

    @property
    def prior_std(self) -> float:
        return self.stationary_std

    def log_mean(self, t: Tensor) -> Tensor:
        return -self.theta * t

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return torch.log1p((ratio / self.stationary_std).square()) / (2.0 * self.theta)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        std = self.stationary_std * torch.sqrt(-torch.expm1(-2.0 * self.theta * t))
        return torch.exp(-self.theta * t), std

    def drift(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self.theta)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.stationary_std * math.sqrt(2.0 * self.theta))

    def discretize(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The exact transition over a time 1/steps."""
        _check_steps(steps)
        scale = math.expm1(-self.theta / steps)
        noise = self.stationary_std * math.sqrt(-math.expm1(-2.0 * self.theta / steps))
        return torch.full_like(t, scale), torch.full_like(t, noise)


class ScoreFunction(Protocol):
    """A score, and the process it belongs to: what samplers, likelihood and metrics ask of a model."""

    @property
    def sde(self) -> SDE: ...

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor:
        """The score `(B, *)` of the law of x_t at `x (B, *)`, `t (B,)`."""
        ...


@dataclass(frozen=True)
class FunctionScore:
    """A `ScoreFunction` from any function `(x (B, *), t (B,)) -> (B, *)` and the process it belongs to."""

    function: Callable[[Tensor, Tensor], Tensor]
    sde: SDE

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor:
        return self.function(x, t)


_BY_NAME: dict[str, type[SDE]] = {"ve": VE, "vp": VP, "sub-vp": SubVP, "ou": OU}


def sde_from_name(name: str, **params: float) -> SDE:
    """Build a process: "ve", "vp", "sub-vp" or "ou", with its parameters by keyword.

    Raises ValueError for an unknown name and TypeError for a parameter that the process does not have.
    """
    if name not in _BY_NAME:
        raise ValueError(f"sde: expected one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name](**params)


def _reverse_noise(diffusion: Tensor, probability_flow: bool) -> tuple[Tensor, Tensor]:
    if probability_flow:
        return -0.5 * diffusion.square(), torch.zeros_like(diffusion)
    return -diffusion.square(), diffusion


def _step_index(t: Tensor, steps: int) -> Tensor:
    """floor(t (steps - 1)) in t's dtype: which of the chain's `steps` levels time t belongs to.

    A time meant to be i/(steps - 1) may come a few ulp low; the plain floor would then repeat level i - 1.
    """
    _check_steps(steps)
    slack = 4.0 * torch.finfo(t.dtype).eps
    return torch.floor((t + slack) * (steps - 1)).clamp(0, steps - 1)


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")


def _check_increasing(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0.0 < low < high < math.inf:
        raise ValueError(
            f"{low_name}, {high_name}: expected 0 < {low_name} < {high_name}, got {low} and {high}"
        )
