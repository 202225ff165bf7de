"""Exponential moving average over a list of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """Averages of those `parameters` that require a gradient, in `shadow_params`.

    After update n the average is `average + (1 - d) (parameters - average)` with `d = min(decay, (1 + n) / (10 + n))`,
    or `d = decay` with `use_num_updates=False`. The methods' `parameters` are those of the same model, in its order.

    Raises:
        ValueError: unless 0 <= decay <= 1.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, use_num_updates: bool = True) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
        self.decay = decay
        self.num_updates: int | None = 0 if use_num_updates else None
        self.shadow_params = [p.detach().clone() for p in parameters if p.requires_grad]
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Moves the averages towards `parameters`; call it after each optimiser step."""
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self.shadow_params, self._matching(parameters), 1.0 - decay
        )

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Writes the averages into `parameters`."""
        for parameter, average in zip(self._matching(parameters), self.shadow_params, strict=True):
            parameter.copy_(average)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keeps copies of all `parameters` for `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Writes back what `store` kept."""
        for parameter, kept in zip(parameters, self.collected_params, strict=True):
            parameter.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over averages, decay and count.

        Raises:
            ValueError: if the number or the shapes of the averages differ.
        """
        loaded = state_dict["shadow_params"]
        if [p.shape for p in loaded] != [p.shape for p in self.shadow_params]:
            raise ValueError(
                f"shadow_params: expected {len(self.shadow_params)} tensors of the model's shapes, "
                f"got {len(loaded)}: is this the checkpoint of another model?"
            )
        self.decay, self.num_updates = state_dict["decay"], state_dict["num_updates"]
        self.shadow_params = [
            new.detach().to(old.device, old.dtype, copy=True)
            for new, old in zip(loaded, self.shadow_params, strict=True)
        ]

    def _matching(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [p for p in parameters if p.requires_grad]
