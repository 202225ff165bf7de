"""Samples from the checkpoint of a run, as a picture and as numbers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.train import build, checkpoint, plots
from qcsbm_fast.train.config import Sampling
from qcsbm_fast.train.draw import draw
from qcsbm_fast.train.folder import RunFolder


def sample(
    folder: RunFolder,
    sampling: Sampling,
    *,
    step: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Draw with the averaged weights of the checkpoint of `step`, by default the newest.

    Writes the picture `out`, by default drawn-<step>-<sampler>.png in the run folder, and beside it the array
    `samples (count, *)` in an .npz file of the same name. Returns the picture's path.
    """
    path = checkpoint.find(folder.checkpoints, step)
    state = checkpoint.load(path)["trainer"]
    setup = build.build(replace(folder.read_config(), device=device))
    setup.score.eval().load_state_dict(state["ema"]["module"])
    stream = NoiseStream(seed, device=setup.device)
    samples = draw(setup.score, setup.shape, sampling, stream, progress=sys.stderr.isatty())
    picture = out or folder.path / f"drawn-{state['steps_done']}-{sampling.sampler}.png"
    picture = picture.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    np.savez(picture.with_suffix(".npz"), samples=samples.cpu().numpy())
    if setup.image:
        plots.image_grid(picture, samples)
    else:
        plots.scatter(picture, samples)
    return picture
