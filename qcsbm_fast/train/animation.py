"""Samples coming into being, as a GIF."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qcsbm_fast.train import plots

_FRAMES, _LONGEST, _MILLISECONDS = 40, 360, 80


class Frames:
    """Keeps at most forty-one of the states that a sampler is watched through; `Frames(steps)` for so many."""

    def __init__(self, steps: int) -> None:
        self.kept: list[Tensor] = []
        self._every = -(-steps // _FRAMES)
        self._last = steps - 1

    def __call__(self, step: int, state: Tensor) -> None:
        if step % self._every == 0 or step == self._last:
            self.kept.append(state.detach().cpu().clone())


def write_gif(path: Path, frames: Sequence[Tensor], *, image: bool) -> None:
    """Frames of images `(N, C, H, W)` or points `(N, 2)`, the last one shown for two seconds."""
    pictures = []
    for frame in frames:
        buffer = io.BytesIO()
        if image:
            low, high = torch.quantile(
                frame.flatten()[: 1 << 20].double(), torch.tensor([0.01, 0.99]).double()
            )
            low, high = min(low.item(), 0.0), max(high.item(), 1.0)  # noise in full, data as it is
            plots.image_grid(buffer, (frame - low) / (high - low))
        else:
            plots.scatter(buffer, frame)
        picture = Image.open(buffer).convert("RGB")
        picture.thumbnail((_LONGEST, _LONGEST))
        pictures.append(picture)
    durations = [_MILLISECONDS] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
