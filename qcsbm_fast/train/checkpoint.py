"""Checkpoints: files of plain tensors and containers that are either whole or not there.

A checkpoint is written to a temporary file in its own folder, flushed to the disk, and only then given its
name, so that a crash leaves the earlier ones untouched. Reading never runs code from the file.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from qcsbm_fast.train.errors import CheckpointError

_NAME = re.compile(r"step-(\d+)\.pt")


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, delete all but the newest `keep`, return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    write_whole(path, lambda file: torch.save(state, file))
    for old in steps(folder)[:-keep]:
        (folder / f"step-{old:08d}.pt").unlink()
    return path


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk and give it its name."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def steps(folder: Path) -> list[int]:
    """The steps that `folder` has a checkpoint of, in rising order."""
    matches = (_NAME.fullmatch(entry.name) for entry in folder.glob("step-*.pt"))
    return sorted(int(match.group(1)) for match in matches if match)


def find(folder: Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, by default the newest. Raises CheckpointError where there is none."""
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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused: it holds something other than plain tensors and containers, "
            "so it is not a checkpoint of qcsbm-fast"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint of qcsbm-fast: holds a {type(state).__name__}")
    return state


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
