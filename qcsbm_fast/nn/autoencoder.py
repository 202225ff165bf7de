"""The one-layer untied autoencoder (Chao et al. 2023, Section 6)."""

from __future__ import annotations

import torch
from torch import nn

from .. import dual
from ..dual import V
from .layers import bias_act


class Autoencoder(nn.Module):
    """`R swish(W^T x + b) + c`, `(B, dim) -> (B, dim)`, for tensors and duals.

    Its Jacobian `R diag(swish') W^T` can be symmetric with `R` different from `W`: a conservative field without tied
    weights. Weights and biases start uniform on [-1, 1].
    """

    def __init__(self, dim: int = 2, hidden: int = 2):
        super().__init__()

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1))

        self.R, self.W = uniform(dim, hidden), uniform(dim, hidden)
        self.b, self.c = uniform(hidden), uniform(dim)

    def forward(self, x: V) -> V:
        hidden = bias_act(dual.linear(x, self.W.T), self.b, None, "swish")
        return dual.linear(hidden, self.R, self.c)
