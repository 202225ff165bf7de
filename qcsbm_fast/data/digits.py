"""Scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Train `(1437, 1, 8, 8)` and held-out test `(360, 1, 8, 8)` images, float32 in [0, 1].

    The UCI optical digits that come with scikit-learn, grey levels 0 to 16 divided by 16. The split is fixed
    and stratified: 20% of each digit is held out.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, test_size=0.2, random_state=0, stratify=labels)
    train, test = (torch.from_numpy(part).float().reshape(-1, 1, 8, 8) for part in parts)
    return train, test
