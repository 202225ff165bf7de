"""How few parts a batch can be worked off in: the memory of a step, from small ones that are measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from qcsbm_fast.memory import available_memory, peak_memory
from qcsbm_fast.train.build import Setup
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.distributed import Processes
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.trainer import Trainer

_USABLE = 0.8  # of the memory that is free: the rest is for evaluation, fragmentation and others


def parts(
    config: Config, setup: Setup, processes: Processes, make_trainer: Callable[[Config], Trainer]
) -> int:
    """The smallest divisor of `optim.batch_size` whose parts fit in memory; `make_trainer` gives one to try steps on.

    A step's memory is a constant and a share for each sample: two small steps tell both.

    Raises:
        ConfigError: where the system does not tell, or one sample for each process is too much.
    """
    device, batch = setup.device, config.optim.batch_size
    room = available_memory(device)
    # with these sizes the penalty's share of the batch is a whole number of samples
    small = max(4, math.ceil(1 / config.penalty.fraction))
    first, second = (_need(config, size, make_trainer, device) for size in (small, 2 * small))
    if room is None or first is None or second is None:
        raise ConfigError("optim.accumulate: 0 needs a system that tells its memory; give a number")
    if device.type == "cpu":  # the processes of a machine share it
        room //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    per_sample = max(0.0, (second - first) / small)
    constant = max(0.0, first - small * per_sample)
    for count in range(1, batch + 1):
        own = math.ceil(batch / count / processes.world)
        fits = constant + own * per_sample <= _USABLE * room
        if batch % count == 0 and batch // count >= processes.world and fits:
            return count
    raise ConfigError(
        f"optim.accumulate: a step of one sample needs about {(constant + per_sample) / 2**20:.0f} MiB, "
        f"{room / 2**20:.0f} MiB are free; use a smaller network"
    )


def _need(
    config: Config, size: int, make_trainer: Callable[[Config], Trainer], device: torch.device
) -> int | None:
    """Bytes that a trainer takes for a step of `size` samples in one part."""
    optim = replace(config.optim, batch_size=size, accumulate=1, cuda_graph="off")

    def take_step() -> None:
        make_trainer(replace(config, optim=optim)).step()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return peak_memory(take_step, device)
