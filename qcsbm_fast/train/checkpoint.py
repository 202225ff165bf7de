"""Checkpoints: files of plain tensors and containers that are either whole or refused.

A checkpoint is written to a temporary file in its own folder, flushed to the disk, and only then given its
name, so that a crash leaves the earlier ones untouched. Its checksums (CRC-32 of every record in the zip
archive that `torch.save` writes) are compared before it is read, and reading never runs code from the file.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import torch

from qcsbm_fast.train.errors import CheckpointError

BEST = "best.pt"
Step = int | Literal["best"] | None
"""A checkpoint of a run: that of a step, that of the lowest held-out loss, or the newest."""

_NAME = re.compile(r"step-(\d+)\.pt")


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, keep `keep` of them, this one included, and return its path.

    Raises CheckpointError where it cannot be written, which leaves the earlier ones as they were.
    """
    path = _write(folder, f"step-{step:08d}.pt", state)
    others = [other for other in steps(folder) if other != step]
    for old in others[: len(others) - (keep - 1)]:
        (folder / f"step-{old:08d}.pt").unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` as `BEST`, in the place of an earlier one. Raises CheckpointError where it cannot."""
    return _write(folder, BEST, state)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk and give it its name.

    Raises CheckpointError where there is no room or no permission; what stood at `path` is still there.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {_reason(error)}") from error


def steps(folder: Path) -> list[int]:
    """The steps that `folder` has a checkpoint of, in rising order."""
    matches = (_NAME.fullmatch(entry.name) for entry in folder.glob("step-*.pt"))
    return sorted(int(match.group(1)) for match in matches if match)


def find(folder: Path, step: Step = None) -> Path:
    """The checkpoint of `step`, "best", or by default the newest. Raises CheckpointError where there is none."""
    if step == "best":
        if not (folder / BEST).is_file():
            raise CheckpointError(f"{folder}: no {BEST} here: nothing was evaluated yet")
        return folder / BEST
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint here")
    if step is not None and step not in found:
        known = ", ".join(map(str, found))
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are: {known}")
    return folder / f"step-{found[-1] if step is None else step:08d}.pt"


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, its tensors onto the CPU. Raises CheckpointError where it cannot be trusted."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"{path}: damaged: the checksum of its record {broken!r} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path}: damaged or cut short, or not a checkpoint of qcsbm-fast") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused: it holds something other than plain tensors and containers, "
            "so it is not a checkpoint of qcsbm-fast"
        ) from None
    # NotImplementedError and the like: what a damaged header makes of the archive
    except (RuntimeError, EOFError, ValueError, LookupError, NotImplementedError, zlib.error) as error:
        raise CheckpointError(f"{path}: damaged: {(str(error).splitlines() or ['unreadable'])[0]}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint of qcsbm-fast: holds a {type(state).__name__}")
    return state


def load_newest(folder: Path, *, rename: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint that can be read, and what is wrong with those that are newer.

    With `rename`, for the process that writes here, a damaged file gets the ending ".damaged", so that it takes
    nobody's place. Raises CheckpointError, with all that is wrong, where none can be read or there is none.
    """
    problems: list[str] = []
    for step in reversed(steps(folder)):
        path = find(folder, step)
        try:
            return load(path), problems
        except CheckpointError as error:
            problems.append(str(error))
            if rename:
                path.rename(path.with_suffix(".pt.damaged"))
    raise CheckpointError("\n".join(problems) or f"{folder}: no checkpoint here")


def read(folder: Path, step: Step = None) -> dict[str, Any]:
    """The checkpoint of `step`, the "best", or the newest that can be read, with a word on stderr on those that cannot.

    Raises CheckpointError where there is none, or the one that was asked for cannot be read.
    """
    if step is not None:
        return load(find(folder, step))
    state, problems = load_newest(folder)
    for problem in problems:
        print(f"{problem}\nThe one before it is used", file=sys.stderr)
    return state


def remove_halves(folder: Path) -> None:
    """Delete what a process left that was killed while it wrote; nobody else may be writing."""
    for half in folder.glob("*.tmp"):
        half.unlink(missing_ok=True)


def _write(folder: Path, name: str, state: dict[str, Any]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror or error}") from error
    write_whole(folder / name, lambda file: torch.save(state, file))
    return folder / name


def _reason(error: BaseException) -> str:
    """What the system says; torch reports a failed write as an error of its own, raised on top of the system's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
