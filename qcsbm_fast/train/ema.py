"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A copy of `source` for evaluation, in `module`, whose parameters follow the source's.

    After update n = 1, 2, ... the average is `average + (1 - d_n) (weights - average)` with
    `d_n = min(decay, (1 + n) / (10 + n))`: the ramp of the authors' code, which forgets the initial weights
    quickly. A decay of 0 keeps the plain weights. Buffers are constants here and are copied once.
    """

    def __init__(self, source: M, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.module: M = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0
        self._source: list[Tensor] = list(source.parameters())
        self._average: list[Tensor] = list(self.module.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the source's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._average, self._source, 1.0 - decay
        )

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.module.load_state_dict(state["module"])
