"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from qcsbm_fast.train import shares

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A copy of `source` for evaluation, in `module`, whose parameters follow the source's.

    After update n = 1, 2, ... the average is `average + (1 - d_n) (weights - average)` with
    `d_n = min(decay, (1 + n) / (10 + n))`: the ramp of the authors' code, which forgets the initial weights
    quickly. A decay of 0 keeps the plain weights. Buffers are constants here and are copied once.

    An update is `advance()`, on the host, and `follow()`, on the device, two reads and one write per weight. With
    `capturable` the latter takes d_n from the device, so that a CUDA graph of it may be replayed.

    Of a source whose weights lie in shares among processes the averages do too, after `share`; `whole` is for all.
    """

    def __init__(self, source: M, decay: float, *, capturable: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.module: M = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0
        self._source_module = source
        self._source: list[Tensor] = list(source.parameters())
        self._average: list[Tensor] = list(self.module.parameters())
        self._frame: M | None = None
        self._weight = 0.0
        self._weight_on_device = torch.zeros((), device=self._source[0].device) if capturable else None

    def update(self) -> None:
        """Move the average towards the source's present weights."""
        self.advance()
        self.follow()

    def advance(self) -> None:
        """Count an update."""
        self.updates += 1
        self._weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._weight_on_device is not None:
            self._weight_on_device.fill_(self._weight)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average by the weight of the present update."""
        if self._weight_on_device is None:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                self._average, self._source, self._weight
            )
        elif self.decay == 0.0:
            torch._foreach_copy_(self._average, self._source)  # pyright: ignore[reportPrivateImportUsage]
        else:
            # lerp's many-tensor form takes no weight from the device, this one does: a step of size 1 - d_n down
            # 1/2 ||average - weights||^2, whose gradient is weight decay's less the weights
            torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
                self._average,
                self._source,
                [],
                lr=self._weight_on_device,
                weight_decay=1.0,
                maximize=True,
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                is_first_step=False,
            )

    @torch.no_grad()
    def share(self) -> None:
        """Keep of the averages the shares that the source keeps of its weights."""
        self._frame = copy.deepcopy(self.module)  # without weights: the place of the whole module
        for parameter in self._frame.parameters():
            parameter.data = parameter.data.new_empty(0)
        shares.shard(self.module)
        self._source = [shares.own(p) for p in self._source_module.parameters()]
        self._average = [shares.own(p) for p in self.module.parameters()]

    def whole(self) -> M:
        """The averaged module, gathered where it lies in shares: good until the next call."""
        if self._frame is None:
            return self.module
        state = shares.whole(self.module.state_dict())
        for name, parameter in self._frame.named_parameters():
            parameter.data = state[name]
        return self._frame

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        shares.load(self.module, state["module"])
