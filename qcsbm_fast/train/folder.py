"""The folder that a run leaves behind, and how a run is found again."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from qcsbm_fast.train import config_file
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.errors import RunError


@dataclass(frozen=True)
class RunFolder:
    """`path` with config.yaml, stats.jsonl, tensorboard/, checkpoints/ and the pictures in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read_config(self) -> Config:
        return config_file.read(self.path / "config.yaml")

    def write_config(self, config: Config) -> None:
        config_file.write(self.path / "config.yaml", config)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other trainers out; the system lifts the lock when this process ends, however it does.

        Raises RunError where another process holds it.
        """
        try:
            file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None
        with file:
            try:
                _lock(file)
            except OSError:
                file.seek(0)
                raise RunError(
                    f"{self.path}: {file.read() or 'another process'} is training here\n"
                    "Wait for it or stop it; a copy of the folder can be trained apart"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield


def create(config: Config, out: Path | None = None) -> RunFolder:
    """Make the folder of a new run: `out`, by default runs/<preset>-<kind>-<number>, with config.yaml in it.

    Raises RunError where `out` has something in it.
    """
    if out is None:
        path = _make_numbered(Path("runs"), f"{config.preset}-{config.model.kind}")
    else:
        path = out
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"{path}: there is something here already\n"
                f"Continue that run with --resume {path}, or choose another folder with --out"
            )
        _make(path, exist_ok=True)
    folder = RunFolder(path)
    folder.write_config(config)
    return folder


def open_run(path: Path) -> RunFolder:
    """The folder of an earlier run. Raises RunError where `path` is none."""
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path}: not a run folder: there is no config.yaml in it")
    return RunFolder(path)


def check_continues(old: Config, new: Config) -> None:
    """Raise RunError unless a run with the settings `old` can go on with `new`.

    What the weights and the data order depend on must stay; the length, the optimiser, the penalty and what
    is measured may change.
    """
    fixed = ("preset", "seed", "data", "sde", "model", "objective")
    before, after = asdict(old), asdict(new)
    for name in fixed:
        if before[name] != after[name]:
            raise RunError(
                f"{_first_difference(name, before[name], after[name])} cannot change when a run is resumed\n"
                "Leave it as it was, or start a new run without --resume"
            )


def _first_difference(name: str, before: object, after: object) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        key = next(key for key in before if before[key] != after[key])
        return _first_difference(f"{name}.{key}", before[key], after[key])
    return f"{name} ({before} -> {after})"


def _make_numbered(parent: Path, stem: str) -> Path:
    number = 1
    while True:
        path = parent / f"{stem}-{number}"
        if not path.exists():
            try:
                _make(path)
                return path
            except FileExistsError:  # another run was quicker
                pass
        number += 1


def _make(path: Path, *, exist_ok: bool = False) -> None:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise RunError(
            f"{path}: cannot be made: {error.strerror}\nChoose another folder with --out"
        ) from None


def _lock(file: IO[str]) -> None:
    """Lock the file for this process; OSError if another has. Without effect where the system has no flock."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
