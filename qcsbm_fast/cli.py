"""The command line: `qcsbm train`, `qcsbm sample`, `qcsbm reproduce`, `qcsbm info`.

What a command needs is imported when it runs, so that help and errors come quickly.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ValidationError

from qcsbm_fast.train import config_file
from qcsbm_fast.train.config import Config, Kind, Sampling, describe
from qcsbm_fast.train.errors import ConfigError, NonFiniteError, RunError
from qcsbm_fast.train.folder import check_continues, create, open_run
from qcsbm_fast.train.presets import PRESETS

Density = Literal["checkerboard", "eight-gaussians", "spirals"]

_NOT_TOLD = ("For full help", "Argument help")
_Flat = tyro.conf.arg(name="")
_DESCRIPTION = """Quasi-conservative score-based generative models: train, sample, look.

Start with `qcsbm train`: two minutes on two cores, on scikit-learn's handwritten digits."""


def _option(metavar: str, default: str) -> object:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default)


@dataclass(frozen=True)
class Train:
    """Train a score model and leave a run folder with its pictures, numbers and checkpoints.

    Settings come from a preset, then a YAML file if one is given, then the options. The defaults shown are
    those of the preset or file on the command line: try `qcsbm train --preset spirals --help`.

    - qcsbm train
    - qcsbm train --preset checkerboard --kind unconstrained
    - qcsbm train --penalty.fraction 0.5 --steps 2000 --out runs/half
    - qcsbm train --resume runs/half --steps 4000
    """

    settings: Annotated[Config, _Flat]
    config: Annotated[Path | None, _option("FILE", "(default: none)")] = None
    """YAML file with the settings that differ from the preset's; every run folder has one."""
    out: Annotated[Path | None, _option("DIR", "(default: runs/PRESET-KIND-NUMBER)")] = None
    """Folder of the run."""
    resume: Annotated[Path | None, _option("RUN", "(default: none)")] = None
    """Go on with this run from its newest checkpoint; its own settings take the place of a preset."""


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained model, as a PNG picture and as the array `samples` in an .npz file.

    The averaged weights of the newest checkpoint are used. The defaults shown are the run's own once RUN is
    on the command line.

    - qcsbm sample runs/digits-quasi-conservative-1 --count 25
    - qcsbm sample runs/digits-quasi-conservative-1 --sampler ode --out picture.png
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    sampling: Annotated[Sampling, _Flat]
    out: Annotated[Path | None, _option("FILE", "(default: RUN/drawn-STEP-SAMPLER.png)")] = None
    """PNG picture to write."""
    checkpoint: Annotated[int | None, _option("STEP", "(default: the newest)")] = None
    """Step of the checkpoint to use."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """auto: a GPU where there is one, otherwise the CPU; or a torch device such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed should be 0 or more and below 2^63, got {self.seed}")


@dataclass(frozen=True)
class Reproduce:
    """Run an experiment of the paper: train its models, print their table, draw its figures.

    toy2d, Section 3.2: unconstrained, conservative and quasi-conservative models of 2-D densities, with
    negative log-likelihood, score error, Asym, NAsym, precision and recall. Interrupted, the same command
    goes on where it stopped.

    - qcsbm reproduce toy2d
    - qcsbm reproduce toy2d --densities checkerboard --seeds 0 1 2 --factors 0.1 1 10
    - qcsbm reproduce toy2d --steps 500 --out runs/quick-look
    """

    experiment: tyro.conf.Positional[Literal["toy2d"]]
    """Which experiment."""
    densities: tuple[Density, ...] = ("checkerboard", "eight-gaussians", "spirals")
    """Data sets."""
    kinds: tuple[Kind, ...] = ("unconstrained", "conservative", "quasi-conservative")
    """Kinds of models."""
    seeds: tuple[int, ...] = (0,)
    """One training for each; with several the table shows the spread."""
    factors: tuple[float, ...] = (0.1,)
    """Balancing factors of the quasi-conservative models: the first for the table, all for the curve."""
    steps: Annotated[int | None, _option("INT", "(default: the paper's)")] = None
    """Optimiser steps of each training."""
    out: Path = Path("runs/toy2d")
    """Folder for the runs, table.md, results.json and the pictures."""


@dataclass(frozen=True)
class Info:
    """Print versions, how the package was built, and which backends are live."""


