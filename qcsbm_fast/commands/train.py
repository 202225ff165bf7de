"""`qcsbm train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qcsbm_fast.commands.options import FLAT, last_value, option
from qcsbm_fast.train import config_file
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.errors import ConfigError, NonFiniteError, RunError
from qcsbm_fast.train.folder import RunFolder, check_continues, create, open_run
from qcsbm_fast.train.presets import PRESETS


@dataclass(frozen=True)
class Command:
    """Train a score model and leave a run folder with its pictures, numbers and checkpoints.

    Settings come from a preset, then a YAML file if one is given, then the options. The defaults shown are
    those of the preset or file on the command line: try `qcsbm train --preset spirals --help`.

    - qcsbm train
    - qcsbm train --preset checkerboard --kind unconstrained
    - qcsbm train --penalty.fraction 0.5 --steps 2000 --out runs/half
    - qcsbm train --resume runs/half --steps 4000
    - torchrun --nproc-per-node 2 -m qcsbm_fast train
    """

    settings: Annotated[Config, FLAT]
    config: Annotated[Path | None, option("FILE", "(default: none)")] = None
    """YAML file with the settings that differ from the preset's; every run folder has one."""
    out: Annotated[Path | None, option("DIR", "(default: runs/PRESET-KIND-NUMBER)")] = None
    """Folder of the run."""
    resume: Annotated[Path | None, option("RUN", "(default: none)")] = None
    """Go on with this run from its newest checkpoint; its own settings take the place of a preset."""


def defaults(arguments: Sequence[str]) -> Command:
    """The settings of the resumed run, the file or the preset."""
    return Command(settings=_base_settings(arguments))


def _base_settings(arguments: Sequence[str]) -> Config:
    resume, file, preset = (last_value(arguments, name) for name in ("--resume", "--config", "--preset"))
    if preset and preset not in PRESETS:  # the parser will say so
        return PRESETS["digits"]
    if resume:
        for name in ("--config", "--out"):
            if last_value(arguments, name):
                raise ConfigError(f"--resume and {name} exclude each other: a resumed run keeps its own")
        return open_run(Path(resume)).read_config()
    return config_file.read(Path(file), preset) if file else PRESETS[preset or "digits"]


def run(command: Command) -> None:
    from qcsbm_fast.train import build, checkpoint, run
    from qcsbm_fast.train.distributed import processes

    settings = command.settings
    with processes(settings.device, settings.fsdp) as group:
        setup = build.build(settings)  # what is wrong with data or device, before anything is written
        folder = group.share(_folder(command) if group.first else None)
        try:
            run.train(settings, folder, setup, group)
        except NonFiniteError as error:
            have = checkpoint.steps(folder.checkpoints)
            kept = "The last good checkpoint is kept" if have else "No checkpoint yet"
            retry = f"--resume {shlex.quote(str(folder.path))} --optim.lr {settings.optim.lr / 4:g}"
            raise RunError(
                f"{error}\n{kept}; to try again with smaller steps: qcsbm train {retry}"
            ) from error


def _folder(command: Command) -> RunFolder:
    if command.resume is None:
        folder = create(command.settings, command.out)
    else:
        folder = open_run(command.resume)
        check_continues(folder.read_config(), command.settings)
    print(f"Run folder: {folder.path}")
    return folder
