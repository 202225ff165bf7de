"""`qcsbm sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qcsbm_fast.commands.options import FLAT, option
from qcsbm_fast.train.config import Sampling
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import open_run
from qcsbm_fast.train.presets import PRESETS


@dataclass(frozen=True)
class Command:
    """Draw samples from a trained model, as a PNG picture and as the array `samples` in an .npz file.

    The averaged weights of the newest checkpoint are used. The defaults shown are the run's own once RUN is
    on the command line.

    - qcsbm sample runs/digits-quasi-conservative-1 --count 25
    - qcsbm sample runs/digits-quasi-conservative-1 --sampler ode --out picture.png
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    sampling: Annotated[Sampling, FLAT]
    out: Annotated[Path | None, option("FILE", "(default: RUN/drawn-STEP-SAMPLER.png)")] = None
    """PNG picture to write."""
    checkpoint: Annotated[int | None, option("STEP", "(default: the newest)")] = None
    """Step of the checkpoint to use."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """auto: a GPU where there is one, otherwise the CPU; or a torch device such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed should be 0 or more and below 2^63, got {self.seed}")


def defaults(arguments: Sequence[str]) -> Command:
    """How the run on the command line draws samples itself."""
    for argument in arguments:
        if (Path(argument) / "config.yaml").is_file():
            return Command(tyro.MISSING, open_run(Path(argument)).read_config().sampling)
    return Command(tyro.MISSING, PRESETS["digits"].sampling)


def run(command: Command) -> None:
    from qcsbm_fast.train import sample

    picture = sample.sample(
        open_run(command.run),
        command.sampling,
        step=command.checkpoint,
        out=command.out,
        seed=command.seed,
        device=command.device,
    )
    print(f"{command.sampling.count} samples: {picture} and {picture.with_suffix('.npz')}")