Command = Train | Sample | Reproduce | Info


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, by default that of the process, and return its exit status."""
    try:
        _run(_parse(list(sys.argv[1:] if argv is None else argv) or ["--help"]))
    except ConfigError as error:
        return _complain(str(error), status=2)
    except RunError as error:
        return _complain(str(error), status=1)
    except KeyboardInterrupt:
        return _complain("aborted; the checkpoints saved so far are whole", status=130)
    return 0


def _run(command: Command) -> None:
    if isinstance(command, Train):
        _train(command)
    elif isinstance(command, Sample):
        _sample(command)
    elif isinstance(command, Reproduce):
        _reproduce(command)
    else:
        from qcsbm_fast import info

        print(info.report())


def _train(command: Train) -> None:
    from qcsbm_fast.train import build, checkpoint, run

    build.find_device(command.settings.device)  # before anything is written
    if command.resume is None:
        folder = create(command.settings, command.out)
    else:
        folder = open_run(command.resume)
        check_continues(folder.read_config(), command.settings)
        folder.write_config(command.settings)
    print(f"Run folder: {folder.path}")
    try:
        run.train(command.settings, folder)
    except NonFiniteError as error:
        have = checkpoint.steps(folder.checkpoints)
        kept = "The last good checkpoint is kept" if have else "No checkpoint yet"
        retry = f"--resume {shlex.quote(str(folder.path))} --optim.lr {command.settings.optim.lr / 4:g}"
        raise RunError(f"{error}\n{kept}; to try again with smaller steps: qcsbm train {retry}") from error


def _sample(command: Sample) -> None:
    from qcsbm_fast.train import sample

    folder = open_run(command.run)
    picture = sample.sample(
        folder,
        command.sampling,
        step=command.checkpoint,
        out=command.out,
        seed=command.seed,
        device=command.device,
    )
    print(f"{command.sampling.count} samples: {picture} and {picture.with_suffix('.npz')}")


def _reproduce(command: Reproduce) -> None:
    from qcsbm_fast.studies import toy2d

    rows = toy2d.reproduce(
        command.out,
        densities=command.densities,
        kinds=command.kinds,
        seeds=command.seeds,
        factors=command.factors,
        steps=command.steps,
    )
    print(f"{len(rows)} models; table, numbers and pictures in {command.out}")


def _parse(arguments: list[str]) -> Command:
    """The command that the arguments describe. Leaves by SystemExit after printing help or an error."""
    train = Train(settings=_base_settings(arguments))
    sample = Sample(run=tyro.MISSING, sampling=_base_sampling(arguments))
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Sample, tyro.conf.subcommand("sample", default=sample)]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(commands, prog="qcsbm", description=_DESCRIPTION, args=arguments)  # pyright: ignore
    except ValidationError as error:  # tyro lets that of the settings as a whole through
        raise ConfigError(describe(error)) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise SystemExit(_complain(_explain(stop, errors.getvalue()), status=2)) from None


def _base_settings(arguments: list[str]) -> Config:
    """What the options of `qcsbm train` override: the settings of the resumed run, the file or the preset."""
    resume, file, preset = (_last_value(arguments, name) for name in ("--resume", "--config", "--preset"))
    if arguments[0] != "train" or (preset and preset not in PRESETS):
        return PRESETS["digits"]
    if resume:
        for name in ("--config", "--out"):
            if _last_value(arguments, name):
                raise ConfigError(f"--resume and {name} exclude each other: a resumed run keeps its own")
        return open_run(Path(resume)).read_config()
    return config_file.read(Path(file), preset) if file else PRESETS[preset or "digits"]


def _base_sampling(arguments: list[str]) -> Sampling:
    """How the run on the command line of `qcsbm sample` draws samples itself."""
    for argument in arguments[1:] if arguments[0] == "sample" else []:
        if (Path(argument) / "config.yaml").is_file():
            return open_run(Path(argument)).read_config().sampling
    return PRESETS["digits"].sampling


def _last_value(arguments: list[str], option: str) -> str | None:
    """The value of `option` in `--option value` or `--option=value`, the last one given."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option and following:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _explain(stop: SystemExit, message: str) -> str:
    """Why tyro refused the arguments, in plain lines; `message` is the framed text that it wrote."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, ValidationError):
            return describe(cause)
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__context__
    # a box with its title in the frame and rules between its sections; without Unicode, the frame is blank
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    sections: list[list[str]] = [[]]
    for line in plain.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        sections.append([]) if set(text) <= {"─", "-"} else sections[-1].append(text)
    told = [section for section in sections if section and not section[0].startswith(_NOT_TOLD)]
    # of a list of similar options, the first is enough
    lines = [" ".join(section[:2] if section[0].startswith("Perhaps") else section) for section in told]
    return "\n".join(lines) or message


def _complain(message: str, status: int) -> int:
    print(f"qcsbm: {message}", file=sys.stderr)
    return status
