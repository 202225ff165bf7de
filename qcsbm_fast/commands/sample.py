"""`qcsbm sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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
    - qcsbm sample runs/digits-quasi-conservative-1 --sampler ode --out picture.png --gif

    Long jobs are drawn in batches; interrupted, the same command goes on with the first that is missing. Several
    processes or machines with one file system share a job:

    - qcsbm sample RUN --count 50000 --shard 0/4 (and 1/4, 2/4, 3/4)
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    sampling: Annotated[Sampling, FLAT]
    out: Annotated[Path | None, option("FILE", "(default: RUN/drawn-STEP-SAMPLER.png)")] = None
    """PNG picture to write."""
    checkpoint: Annotated[int | Literal["best"] | None, option("STEP|best", "(default: the newest)")] = None
    """Step of the checkpoint to use, or best, that of the lowest held-out loss."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """auto: a GPU where there is one, otherwise the CPU; or a torch device such as cpu or cuda:1."""
    batch_size: Annotated[int | None, option("INT", "(default: 256 images, 10000 points)")] = None
    """Samples drawn at once."""
    shard: Annotated[str, option("I/N", "(default: 0/1, all)")] = "0/1"
    """Draw only the batches I, I + N, I + 2 N, ...; the process that draws the last one writes the files."""
    gif: bool = False
    """Also write a GIF of how the first batch comes into being."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed should be 0 or more and below 2^63, got {self.seed}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size should be 1 or more, got {self.batch_size}")
        index, count = self.share
        if not 0 <= index < count:
            raise ConfigError(f"--shard should be I/N with 0 <= I < N, such as 0/4, got {self.shard}")

    @property
    def share(self) -> tuple[int, int]:
        """I and N of `shard`; (0, 0) where it is not of that form."""
        index, _, count = self.shard.partition("/")
        return (int(index), int(count)) if index.isdecimal() and count.isdecimal() else (0, 0)


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
        batch_size=command.batch_size,
        shard=sample.Shard(*command.share),
        gif=command.gif,
    )
    if picture is None:
        print(f"Shard {command.shard} is done; the samples are written when the other shards are")
    else:
        print(f"{command.sampling.count} samples: {picture} and {picture.with_suffix('.npz')}")
