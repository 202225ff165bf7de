"""Distances between sets of images by the features of a network that the user gives.

With the features of the Inception network that is commonly used these are FID, KID and the Inception score;
with those of another network they are not, and are best called by the names here and that of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


@torch.no_grad()
def extract(network: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 100) -> Tensor:
    """`network` on `images (N, *)`, a batch at a time: `(N, F)` in float64.

    `network` maps `(b, *)` to `(b, F)`: an `nn.Module` in evaluation mode, such as
    `torchmetrics.image.fid.NoTrainInceptionV3`, or any function.
    """
    return torch.cat([network(part).flatten(1).double() for part in images.split(batch_size)])


@torch.no_grad()
def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians fitted to the features `(N, F)` and `(M, F)` (Heusel et
    al. 2017).

        ||mu - mu'||^2 + tr(C + C' - 2 (C C')^{1/2}),

    the trace of the root from the singular values of C^{1/2} C'^{1/2}, in float64; the covariances may be singular.

    Raises ValueError for fewer than two samples in a set, or features of different lengths.
    """
    _check(real, fake)
    means, roots, traces = [], [], []
    for features in (real.double(), fake.double()):
        means.append(features.mean(0))
        centred = (features - means[-1]) / (len(features) - 1) ** 0.5
        roots.append(torch.linalg.qr(centred, mode="r").R)  # R^T R is the covariance
        traces.append(centred.square().sum())
    root = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * root).clamp(min=0).item()


class KernelDistance(NamedTuple):
    """Mean over the subsets, and its standard error."""

    mean: float
    error: float


@torch.no_grad()
def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Squared maximum mean discrepancy of features `(N, F)`, `(M, F)` under (x.y / F + 1)^3 (Binkowski et al. 2018).

    Unbiased, so that it can be negative: the mean over `subsets` random subsets of `size` samples each (all
    of a smaller set).

    Raises ValueError for fewer than two samples in a set, or features of different lengths.
    """
    _check(real, fake)
    size = min(size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a, b = (
            v[torch.randperm(len(v), generator=generator)[:size].to(v.device)].double() for v in (real, fake)
        )
        aa, bb, ab = ((x @ y.T / x.shape[1] + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.diagonal().sum() + bb.sum() - bb.diagonal().sum()) / (size * (size - 1))
        values.append(within - 2.0 * ab.mean())
    found = torch.stack(values)
    error = found.std().item() / subsets**0.5 if subsets > 1 else float("nan")
    return KernelDistance(found.mean().item(), error)


@torch.no_grad()
def classifier_score(logits: Tensor) -> float:
    """exp of the mean divergence KL(p(y | x) || p(y)) of a classifier's `logits (N, classes)` (Salimans et al. 2016).

    From 1, where all images look alike to it, to the number of classes.
    """
    conditional = logits.double().log_softmax(1)
    marginal = conditional.exp().mean(0, keepdim=True).log()
    return (conditional.exp() * (conditional - marginal)).sum(1).mean().exp().item()


def _check(real: Tensor, fake: Tensor) -> None:
    if real.dim() != 2 or fake.dim() != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(
            "real, fake: expected features (N, F) and (M, F) of two samples or more, got "
            f"{tuple(real.shape)} and {tuple(fake.shape)}; see metrics.extract"
        )
