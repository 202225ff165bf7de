"""The processes of one training: `torchrun` starts them, each works off its share of every batch.

All hold the whole data set, the same weights (or, with FSDP2, shares of them) and the same streams of noise and data
order, so that one process or many take the same steps, up to the order of sums. The first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from qcsbm_fast.train import shares

T = TypeVar("T")

# The other processes wait while the first one evaluates and draws pictures.
_PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are; every method but the properties must be called by all.

    With `sharded` each holds a share of the weights and not all of them.
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.several:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=device))) if self.several else flag

    def share(self, value: T | None) -> T:
        """What the first process gives, for all."""
        if not self.several:
            return cast(T, value)
        box = [value if self.first else None]
        distributed.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def replicate(self, module: nn.Module) -> nn.Module:
        """`module` with gradients averaged over the processes in `backward`, its weights those of the first.

        The loss must reach every parameter: `backward` raises where it does not.
        """
        if not self.several:
            return module
        if self.sharded:
            shares.shard(module)
            return module
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    @staticmethod
    def apart(module: nn.Module, apart: bool) -> AbstractContextManager[Any]:
        """A context for a backward pass whose gradients are, if `apart`, not exchanged yet."""
        if apart and isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        if hasattr(module, "set_requires_gradient_sync"):  # FSDP2's
            module.set_requires_gradient_sync(not apart)  # pyright: ignore[reportCallIssue]
        return nullcontext()


@contextmanager
def processes(device: str, sharded: bool = False) -> Iterator[Processes]:
    """The processes that torchrun started this one among, or this one alone.

    NCCL connects them where `device` is a GPU, and each takes the GPU of its number on its machine; otherwise gloo.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    try:
        world = distributed.get_world_size()
        yield Processes(distributed.get_rank(), world, sharded and world > 1)
    finally:
        distributed.destroy_process_group()
