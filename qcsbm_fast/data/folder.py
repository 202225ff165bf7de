"""A folder of pictures, cut square and scaled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qcsbm_fast.data.errors import DataError
from qcsbm_fast.data.pictures import square

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def folder(root: str | None, size: int) -> tuple[Tensor, Tensor]:
    """Train and held-out test images `(N, 3, size, size)`, uint8, of all pictures under the folder `root`.

    The middle square of each is scaled to `size`, transparent parts on white. One picture in ten, two at least, is
    held out; which ones depends on the sorted names alone. Raises DataError where there are fewer than three
    pictures or one cannot be read.
    """
    from tqdm import tqdm

    if root is None:
        raise DataError("folder: name the folder of pictures with --data.root")
    paths = sorted(path for path in Path(root).rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(paths) < 3:
        raise DataError(
            f"folder: expected at least 3 pictures under {root}, got {len(paths)}; "
            f"looked for {', '.join(sorted(_SUFFIXES))}"
        )
    images = torch.stack([read(path, size) for path in tqdm(paths, "pictures", disable=len(paths) < 2000)])
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    held_out = max(2, len(paths) // 10)
    return images[order[held_out:]], images[order[:held_out]]


def read(path: Path, size: int) -> Tensor:
    """The picture at `path` as `(3, size, size)`, uint8. Raises DataError where it is none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return square(picture, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}\nMend it or take it away") from None
