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
# Bytes by which steps must differ: a process's memory moves by some MiB of its own accord.
_TELLING = 32 * 2**20


def parts(
    config: Config, setup: Setup, processes: Processes, make_trainer: Callable[[Config], Trainer]
) -> int:
    """The smallest divisor of `optim.batch_size` whose parts fit in memory; `make_trainer` gives one to try steps on.

    Raises:
        ConfigError: where the system does not tell, or one sample for each process is too much.
    """
    device, batch = setup.device, config.optim.batch_size
    room = available_memory(device)
    law = memory_law(config, device, math.ceil(batch / processes.world), make_trainer)
    if room is None or law is None:
        raise ConfigError("optim.accumulate: 0 needs a system that tells its memory; give a number")
    if device.type == "cpu":  # the processes of a machine share it
        room //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    constant, per_sample = law
    for count in range(1, batch + 1):
        own = math.ceil(batch / count / processes.world)
        fits = constant + own * per_sample <= _USABLE * room
        if batch % count == 0 and batch // count >= processes.world and fits:
            return count
    raise ConfigError(
        f"optim.accumulate: a step of one sample needs about {(constant + per_sample) / 2**20:.0f} MiB, "
        f"{room / 2**20:.0f} MiB are free; use a smaller network"
    )


def memory_law(
    config: Config, device: torch.device, batch: int, make_trainer: Callable[[Config], Trainer]
) -> tuple[float, float] | None:
    """Bytes that a step takes whatever its batch, and for each sample; None where the system does not tell.

    From a small step and the first with two, four, eight, ... times its samples that takes tellingly more, or that has
    `batch` samples.
    """
    # with these sizes the penalty's share of the batch is a whole number of samples
    small = max(4, math.ceil(1 / config.penalty.fraction))
    _need(config, small, make_trainer, device)  # the first step loads libraries too
    first = _need(config, small, make_trainer, device)
    size, grown = small, 0
    while first is not None and (size == small or (size < batch and grown < _TELLING)):
        size *= 2
        grown = (_need(config, size, make_trainer, device) or 0) - first
    if first is None:
        return None
    per_sample = max(0, grown) / (size - small)
    return max(0.0, first - small * per_sample), per_sample


def _need(
    config: Config, size: int, make_trainer: Callable[[Config], Trainer], device: torch.device
) -> int | None:
    """Bytes that a trainer takes for a step of `size` samples in one part."""
    optim = replace(config.optim, batch_size=size, accumulate=1, cuda_graph="off")

    def take_step() -> None:
        make_trainer(replace(config, optim=optim)).step()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return peak_memory(take_step, device)
