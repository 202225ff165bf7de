"""What a researcher's script brings along: an SDE and a network of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class VESDE:
    """A variance-exploding SDE as a script may define it: nothing of ours in it."""

    T = 1

    def __init__(self, sigma_min: float = 0.3, sigma_max: float = 3.0, N: int = 50) -> None:
        self.sigma_min, self.sigma_max, self.N = sigma_min, sigma_max, N
        self.discrete_sigmas = torch.exp(torch.linspace(math.log(sigma_min), math.log(sigma_max), N))

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), self.marginal_prob(x, t)[1] * math.sqrt(2 * math.log(10.0))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        index = (t * (self.N - 1)).long()
        below = torch.where(index == 0, torch.zeros_like(t), self.discrete_sigmas[index - 1].to(t))
        return torch.zeros_like(x), (self.discrete_sigmas[index].to(t) ** 2 - below**2).sqrt()

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z: Tensor) -> Tensor:
        n = z[0].numel()
        return -n / 2 * math.log(2 * math.pi * self.sigma_max**2) - (z**2).sum((1, 2, 3)) / (
            2 * self.sigma_max**2
        )


class Network(nn.Module):
    """Convolutions, group norm, attention over pixels and a noise embedding; output divided by sigma as in NCSN++."""

    def __init__(self, channels: int = 2, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.embed = nn.Linear(1, width)
        self.norm = nn.GroupNorm(4, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.register_buffer("sigmas", torch.ones(3))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.first(x) + self.embed(labels.to(x.dtype).log()[:, None])[:, :, None, None]
        h = nn.functional.silu(self.norm(h))
        q, k, v = self.qkv(h).flatten(2).chunk(3, 1)
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 3, -1)
        h = h + torch.einsum("bnm,bcm->bcn", weights, v).view_as(h)
        return self.last(h) / column(labels.to(x.dtype))


def network(seed: int = 0, scale: float = 1.0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


class Renamed:
    """The methods of an SDE under a name that says nothing of the model's conventions."""

    def __init__(self) -> None:
        inner = VESDE()
        self.N, self.marginal_prob, self.sde = inner.N, inner.marginal_prob, inner.sde
        self.discretize, self.prior_logp = inner.discretize, inner.prior_logp
