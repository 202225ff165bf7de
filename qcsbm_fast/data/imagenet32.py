"""ImageNet at 32 x 32 pixels (Chrabaszcz et al. 2017, arXiv 1707.08819), from its batch files, memory-mapped."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcsbm_fast.data.errors import DataError

_TRAIN = tuple(f"train_data_batch_{number}" for number in range(1, 11))
_TEST = ("val_data",)
_GLOBALS = {
    ("_codecs", "encode"): "_codecs",
    ("numpy", "dtype"): "numpy",
    ("numpy", "ndarray"): "numpy",
    ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0].__module__,
    ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0].__module__,
}
"""What a pickled array of numbers names, and the module in which this numpy has it."""


def imagenet32(root: str | None) -> tuple[Tensor, Tensor]:
    """Train `(1281167, 3, 32, 32)` and validation `(50000, 3, 32, 32)` images, uint8, not read into memory.

    The batch files (the pickles or the .npz files) in the folder `root` are written once into
    imagenet32-train.npy and imagenet32-val.npy beside them; those are then mapped, and suffice by themselves. Of a
    pickle nothing but arrays, numbers and strings is accepted. Raises DataError where a file is missing, damaged
    or cannot be written.
    """
    if root is None:
        raise DataError(f"imagenet32: no --data.root\n{_needed()}")
    train, test = (_map(Path(root), part, names) for part, names in (("train", _TRAIN), ("val", _TEST)))
    return train, test


def _map(root: Path, part: str, names: tuple[str, ...]) -> Tensor:
    path = root / f"imagenet32-{part}.npy"
    if not path.is_file():
        _convert([_find(root, name) for name in names], path)
    try:
        images = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": torch wants memory that it may write
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}; delete it to have it made again") from None
    if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
        raise DataError(f"{path}: not images of 3 x 32 x 32 bytes; delete it to have it made again")
    return torch.from_numpy(images)


def _convert(batches: list[Path], path: Path) -> None:
    """Write the images of all `batches` into the array file `path`, which is whole or not there."""
    from tqdm import tqdm

    temporary = path.with_suffix(".tmp")
    count = 0
    try:
        with open(temporary, "wb") as file:
            _write_header(file, count)
            for images in tqdm((_read(batch) for batch in batches), path.name, len(batches), unit="file"):
                file.write(images.tobytes())
                count += len(images)
            file.seek(0)
            _write_header(file, count)  # numpy leaves room for a larger number
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(file: Any, count: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, 32, 32)}
    np.lib.format.write_array_header_1_0(file, header)


def _read(path: Path) -> np.ndarray:
    """The images of one batch file, `(N, 3072)`, uint8."""
    try:
        if path.suffix == ".npz":
            images = np.load(path, allow_pickle=False)["data"]
        else:
            with open(path, "rb") as file:
                images = _ArrayUnpickler(file, encoding="latin1").load()["data"]
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a batch file of ImageNet 32x32: {error}") from None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,):
        raise DataError(f"{path}: not a batch file of ImageNet 32x32: expected 'data' of (N, 3072) bytes")
    return images


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain containers; anything else that a pickle names is refused, not imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(_GLOBALS[module, name], name)


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.npz"):
        if path.is_file():
            return path
    raise DataError(f"imagenet32: {name}[.npz] is not in {root}\n{_needed()}")


def _needed() -> str:
    return (
        "Fetch the 32x32 train and val batches from https://image-net.org/download-images, unpack them into one "
        "folder and name it with --data.root"
    )
