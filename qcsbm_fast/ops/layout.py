"""Memory layouts of images `(*, C, H, W)`: the image ops compute channels-last, and bring their arguments to
it.

Tangents `(K, B, C, H, W)` are stored so that `flatten(0, 1)` is a channels-last batch of `K B` images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_channels_last(x: Tensor) -> Tensor:
    """`x` `(*, C, H, W)` with its channels next to each other and the rest dense; itself if it is stored so."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # the common case, without views
        return x
    rows = x.movedim(-3, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, -3)
