"""Denoising score matching with the asymmetry penalty, in one forward and one ordinary backward."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from . import ops
from .ops.registry import accumulate_dtype
from .penalty import Distribution, Estimator, asymmetry, draw_probes
from .random import NoiseStream
from .score import Score

TimeDensity = Literal["uniform", "inverse-sigma"]

# Share of uniform draws in the "inverse-sigma" density: it bounds the weights by 1 / 0.15.
_UNIFORM_SHARE = 0.15


class Objective(NamedTuple):
    """`loss`, a scalar with its graph, and detached scalar statistics.

    `stats`: "loss"; "dsm", the denoising loss; with the penalty also "penalty", the batch mean of
    `sigma^2 1/2 ||A||_F^2` (before the balancing factor), and "asym", the batch mean of `1/2 ||A||_F^2`.
    """

    loss: Tensor
    stats: dict[str, Tensor]


def inclusion_probabilities(weight: Tensor, count: int) -> Tensor:
    """`(N,)` in (0, 1], proportional to `weight` `(N,)` > 0 where that stays below 1, summing to `count` <= N."""
    w, order = torch.sort(weight.double(), descending=True)
    rank = torch.arange(w.shape[0], device=w.device)
    scale = (count - rank) / w.flip(0).cumsum(0).flip(
        0
    )  # if the `rank` heaviest samples are certain to be drawn
    certain = (scale * w > 1).long().cumprod(0).sum()
    share = scale.gather(0, certain.clamp(max=w.shape[0] - 1)[None]) * w
    probability = torch.where(rank < certain, 1.0, share.clamp(max=1.0))
    return torch.empty_like(probability).scatter_(0, order, probability)


def systematic_order(probabilities: Tensor, count: int, u: Tensor) -> Tensor:
    """A permutation of the samples whose first `count` are drawn with the given inclusion probabilities.

    Systematic sampling (Madow 1949): sample i is drawn if an integer lies in `(C_{i-1}, C_i] + u`, `C` the running sum.
    No sample is drawn twice and exactly `count` are, so that shapes stay fixed.
    """
    total = probabilities.cumsum(0)
    total = total * (count / total[-1])
    steps = torch.floor(total + u.double()).clamp(max=count)
    steps[-1:].fill_(count)  # an assignment would copy the number from the host to a GPU
    drawn = torch.diff(steps, prepend=steps.new_zeros(1)) > 0
    return torch.argsort(drawn.long(), descending=True, stable=True)


class DenoisingObjective(nn.Module):
    """Denoising score matching (Vincent 2011) with the quasi-conservative penalty (Chao et al. 2023, equation 13).

    Per sample, with `x_t = m(t) x_0 + sigma(t) z`, `t` uniform on [t_min, 1]:

        c ||sigma s(x_t, t) + z||^2  +  balancing_factor sigma^2 1/2 ||J - J^T||_F^2,   c = 1/2 (or 1: `half=False`).

    With `fraction` below 1 the penalty is evaluated on that share of the batch. The samples are drawn without
    repetition with probabilities `pi` proportional to `time_density` at their times and weighted by `1 / (N pi)`: the
    expected gradient is the full batch's; a density proportional to `1 / sigma` spends the work where `||A||_F^2`
    is large and its variance with it. The drawn samples go through the network as duals, the rest as plain tensors,
    and one `backward()` serves both terms.

    Args:
        score: the model; a conservative one takes no penalty.
        stream: noise of times, perturbations and probes.
        balancing_factor: weight of the penalty; 0 leaves it out.
        probes, estimator, distribution, exact, probe_chunk: as `penalty.asymmetry`.
        fraction: share of the batch that the penalty sees, in (0, 1].
        time_density: "uniform", or "inverse-sigma": 0.15 uniform + 0.85 proportional to `1 / sigma(t)`.
        half: whether the denoising loss carries the factor 1/2.
        likelihood_weighting: weighs the denoising loss by `g(t)^2 / sigma^2` (Song et al. 2021, 2101.09258), so that it
            bounds the negative log-likelihood.
        t_min: smallest time.

    With `shard = (rank, world)` it works off that share of every batch, as one of `world` processes that are given the
    same batches and the same stream: the processes' statistics add up to the whole batch's, and the mean of their
    losses, each `world` times its share, is the whole loss, as DistributedDataParallel takes it.

    Raises:
        ValueError: naming the argument out of range.
    """

    def __init__(
        self,
        score: Score,
        *,
        stream: NoiseStream,
        balancing_factor: float = 0.0,
        probes: int = 1,
        estimator: Estimator = "one_sided",
        distribution: Distribution = "rademacher",
        exact: bool = False,
        probe_chunk: int | None = None,
        fraction: float = 1.0,
        time_density: TimeDensity = "uniform",
        half: bool = True,
        likelihood_weighting: bool = False,
        t_min: float = 1e-5,
    ):
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a share of the batch in (0, 1], got {fraction}")
        if time_density not in get_args(TimeDensity):
            raise ValueError(f"time_density: expected one of {get_args(TimeDensity)}, got {time_density!r}")
        if balancing_factor < 0:
            raise ValueError(f"balancing_factor: expected 0 or more, got {balancing_factor}")
        if balancing_factor > 0 and score.kind == "conservative":
            raise ValueError(
                "balancing_factor: a conservative score has no asymmetry to penalise; set it to 0"
            )
        self.score = score
        self.stream = stream
        self.balancing_factor = balancing_factor
        self.probes = probes
        self.estimator: Estimator = estimator
        self.distribution: Distribution = distribution
        self.exact = exact
        self.probe_chunk = probe_chunk
        self.fraction = fraction
        self.time_density = time_density
        self.coefficient = 0.5 if half else 1.0
        self.likelihood_weighting = likelihood_weighting
        self.t_min = t_min
        self.shard: tuple[int, int] = (0, 1)

    def forward(self, x0: Tensor) -> Objective:
        """Loss of the batch `x0` `(B, *)`; call `backward()` on it once."""
        rank, world = self.shard
        mine = slice(rank, None, world)
        batch = x0.shape[0]
        dtype = accumulate_dtype(x0.dtype)
        t = self.t_min + (1 - self.t_min) * self.stream.uniform((batch,), dtype=dtype)
        mean, sigma = self.score.sde.marginal(t)
        x, z = ops.perturb(x0, mean, sigma, self.stream.draw())
        if self.balancing_factor == 0:
            x, z, t, sigma = x[mine], z[mine], t[mine], sigma[mine]
            dsm = self._denoising(self.score(x, t), z, sigma, t, batch)
            return Objective(dsm * world, {"loss": dsm.detach(), "dsm": dsm.detach()})

        count = max(1, round(self.fraction * batch))
        weight = torch.full_like(sigma, 1 / batch)
        if count < batch:
            density = torch.ones_like(sigma)
            if self.time_density == "inverse-sigma":
                density = _UNIFORM_SHARE + (1 - _UNIFORM_SHARE) * (1 / sigma) / (1 / sigma).mean()
            probability = inclusion_probabilities(density, count)
            order = systematic_order(probability, count, self.stream.uniform((1,)))
            x, z, t, sigma = x[order], z[order], t[order], sigma[order]
            weight = (1 / (batch * probability[order])).to(sigma.dtype)
        v = (
            None
            if self.exact
            else draw_probes(x[:count], self.probes, self.distribution, self.stream)[:, mine]
        )
        if world > 1:  # of the drawn samples and of the others a share each
            x, z, t, sigma, weight = (_share(value, count, mine) for value in (x, z, t, sigma, weight))
            count = len(range(rank, count, world))
        score, penalty, asym, surrogate = self._penalised(x, t, sigma, weight[:count], v)
        dsm = self._denoising(score, z, sigma, t, batch)
        # The value is the penalty's, the gradient the surrogate's.
        term = penalty + (surrogate - surrogate.detach())
        loss = dsm + self.balancing_factor * term
        return Objective(
            loss * world,
            {"loss": loss.detach(), "dsm": dsm.detach(), "penalty": penalty, "asym": asym},
        )

    def _denoising(self, score: Tensor, z: Tensor, sigma: Tensor, t: Tensor, batch: int) -> Tensor:
        weight = torch.full_like(sigma, self.coefficient / batch)
        if self.likelihood_weighting:
            weight = weight * (self.score.sde.diffusion(t) / sigma).square()
        return ops.denoising_residual(score, sigma, weight, z=z).sum()

    def _penalised(
        self, x: Tensor, t: Tensor, sigma: Tensor, weight: Tensor, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The score of all, and weighted sums over the first `len(weight)`: penalty, asymmetry and surrogate."""
        count = weight.shape[0]
        if count == 0:  # more processes than drawn samples
            nothing = weight.sum()
            return self.score(x, t), nothing, nothing, nothing
        result = asymmetry(
            lambda value: self.score(value, t[:count]),
            x[:count],
            estimator=self.estimator,
            exact=self.exact,
            v=v,
            probe_chunk=self.probe_chunk,
        )
        score = result.score
        if count < x.shape[0]:
            score = torch.cat([score, self.score(x[count:], t[count:])])
        scale = weight * sigma[:count] ** 2
        penalty, surrogate = (scale * result.penalty).sum(), (scale * result.surrogate).sum()
        return score, penalty, (weight * result.penalty).sum(), surrogate


def _share(values: Tensor, count: int, mine: slice) -> Tensor:
    return torch.cat([values[:count][mine], values[count:][mine]])
