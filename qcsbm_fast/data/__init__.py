"""Data sets by name: `load`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor, uint8

from qcsbm_fast.data import toy
from qcsbm_fast.data.errors import DataError

__all__ = ["NAMES", "DataError", "Dataset", "as_float", "load"]

_TOY: dict[str, Callable[[int, Generator], Tensor]] = {
    "checkerboard": toy.checkerboard,
    "eight-gaussians": toy.eight_gaussians,
    "spirals": toy.spirals,
}
NAMES = (
    "digits", "mnist-5k", "fashion-mnist", "emoji", "cifar10", "cifar100", "svhn", "imagenet32", "folder", *_TOY
)  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """`train (N, *)` and `test (M, *)` samples on the CPU; `image` tells pictures from points.

    Points and digits are float32; the other images are uint8, from 0 to 255, which `as_float` brings to [0, 1].
    """

    train: Tensor
    test: Tensor
    name: str
    image: bool


def as_float(samples: Tensor) -> Tensor:
    """`samples` as float32: bytes divided by 255, anything else as it is."""
    return samples.float().div_(255.0) if samples.dtype == uint8 else samples


def load(
    name: str, *, root: str | None = None, points: int = 50_000, size: int = 32, seed: int = 0
) -> Dataset:
    """Load the data set `name`, one of `NAMES`.

    Images have a fixed held-out split, whatever `points` and `seed`; `root` is where their files are, and `size`
    the side of those of "folder". The 2-D sets: `points` training points `(points, 2)` drawn from `seed`, and as
    many fresh ones for the test.

    Raises ValueError for an unknown name or, for a 2-D set, fewer than one point; DataError, which is one, where
    files or a package are missing or files are damaged, saying what to do.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if name not in _TOY:
        return Dataset(*_images(name, root, size), name, image=True)
    if points < 1:
        raise ValueError(f"points: expected at least 1, got {points}")
    # one generator for both draws: two seeds would give the test set of one run as another's training set
    generator = Generator().manual_seed(seed)
    return Dataset(_TOY[name](points, generator), _TOY[name](points, generator), name, image=False)


def _images(name: str, root: str | None, size: int) -> tuple[Tensor, Tensor]:
    """Train and test images; each data set's module is imported only if it is asked for."""
    if name == "digits":
        from qcsbm_fast.data.digits import digits

        return digits()
    if name == "mnist-5k":
        from qcsbm_fast.data.mnist import mnist_5k

        return mnist_5k()
    if name == "fashion-mnist":
        from qcsbm_fast.data.idx import fashion_mnist

        return fashion_mnist(root)
    if name == "emoji":
        from qcsbm_fast.data.emoji import emoji

        return emoji(root)
    if name == "imagenet32":
        from qcsbm_fast.data.imagenet32 import imagenet32

        return imagenet32(root)
    if name == "folder":
        from qcsbm_fast.data.folder import folder

        return folder(root, size)
    from qcsbm_fast.data.vision import vision

    return vision(name, root)
