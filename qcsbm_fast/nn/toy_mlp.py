"""The noise-conditional network of the two-dimensional experiments (Chao et al. 2023, Section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .. import dual, ops
from ..dual import Dual, V
from .layers import Activation, LinearSwish, bias_act

OutputActivation = Literal["identity", "elu", "leaky_relu"]
_WIDTHS = (2, 64, 128, 256, 2)


class ToyMLP(nn.Module):
    """The field `f(x, sigma) = x - act(o(x, sigma))`, `(B, 2), (B,) -> (B, 2)`, for tensors and duals.

    `o = Linear(257, 2)(Swish(h, n))` with `h = (2 -> 64 -> 128 -> 256)(x)`, Swish after each layer, and
    `n = (1 -> 1 -> 1 -> 1)(sigma)`. The concatenation is never formed: `n` carries no tangents.

    Args:
        output_activation: "identity" for a score `f / sigma`; ELU or LeakyReLU (slope 0.1) for an energy
            `||f||^2 / (2 sigma)`.
    """

    def __init__(self, output_activation: OutputActivation = "identity"):
        super().__init__()
        self.trunk = nn.Sequential(LinearSwish(2, 64), LinearSwish(64, 128), LinearSwish(128, 256))
        self.noise = nn.Sequential(LinearSwish(1, 1), LinearSwish(1, 1), nn.Linear(1, 1))
        self.join = nn.Parameter(torch.ones(257))  # the parameter of the Swish over (h, n)
        self.head = nn.Linear(257, 2)
        constant = 0.1 if output_activation == "leaky_relu" else 1.0
        self.output = (
            nn.Identity() if output_activation == "identity" else Activation(2, output_activation, constant)
        )

    def forward(self, x: V, sigma: Tensor) -> V:
        n = bias_act(self.noise(sigma[:, None]), None, self.join[256:], "swish")
        from_noise = n * self.head.weight[:, 256] + self.head.bias
        return x - self.output(self._from_x(x) + from_noise)

    def _from_x(self, x: V) -> V:
        join, head = self.join[:256], self.head.weight[:, :256]
        if x.device.type != "cpu":
            # contiguous: the weight gradient of a slice takes a matrix product five times slower
            return dual.linear(bias_act(self.trunk(x), None, join, "swish"), head.contiguous())
        trunk = [getattr(layer, name) for layer in self.trunk for name in ("weight", "bias", "p")]
        parameters = torch.cat([p.reshape(-1) for p in (*trunk, join, head)])
        if isinstance(x, Dual):
            return Dual(*ops.swish_mlp_jvp(x.primal, x.tangents, parameters, _WIDTHS))
        return ops.swish_mlp(x, parameters, _WIDTHS)
