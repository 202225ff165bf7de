"""Memory layouts of images: `(*, C, H, W)` stored channels-last or contiguous.

The image ops compute in the layout of their first argument. Channels-last is the fast one: tangents `(K, B,
C, H, W)` are stored so that `flatten(0, 1)` is a channels-last batch of `K B` images.
"""

from __future__ import annotations

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of `x` `(*, C, H, W)` lie next to each other and the rest densely."""
    return x.movedim(-3, -1).is_contiguous()


def to_channels_last(x: Tensor) -> Tensor:
    """`x` `(*, C, H, W)` with its channels next to each other; a copy only if it is stored otherwise."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def match_layout(x: Tensor, reference: Tensor) -> Tensor:
    """`x` `(*, C, H, W)` in the layout of `reference`, channels-last where that is stored neither way."""
    if is_channels_last(reference) or not reference.is_contiguous():
        return to_channels_last(x)
    return x.contiguous()
