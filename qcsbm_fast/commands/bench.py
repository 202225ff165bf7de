"""`qcsbm bench`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qcsbm_fast.commands.options import option
from qcsbm_fast.train.config import PresetName
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import open_run
from qcsbm_fast.train.presets import PRESETS


@dataclass(frozen=True)
class Command:
    """Profile some steps of training and of sampling, on a GPU where there is one.

    Prints where the time goes, operation by operation, writes tables and traces, and says how to run NVIDIA's
    profilers on the package's kernels.

    - qcsbm bench profile
    - qcsbm bench profile --preset cifar10 --precision bfloat16
    - qcsbm bench profile runs/digits-quasi-conservative-1
    """

    task: Annotated[tyro.conf.Positional[Literal["profile"]], tyro.conf.arg(metavar="profile")]
    """What to do."""
    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """Run folder whose settings to take."""
    preset: Annotated[PresetName | None, option("PRESET", "(default: digits)")] = None
    """Settings to take where there is no run."""
    steps: int = 5
    """Steps of each that are profiled."""
    batch_size: Annotated[int | None, option("INT", "(default: the settings')")] = None
    """Samples in a step."""
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, option("NAME", "(default: the settings')")
    ] = None
    """Precision of the network's layers."""
    device: str = "auto"
    """auto: a GPU where there is one, otherwise the CPU; or a torch device such as cpu or cuda:1."""
    out: Path = Path("runs/profile")
    """Folder for tables and traces."""
    bare: bool = False
    """Only run the steps, between the marks that ncu and nsys look for."""

    def __post_init__(self) -> None:
        if self.run is not None and self.preset is not None:
            raise ConfigError("RUN and --preset exclude each other: a run has its own settings")
        if self.steps < 2:
            raise ConfigError(f"--steps should be 2 or more, got {self.steps}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size should be 1 or more, got {self.batch_size}")


def run(command: Command) -> None:
    from qcsbm_fast.train import profiling

    config = (
        PRESETS[command.preset or "digits"] if command.run is None else open_run(command.run).read_config()
    )
    size = command.batch_size or config.optim.batch_size
    config = replace(
        config,
        device=command.device,
        precision=command.precision or config.precision,
        optim=replace(
            config.optim,
            batch_size=size,
            accumulate=1 if command.batch_size else max(1, config.optim.accumulate),
        ),
    )
    if command.bare:
        profiling.bare(config, command.steps)
        return
    profiling.measure(config, command.steps, command.out)
    arguments = [str(command.run)] if command.run else ["--preset", config.preset]
    for name in ("batch_size", "precision"):
        if getattr(command, name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(getattr(command, name))]
    print("\nOn a machine with an NVIDIA GPU, the package's kernels one by one and the whole timeline:")
    for line in profiling.recipes(arguments, command.out):
        print(f"  {line}")
