"""`qcsbm convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qcsbm_fast.commands.options import option
from qcsbm_fast.train import config_file
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import create, open_run
from qcsbm_fast.train.presets import PRESETS


@dataclass(frozen=True)
class Command:
    """Turn a checkpoint file of score_sde_pytorch or of the authors' code into a run folder, or a run into such a file.

    Weights, averaged weights and Adam's moments go along. The file says nothing of the network's settings: give
    those of the run that made it, as a preset or a YAML file; weights that do not fit are refused by name.

    - qcsbm convert checkpoint_26.pth --preset cifar10 --out runs/theirs
    - qcsbm convert runs/mine --out checkpoint_1.pth
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """File of theirs, or run folder of ours."""
    out: Annotated[Path | None, option("PATH", "(default: RUN/checkpoint.pth, or a new run folder)")] = None
    """File, or folder of the run, to write."""
    config: Annotated[Path | None, option("FILE", "(default: none)")] = None
    """For a file of theirs: YAML file with the settings that differ from the preset's."""
    preset: str = "cifar10"
    """For a file of theirs: settings to start from."""
    step: Annotated[int | None, option("STEP", "(default: the newest)")] = None
    """For a run of ours: the checkpoint to use."""


def run(command: Command) -> None:
    from qcsbm_fast.compat.checkpoint import export_run, import_run

    if command.checkpoint.is_dir():
        folder = open_run(command.checkpoint)
        out = command.out or folder.path / "checkpoint.pth"
        print(f"Step {export_run(folder, out, command.step)}: {out}")
        return
    if not command.checkpoint.is_file():
        raise ConfigError(f"{command.checkpoint}: there is no such file or run folder")
    if command.preset not in PRESETS:
        raise ConfigError(f"--preset: expected one of {', '.join(PRESETS)}, got {command.preset!r}")
    settings = config_file.read(command.config) if command.config else PRESETS[command.preset]
    folder = create(settings, command.out)
    print(f"Step {import_run(command.checkpoint, settings, folder)}: {folder.path}")
    print(f"  qcsbm sample {folder.path}\n  qcsbm train --resume {folder.path}")
