"""Samples from the checkpoint of a run, as a picture and as numbers, in batches that can be shared and resumed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qcsbm_fast.sampling.noise import SampleNoise
from qcsbm_fast.train import checkpoint, plots, trained
from qcsbm_fast.train.animation import Frames, write_gif
from qcsbm_fast.train.config import Sampling
from qcsbm_fast.train.draw import draw
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.folder import RunFolder

_MOST = {True: 256, False: 10_000}  # of images, of points: in a batch, and in the picture


@dataclass(frozen=True)
class Shard:
    """This process's share of the batches: those whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1


def sample(
    folder: RunFolder,
    sampling: Sampling,
    *,
    step: checkpoint.Step = None,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    shard: Shard | None = None,
    gif: bool = False,
) -> Path | None:
    """Draw with the averaged weights of the checkpoint of `step`, the "best", or by default the newest.

    Writes the picture `out`, by default drawn-<step>-<sampler>.png in the run folder, beside it the array
    `samples (count, *)` in an .npz file of the same name, and with `gif` an animation of the first batch. Returns the
    picture's path, or None where other shards have batches to draw yet.

    Every batch is a file in <picture>.parts until all are there; a batch that is there is not drawn again,
    and whichever process finds all of them writes the result. What sample i is depends on the seed and i, and
    with the "langevin" corrector, whose step is a mean over the batch, on the batch size.

    Raises RunError where the parts found are of a job with other settings.
    """
    _, setup, step = trained.load(folder, step, device=device)
    picture = out or folder.path / f"drawn-{step}-{sampling.sampler}.png"
    picture = picture.with_suffix(".png")
    size = batch_size or _MOST[setup.image]
    parts, shard = picture.with_suffix(".parts"), shard or Shard()
    job = {"checkpoint": step, "seed": seed, "batch_size": size, **asdict(sampling)}
    _claim(parts, job)
    firsts = list(range(0, sampling.count, size))
    own = firsts[shard.index :: shard.count]
    on_terminal = sys.stderr.isatty()
    for first in tqdm(own, desc="batches", disable=len(own) < 2 or not on_terminal):
        film = picture.with_suffix(".gif") if gif and first == 0 else None
        part = parts / f"{first:09d}.npy"
        if part.exists() and (film is None or film.exists()):
            continue
        frames = Frames(sampling.steps if sampling.sampler != "ode" else 1) if film else None
        samples = draw(
            setup.score,
            setup.shape,
            sampling,
            SampleNoise(seed, first, setup.device),
            count=min(size, sampling.count - first),
            progress=on_terminal and len(own) == 1,
            watch=frames,
        )
        if film and frames:
            write_gif(film, frames.kept, image=setup.image)
        checkpoint.write_whole(part, lambda file, samples=samples: np.save(file, samples.cpu().numpy()))
    return picture if _gather(parts, firsts, picture, image=setup.image) else None


def _claim(parts: Path, job: dict[str, Any]) -> None:
    """Make the folder of the parts, or check that it is this job's."""
    note = parts / "job.json"
    if not note.is_file():
        parts.mkdir(parents=True, exist_ok=True)
        temporary = parts / f"job-{os.getpid()}.tmp"
        temporary.write_text(json.dumps(job, indent=1))
        os.replace(temporary, note)  # shards that start together write the same
    found = json.loads(note.read_text())
    if found != job:
        name = next(key for key in job if found.get(key) != job[key])
        raise RunError(
            f"{parts}: samples of another job are unfinished here ({name} was {found.get(name)}, now {job[name]})\n"
            "Finish it with its own settings, remove that folder, or choose another file with --out"
        )


def _gather(parts: Path, firsts: list[int], picture: Path, *, image: bool) -> bool:
    """Whether every part is there; then the array and the picture are written and the parts removed."""
    paths = [parts / f"{first:09d}.npy" for first in firsts]
    try:
        samples = np.concatenate([np.load(path) for path in paths])
    except FileNotFoundError:
        return False
    checkpoint.write_whole(picture.with_suffix(".npz"), lambda file: np.savez(file, samples=samples))
    shown = torch.from_numpy(samples[: _MOST[image]])
    plots.image_grid(picture, shown) if image else plots.scatter(picture, shown)
    shutil.rmtree(parts, ignore_errors=True)
    return True
