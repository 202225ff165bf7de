"""Pictures of any size and colour mode as square RGB images of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def square(picture: Image, size: int, *, cut: bool = True) -> Tensor:
    """`(3, size, size)`, uint8: transparent parts on white, each pixel a mean over the area it covers.

    A picture that is not square loses what is beyond the middle square, or with `cut=False` gets white margins.
    """
    from PIL import Image, ImageOps

    picture = picture.convert("RGBA")
    opaque = Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture)
    opaque = opaque.convert("RGB")
    if cut:
        image = ImageOps.fit(opaque, (size, size), method=Image.Resampling.BOX)
    else:
        image = ImageOps.pad(opaque, (size, size), method=Image.Resampling.BOX, color="white")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
