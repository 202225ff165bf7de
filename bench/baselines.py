"""What we compare with: plain eager PyTorch as the paper describes it, double backward and all."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Swish(nn.Module):
    """`x sigmoid(beta x)`, one learnt beta per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class PlainToyMLP(nn.Module):
    """The 2-D network of the paper, layer by layer: `(B, 2), (B,) -> (B, 2)`, the field `x - o(x, sigma)`."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(2, 64), Swish(64), nn.Linear(64, 128), Swish(128), nn.Linear(128, 256), Swish(256)
        )
        self.noise = nn.Sequential(nn.Linear(1, 1), Swish(1), nn.Linear(1, 1), Swish(1), nn.Linear(1, 1))
        self.join = Swish(257)
        self.head = nn.Linear(257, 2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = torch.cat([self.trunk(x), self.noise(sigma[:, None])], 1)
        return x - self.head(self.join(h))


def noised(
    network: nn.Module, x0: Tensor, sigma_min: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised data as a leaf, its noise levels, the score there and the denoising loss."""
    t = torch.rand(x0.shape[0])
    sigma = sigma_min * ratio**t
    z = torch.randn_like(x0)
    x = (x0 + sigma[:, None] * z).requires_grad_()
    score = network(x, sigma) / sigma[:, None]
    dsm = (sigma[:, None] * score + z).square().sum(1).mean()
    return x, sigma, score, dsm


def exact_jacobian_loss(
    network: nn.Module, x0: Tensor, factor: float, sigma_min: float, ratio: float
) -> Tensor:
    """Denoising loss plus `factor sigma^2 (tr J J^T - tr J J)`, the Jacobian by one differentiable VJP per output."""
    x, sigma, score, dsm = noised(network, x0, sigma_min, ratio)
    rows = [torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0] for i in range(x.shape[1])]
    jacobian = torch.stack(rows, 1)
    penalty = (jacobian * jacobian).sum((1, 2)) - (jacobian * jacobian.transpose(1, 2)).sum((1, 2))
    return dsm + factor * (sigma**2 * penalty).mean()


def nested_loss(network: nn.Module, x0: Tensor, factor: float, sigma_min: float, ratio: float) -> Tensor:
    """The same with the paper's Hutchinson estimator: two nested VJPs, one Rademacher probe."""
    x, sigma, score, dsm = noised(network, x0, sigma_min, ratio)
    v = torch.randint(0, 2, x.shape).to(x.dtype) * 2 - 1
    (once,) = torch.autograd.grad(score, x, v, create_graph=True)
    (twice,) = torch.autograd.grad(score, x, once, create_graph=True)
    penalty = (once.square() - twice * v).sum(1)
    return dsm + factor * (sigma**2 * penalty).mean()
