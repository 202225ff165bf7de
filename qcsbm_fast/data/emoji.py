"""The emoji of the Noto Color Emoji font: its bitmaps as small RGB images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.data.errors import DataError
from qcsbm_fast.data.pictures import square

_SIZE = 32
_NEAR = 0.08
_NEEDED = (
    "Install the bitmap version of the font (apt install fonts-noto-color-emoji, or NotoColorEmoji.ttf from "
    "https://github.com/googlefonts/noto-emoji), or name its file with --data.root"
)


def emoji(root: str | None) -> tuple[Tensor, Tensor]:
    """Train and held-out test images `(N, 3, 32, 32)`, uint8, on white; about 3,500 and 400.

    The held-out tenth is made of whole families, see `families`; which ones is fixed. `root` is the font's file,
    by default the installed one. Raises DataError where the font is not there, has no bitmaps, or fontTools is
    missing.
    """
    path = _find(root)
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise DataError("emoji: needs fontTools: pip install 'qcsbm-fast[emoji]'") from None
    try:
        font = TTFont(path)
        bitmaps = font["CBDT"].strikeData[0] if "CBDT" in font else {}
    except (TTLibError, OSError) as error:
        raise DataError(f"{path}: not a font: {error}\n{_NEEDED}") from None
    if not bitmaps:
        raise DataError(f"{path}: a font without colour bitmaps\n{_NEEDED}")
    names = sorted(bitmaps)
    images = torch.stack([_decode(bitmaps[name].imageData) for name in names])
    ligatures = _ligatures(font)
    return _split(images, families([_base(name, ligatures) for name in names], images))


def families(bases: list[str], images: Tensor) -> Tensor:
    """The family number `(N,)` of each of `images (N, C, H, W)`, uint8, whose glyphs begin with the characters `bases`.

    Two images are of one family if they begin with the same character (skin tones, sexes, professions of one
    person, flags by their first letter) or look nearly alike: a root mean square difference below 8% of the
    range; and so on from one to the next.
    """
    number = {base: index for index, base in enumerate(dict.fromkeys(bases))}
    family = torch.tensor([number[base] for base in bases])
    pixels = images.flatten(1).float() / 255
    near = torch.cdist(pixels, pixels) < _NEAR * pixels.shape[1] ** 0.5
    for i, j in near.triu(1).nonzero().tolist():
        family[family == family[j]] = family[i].clone()
    return family


def _split(images: Tensor, family: Tensor) -> tuple[Tensor, Tensor]:
    """Families in random, fixed order are held out until they make a tenth; those above 1% of all are for training."""
    generator = torch.Generator().manual_seed(0)
    members, sizes = family.unique(return_counts=True)
    small = members[sizes <= len(images) // 100]
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for index in torch.randperm(len(small), generator=generator).tolist():
        if held_out.sum() >= len(images) // 10:
            break
        held_out |= family == small[index]
    return images[~held_out], images[held_out]


def _decode(data: bytes) -> Tensor:
    from PIL import Image

    return square(Image.open(io.BytesIO(data)), _SIZE, cut=False)


def _base(name: str, ligatures: dict[str, str]) -> str:
    """The first character of the sequence that the glyph `name` stands for."""
    for _ in range(len(ligatures)):
        if name not in ligatures:
            break
        name = ligatures[name]
    return name


def _ligatures(font: Any) -> dict[str, str]:
    """First glyph of each ligature, by the glyph that takes its place."""
    tables = (table for lookup in font["GSUB"].table.LookupList.Lookup for table in lookup.SubTable)
    return {
        ligature.LigGlyph: first
        for table in tables
        if hasattr(table, "ligatures")
        for first, ligatures in table.ligatures.items()
        for ligature in ligatures
    }


def _find(root: str | None) -> Path:
    if root is not None:
        if Path(root).is_file():
            return Path(root)
        raise DataError(f"emoji: no file {root}\n{_NEEDED}")
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        if Path(path).name == "NotoColorEmoji.ttf":
            return Path(path)
    raise DataError(f"emoji: Noto Color Emoji is not installed\n{_NEEDED}")
