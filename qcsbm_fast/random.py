"""Streams of counter-based noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops


class NoiseStream:
    """A seed and a counter of draws, `(seed, offset)`, kept as an int64 tensor on the device.

    Each op that draws noise takes one state and is a pure function of it (Philox4x32-10, see
    `qcsbm_fast.ops.philox`). Taking a state never waits for the device, and a captured CUDA graph or
    compiled region that takes one draws fresh noise each time it runs.

    Args:
        seed: 0 <= seed < 2^63. Streams of different seeds are independent.
        device: where the draws are made.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        if not 0 <= seed < 2**63:
            raise ValueError(f"NoiseStream: seed expected 0 <= seed < 2^63, got {seed}")
        self._state = torch.tensor([seed, 0], dtype=torch.int64, device=device)
        self._next = torch.tensor([0, 1], dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self._state.device

    def draw(self) -> Tensor:
        """The state for one call of an op, int64 `(2,)`; the stream moves on to the next."""
        state = self._state.clone()
        self._state.add_(self._next)
        return state

    def normal(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals of shape `size`."""
        return ops.philox_normal(self.draw(), size, dtype)

    def uniform(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniforms in [0, 1) of shape `size`."""
        return ops.philox_uniform(self.draw(), size, dtype)

    def rademacher(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Signs, -1 or 1, of shape `size`."""
        return ops.rademacher(self.draw(), size, dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self._state.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues where the stream that gave `state` stood, on this stream's device.

        Raises:
            ValueError: unless `state` is what `state_dict()` returns.
        """
        value = state.get("state")
        if (
            set(state) != {"state"}
            or not isinstance(value, Tensor)
            or value.shape != (2,)
            or value.dtype != torch.int64
        ):
            raise ValueError(f"NoiseStream: state expected {{'state': int64 (2,)}}, got {state!r}")
        self._state.copy_(value)


def as_stream(generator: NoiseStream | torch.Generator | None, device: torch.device | str) -> NoiseStream:
    """`generator` itself if it is a stream, else a new stream on `device` with a seed drawn from it.

    None stands for torch's default generator, so that `torch.manual_seed` governs what is drawn.

    Raises:
        ValueError: for a stream on another device.
        TypeError: for anything else.
    """
    if isinstance(generator, NoiseStream):
        wanted = torch.device(device)
        if generator.device.type != wanted.type or wanted.index not in (None, generator.device.index):
            raise ValueError(f"generator: expected a NoiseStream on {device}, got one on {generator.device}")
        return generator
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected NoiseStream, torch.Generator or None, got {type(generator).__name__}"
        )
    where = "cpu" if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=where)
    return NoiseStream(int(seed), device)
