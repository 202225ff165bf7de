"""The model that a run has made."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from qcsbm_fast.train import build, checkpoint
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.folder import RunFolder


class Trained(NamedTuple):
    """A run's settings and data, `setup.score` with the averaged weights of step `step`, in evaluation mode."""

    config: Config
    setup: build.Setup
    step: int


def load(folder: RunFolder, step: checkpoint.Step = None, *, device: str | None = None) -> Trained:
    """The checkpoint of `step`, "best", or by default the newest that can be read, on `device`, by default the run's.

    Raises CheckpointError where there is none, and as `build.build`.
    """
    state = checkpoint.read(folder.checkpoints, step)["trainer"]
    config = folder.read_config()
    setup = build.build(config if device is None else replace(config, device=device))
    setup.score.eval().load_state_dict(state["ema"]["module"])
    return Trained(config, setup, state["steps_done"])
