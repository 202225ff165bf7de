"""The order in which the training set is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.data import as_float


class Batches:
    """Endless batches of `size` samples of `data (N, *)`, each pass over the data in a fresh random order.

    Every batch is full: one that begins at the end of a pass is completed from the next. With `flip` the samples
    are images and each is mirrored left to right with probability 1/2, anew in each pass. Bytes become float32 in
    [0, 1]. Order and mirroring depend on `seed` alone, and the state is the generator's at the start of the pass
    with the position in it.
    """

    def __init__(self, data: Tensor, size: int, seed: int, *, flip: bool = False) -> None:
        if len(data) == 0:
            raise ValueError("data: expected at least one sample, got none")
        self._data = data
        self._size = size
        self._flip = flip
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._pass_state = self._generator.get_state()
        self._order = torch.randperm(len(self._data), generator=self._generator).to(self._data.device)
        if self._flip:
            coins = torch.randint(2, (len(self._data),), generator=self._generator, dtype=torch.bool)
            self._mirrored = coins.to(self._data.device)
        self._position = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Tensor:
        """The next batch, `(size, *)`."""
        chosen: list[Tensor] = []
        mirrored: list[Tensor] = []
        missing = self._size
        while missing:
            if self._position == len(self._order):
                self._begin_pass()
            span = slice(self._position, self._position + missing)
            chosen.append(self._order[span])
            if self._flip:
                mirrored.append(self._mirrored[span])
            self._position += len(chosen[-1])
            missing -= len(chosen[-1])
        batch = as_float(self._data[torch.cat(chosen)])
        if not self._flip:
            return batch
        return torch.where(torch.cat(mirrored)[:, None, None, None], batch.flip(-1), batch)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._pass_state, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())
        self._begin_pass()
        self._position = state["position"]
