"""CIFAR-10, CIFAR-100 (Krizhevsky 2009) and SVHN (Netzer et al. 2011), read by torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.data.errors import DataError

_SOURCES = {
    "cifar10": "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpacked,",
    "cifar100": "cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpacked,",
    "svhn": "train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers",
}


def vision(name: str, root: str | None) -> tuple[Tensor, Tensor]:
    """Train and test images `(N, 3, 32, 32)`, uint8, of "cifar10", "cifar100" or "svhn", whose files `root` holds.

    torchvision unpickles CIFAR's files only where their checksums are the published ones. Raises DataError
    without torchvision, or where the files are not there or not the published ones.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise DataError(f"{name}: needs torchvision: pip install 'qcsbm-fast[torchvision]'") from None
    needed = f"Put {_SOURCES[name]} into a folder and name it with --data.root"
    if root is None:
        raise DataError(f"{name}: no --data.root\n{needed}")
    try:
        if name == "svhn":
            parts: Any = [datasets.SVHN(root, split=split).data for split in ("train", "test")]
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            parts = [kind(root, train=train).data.transpose(0, 3, 1, 2) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(f"{name}: not in {root}, or damaged: {str(error).split('.')[0]}\n{needed}") from None
    train, test = (torch.from_numpy(part).contiguous() for part in parts)
    return train, test
