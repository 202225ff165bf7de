"""The precision of a run: the dtype of the network's layers, and for float16 the scale of the loss.

Weights, averages, optimiser, penalty and loss are float32 whatever the precision, on the CPU as on a GPU; activations,
tangents and what flows back through them are in `dtype`. bfloat16 has float32's range. In float16 gradients below 6e-8
vanish: the loss is multiplied by a scale before `backward`, the gradients divided by it after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcsbm_fast.train.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Policy:
    """What a precision means: `autocast` for `Score`, None being float32, and whether the loss is scaled."""

    autocast: torch.dtype | None
    scaled: bool


def policy(precision: Precision, device: torch.device) -> Policy:
    """The policy of `precision` on `device`. Raises ConfigError for float16 on the CPU."""
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("precision: float16 needs a GPU; use bfloat16, which the CPU's kernels take")
    return Policy(_AUTOCAST[precision], scaled=precision == "float16")


class LossScale:
    """The scale of the loss, found as the training goes (Micikevicius et al. 2018), by the rule of
    `torch.amp.GradScaler`.

    It doubles after 2000 finite steps in a row and halves after one that is not, down to 1. Scale and count are tensors
    on the device, changed in place, so that no step waits for them and a CUDA graph can hold them.
    """

    GROWTH, BACKOFF, INTERVAL, LEAST = 2.0, 0.5, 2000, 1.0

    def __init__(self, device: torch.device, start: float = 2.0**16) -> None:
        self.value = torch.full((), start, device=device)
        self._finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def may_be_too_large(self) -> Tensor:
        """Whether gradients that are not finite may be this scale's fault, a boolean scalar."""
        return self.value > self.LEAST

    def update(self, found_inf: Tensor) -> None:
        """Adapt to a step, `found_inf` (scalar) being 1.0 where its gradients were not finite and 0.0 else."""
        torch._amp_update_scale_(  # pyright: ignore[reportPrivateImportUsage]
            self.value, self._finite_steps, found_inf, self.GROWTH, self.BACKOFF, self.INTERVAL
        )
        self.value.clamp_(min=self.LEAST)

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "finite_steps": self._finite_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value.copy_(state["value"])
        self._finite_steps.copy_(state["finite_steps"])
