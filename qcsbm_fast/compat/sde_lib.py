"""Forward processes as objects with a number of steps: `VESDE`, `VPSDE`, `subVPSDE` (Song et al. 2021).

Each holds one of the processes of `qcsbm_fast.sde` as `process`. `as_process` turns any object with the same methods,
ours or a script's own, into such a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from qcsbm_fast import sde as processes
from qcsbm_fast.ops.registry import per_row

ScoreFn = Callable[[Tensor, Tensor], Tensor]
Family = Literal["ve", "vp", "sub-vp"]

_FAMILIES: dict[str, Family] = {"VESDE": "ve", "VPSDE": "vp", "subVPSDE": "sub-vp"}


class SDE:
    """`process` on t in [0, T = 1], cut into `N` steps."""

    def __init__(self, process: processes.SDE, N: int) -> None:
        self.process = process
        self.N = N

    @property
    def T(self) -> float:
        return 1

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift `(B, *)` and diffusion `(B,)` at `x (B, *)`, `t (B,)`."""
        return per_row(self.process.drift(t), x) * x, self.process.diffusion(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(B, *)` and standard deviation `(B,)` of x_t given x_0 = x."""
        mean, std = self.process.marginal(t)
        return per_row(mean, x) * x, std

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`f (B, *)` and `G (B,)`: one of N steps is x + f + G z."""
        f, noise = self.process.discretize(t, self.N)
        return per_row(f, x) * x, noise

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        """Draws x_1 with torch's generator, on the CPU."""
        return torch.randn(*shape) * self.process.prior_std

    def prior_logp(self, z: Tensor) -> Tensor:
        """Log-density of x_1 in nats, `(B,)`."""
        return self.process.prior_log_prob(z)

    def reverse(self, score_fn: ScoreFn, probability_flow: bool = False) -> ReverseSDE:
        """The same process backwards in time, or its probability-flow ODE."""
        return ReverseSDE(self, score_fn, probability_flow)


class ReverseSDE:
    """What `SDE.reverse` returns; equations 6 and 13, and appendix E, of Song et al. 2021."""

    def __init__(self, forward: SDE, score_fn: ScoreFn, probability_flow: bool) -> None:
        self.forward = forward
        self.score_fn = score_fn
        self.probability_flow = probability_flow
        self.N = forward.N

    @property
    def T(self) -> float:
        return self.forward.T

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift `(B, *)` and diffusion `(B,)`, zero for the ODE."""
        return self._with_score(x, t, self.forward.process.reverse(t, probability_flow=self.probability_flow))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`f (B, *)` and `G (B,)`: one step back is x - f + G z."""
        process = self.forward.process
        step = process.reverse_discretize(t, self.N, probability_flow=self.probability_flow)
        return self._with_score(x, t, step)

    def _with_score(
        self, x: Tensor, t: Tensor, factors: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        drift, weight, noise = factors
        return per_row(drift, x) * x + per_row(weight, x) * self.score_fn(x, t), noise


class VESDE(SDE):
    """Variance exploding. `discrete_sigmas (N,)` rise from sigma_min to sigma_max."""

    process: processes.VE

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50, N: int = 1000) -> None:
        super().__init__(processes.VE(sigma_min, sigma_max), N)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.discrete_sigmas = self.process.sigma(torch.linspace(0, 1, N, dtype=torch.float64)).float()


class VPSDE(SDE):
    """Variance preserving, with the constants of its N-step chain (Ho et al. 2020) as tensors `(N,)`."""

    process: processes.VP

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000) -> None:
        super().__init__(processes.VP(beta_min, beta_max), N)
        self.beta_0, self.beta_1 = beta_min, beta_max
        betas = torch.linspace(beta_min / N, beta_max / N, N, dtype=torch.float64)
        log_kept = torch.log1p(-betas).cumsum(0)
        self.discrete_betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = log_kept.exp().float()
        self.sqrt_alphas_cumprod = (log_kept / 2).exp().float()
        self.sqrt_1m_alphas_cumprod = (-torch.expm1(log_kept)).sqrt().float()


class subVPSDE(SDE):
    """Sub-variance-preserving."""

    process: processes.SubVP

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000) -> None:
        super().__init__(processes.SubVP(beta_min, beta_max), N)
        self.beta_0, self.beta_1 = beta_min, beta_max


class _Foreign(processes.SDE):
    """A process read off an object's `marginal_prob`, `sde` and `discretize`; its drift must be linear in x."""

    def __init__(self, sde: Any, dims: int) -> None:
        self._sde = sde
        self._shape = (1,) * (dims - 1)

    def _ones(self, t: Tensor) -> Tensor:
        return t.new_ones(t.shape[0], *self._shape)

    @property
    def prior_std(self) -> float:
        # the density of N(0, s^2) at 0 is 1 / (s sqrt(2 pi))
        log_density = float(self._sde.prior_logp(torch.zeros(1, *self._shape)))
        return math.exp(-log_density) / math.sqrt(2 * math.pi)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._sde.marginal_prob(self._ones(t), t)
        return mean.flatten(), std

    def log_mean(self, t: Tensor) -> Tensor:
        return self.marginal(t)[0].log()

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
        for _ in range(60):  # bisection: the ratio rises with time
            middle = (low + high) / 2
            mean, std = self.marginal(middle)
            below = std / mean < ratio
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def drift(self, t: Tensor) -> Tensor:
        return self._sde.sde(self._ones(t), t)[0].flatten()

    def diffusion(self, t: Tensor) -> Tensor:
        return self._sde.sde(self._ones(t), t)[1]

    def discretize(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        if steps != self._sde.N:
            raise ValueError(f"steps: expected the sde's own N = {self._sde.N}, got {steps}")
        f, noise = self._sde.discretize(self._ones(t), t)
        return f.flatten(), noise


def family(sde: Any) -> Family | None:
    """Which of the three processes `sde` is, by the name of its class or of one it derives from."""
    return next((_FAMILIES[c.__name__] for c in type(sde).__mro__ if c.__name__ in _FAMILIES), None)


def as_process(sde: Any, dims: int = 4) -> processes.SDE:
    """The process of `sde`: itself, its `process`, ours with its constants, or one that asks its methods.

    An object of a known class that has changed its marginals is not taken for what its name says.

    Args:
        sde: one of `qcsbm_fast.sde`, of this file, or a script's own.
        dims: dimensions of a batch, 4 for images.

    Raises:
        TypeError: if `sde` lacks the methods of such an object.
    """
    if isinstance(sde, processes.SDE):
        return sde
    if isinstance(sde, SDE):
        return sde.process
    missing = [name for name in ("marginal_prob", "sde", "discretize", "N") if not hasattr(sde, name)]
    if missing:
        raise TypeError(f"sde: expected marginal_prob, sde, discretize and N, got {type(sde).__name__} "
                        f"without {', '.join(missing)}")  # fmt: skip
    foreign = _Foreign(sde, dims)
    ours = _ours(sde)
    t = torch.linspace(0.1, 1.0, 4)
    if ours is not None and all(
        torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours.marginal(t), foreign.marginal(t), strict=True)
    ):
        return ours
    return foreign


def _ours(sde: Any) -> processes.SDE | None:
    names = ("sigma_min", "sigma_max") if family(sde) == "ve" else ("beta_0", "beta_1")
    if family(sde) is None or not all(hasattr(sde, name) for name in names):
        return None
    low, high = (float(getattr(sde, name)) for name in names)
    return {"ve": processes.VE, "vp": processes.VP, "sub-vp": processes.SubVP}[family(sde) or ""](low, high)
