"""A step on a GPU recorded once and then replayed as one launch, so that the host's time per operation is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Choice = Literal["auto", "on", "off"]


def wanted(choice: Choice, obstacle: str | None) -> bool:
    """Whether to capture, `obstacle` being why it cannot be, if it cannot. Raises ValueError for "on" with one."""
    if choice == "on" and obstacle:
        raise ValueError(f"cuda_graph: expected 'auto' or 'off', got 'on', but {obstacle}")
    return choice != "off" and obstacle is None


class Replayed:
    """`function(*inputs)`, which returns nothing, as a CUDA graph on `device`.

    The first `warmup` calls run it as it is, on a side stream, so that kernels are tuned and libraries have their
    workspaces; the next records it; from then on a call copies the inputs `(fixed shapes)` into those recorded and
    replays. All calls are ordered on the current stream and do the same, bit for bit, if the function

    * reads and writes tensors on the device only: the host neither waits for their values nor hands in numbers that
      change (those must be written into a tensor first);
    * changes what outlives a call in place: other tensors lie in the graph's own memory, which each replay reuses;
    * draws from a `NoiseStream` on the device, or from torch's default generator, which a graph moves on.
    """

    def __init__(self, function: Callable[..., None], device: torch.device, warmup: int = 2) -> None:
        self._function = function
        self._device = device
        self._warmup = warmup
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        if self._warmup:
            self._warmup -= 1
            beside(lambda: self._function(*inputs), self._device)
            return
        if self._replay is None:
            self._inputs = [value.clone() for value in inputs]
            self._replay = record(lambda: self._function(*self._inputs), self._device)
        for kept, value in zip(self._inputs, inputs, strict=True):
            kept.copy_(value)
        self._replay()


def beside(function: Callable[[], None], device: torch.device) -> None:
    """Run `function` on a side stream, in order with what comes before and after on the current one."""
    with torch.cuda.device(device):
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function()
        current.wait_stream(side)


def record(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What `function` launches on `device`, without running it, as a function that does.

    Raises RuntimeError where it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        function()
    return graph.replay
