"""What the table of ops says of each, and the sizes in which it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from draws import Draw, Size
from qcsbm_fast.ops.split import HAS_REGISTERS

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Errors of long sums, as shares of the largest value: of products transformed as by Winograd, where there are no matrix
# registers those of bfloat16 too, and of plain loops in float64.
SUMS = {
    torch.float32: 2.0**-18,
    torch.bfloat16: 0.0 if HAS_REGISTERS else 2.0**-19,
    torch.float64: 2.0**-44,
}


@dataclass(frozen=True)
class Entry:
    """One op.

    Its error may be what `allowance` says beside twice that of the same-dtype reference.
    """

    variants: dict[str, Callable[[Draw, Size], tuple[Any, ...]]]
    sizes: dict[str, Size]
    public: Callable[..., Any] | None = None
    """The public function over the op's arguments; None where the op is reached through a derivative only."""
    differentiable: tuple[int, ...] = ()
    """Positions of the arguments that have a gradient."""
    order: int = 0
    """How many derivatives exist; asking for the next raises."""
    tangent_of: str | None = None
    """For an op `(x, tangents, *rest) -> (y, ydot)`: the op `(x, *rest) -> y`."""
    noise: bool = False
    """Whether it draws normals, which agree to a few float32 ulp in any dtype."""
    ulps: float = 4.0
    cancels: bool = False
    """Whether its results are differences of numbers near 1, and can be as wrong as these."""
    sums: bool = False
    """Whether it sums many products: see SUMS."""
    chain: int = 1
    """How many ops it runs one after another; what is between them is rounded to the dtype of the images."""
    bench: Size = ()


def allowance(entry: Entry, dtype: torch.dtype, images: torch.dtype, scale: float) -> float:
    """The error that a result of `dtype` up to `scale` may have, from arguments of the dtype `images`."""
    share = entry.ulps * torch.finfo(dtype).eps + entry.sums * entry.chain * SUMS.get(images, 0.0)
    if entry.chain > 1:
        share += entry.chain * torch.finfo(images).eps
    noise = 4 * torch.finfo(torch.float32).eps * max(scale, 1.0) * entry.noise
    return share * max(scale, float(entry.cancels)) + noise


# The odd size is what derivatives are checked on; the large one is shared between threads.
BATCHES: dict[str, Size] = {
    "empty": (0, 5),
    "no-features": (3, 0),
    "one": (1, 1),
    "numbers": (37,),
    "odd": (3, 5, 7),
    "image": (2, 3, 8, 6),
    "points": (1500, 2),
    "large": (3, 67, 331),
}
ROWS: dict[str, Size] = {
    "empty": (0, 5),
    "no-channels": (3, 0),
    "one": (1, 1),
    "odd": (7, 13),
    "image": (2, 3, 8, 6),
    "wide": (5, 700),
    "large": (300, 131),
}
IMAGES: dict[str, Size] = {
    "empty": (0, 4, 3, 3),
    "one": (1, 6, 1, 1),
    "odd": (2, 6, 3, 5),
    "image": (2, 8, 8, 6),
    "wide": (2, 96, 5, 3),
    "large": (3, 32, 33, 31),
}
MLPS: dict[str, Size] = {
    "empty": (0, 2, 3, 2),
    "one": (1, 1, 1, 1),
    "odd": (5, 3, 7, 4, 2),
    "plane": (77, 2, 64, 128, 256, 2),
    "wide": (40, 33, 100, 17),
    "large": (700, 2, 64, 32, 3),
}
LENGTHS: dict[str, Size] = {"empty": (0,), "one": (1,), "odd": (5, 27), "large": (7, 9001)}
# Sides that a filter may halve.
BLOCKS: dict[str, Size] = {
    "empty": (0, 4, 2, 2),
    "one": (1, 4, 2, 2),
    "odd": (2, 4, 4, 2),
    "image": (2, 8, 8, 6),
    "wide": (2, 96, 4, 2),
    "large": (3, 32, 18, 16),
}
