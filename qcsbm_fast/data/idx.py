"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) from the IDX files in which it is published."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from qcsbm_fast.data.errors import DataError

_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
_PLACES = (".", "FashionMNIST/raw", "fashion-mnist")
_DEBIAN = "/usr/share/datasets/fashion-mnist"


def fashion_mnist(root: str | None) -> tuple[Tensor, Tensor]:
    """Train `(60000, 1, 28, 28)` and test `(10000, 1, 28, 28)` images, uint8.

    The files, gzipped or not, are looked for in `root` and where torchvision puts them under it; by default
    where Debian's package does. Raises DataError where they are not there or damaged.
    """
    train, test = (read_images(_find(name, root)) for name in _FILES)
    return train, test


def read_images(path: Path) -> Tensor:
    """The images of an IDX file of bytes, `(N, 1, H, W)`, uint8. Raises DataError where it is none.

    An IDX file holds two zero bytes, the type (8 for bytes), the number of dimensions, the dimensions as big-endian
    32-bit integers, and the values.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged: {error}; fetch it again") from None
    if raw[:4] != bytes((0, 0, 8, 3)) or len(raw) < 16:
        raise DataError(f"{path}: not an IDX file of images: it begins with the bytes {raw[:4].hex(' ')}")
    shape = struct.unpack(">3I", raw[4:16])
    if len(raw) - 16 != math.prod(shape):
        raise DataError(f"{path}: damaged: {len(raw) - 16} bytes for {shape} images; fetch it again")
    if 0 in shape:
        raise DataError(f"{path}: no images in it")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=16).view(shape).unsqueeze(1)


def _find(name: str, root: str | None) -> Path:
    folders = [Path(root) / place for place in _PLACES] if root else [Path(_DEBIAN)]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(
        f"fashion-mnist: {name}[.gz] is not in {root or _DEBIAN}\nFetch the four files from "
        "https://github.com/zalandoresearch/fashion-mnist (or apt install dataset-fashion-mnist) and name their "
        "folder with --data.root"
    )
