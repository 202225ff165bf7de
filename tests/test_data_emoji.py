"""Emoji: a small font written here in the real format, and the split by families."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from qcsbm_fast import data
from qcsbm_fast.data import emoji


def random_images(count: int) -> np.ndarray:
    """`(count, 32, 32, 3)`, no two alike."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_families_join_what_begins_or_looks_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    far = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    change = torch.randint(-9, 10, far[1].shape, generator=generator)
    alike = (far[1].float() + change).clamp(0, 255).byte()
    family = emoji.families(["a", "b", "a", "c", "d", "e", "f"], torch.cat((far, alike[None]))).tolist()
    assert family[0] == family[2]  # the same first character
    assert family[1] == family[6]  # nearly alike: at most 9 of 255
    assert len(set(family)) == 5
    chained = emoji.families(["a", "a", "b"], torch.stack((far[0], far[1], alike)))
    assert len(chained.unique()) == 1


def test_held_out_families_are_whole() -> None:
    """A tenth is held out up to the last family's size, 15 at most; no family is on both sides."""
    generator = torch.Generator().manual_seed(1)
    family = torch.repeat_interleave(torch.arange(300), torch.randint(1, 16, (300,), generator=generator))
    family = family[torch.randperm(len(family), generator=generator)]
    images = torch.stack((family, torch.arange(len(family))), 1)
    train, test = emoji._split(images, family)
    assert not set(train[:, 0].tolist()) & set(test[:, 0].tolist())
    assert sorted(torch.cat((train, test))[:, 1].tolist()) == list(range(len(family)))
    assert 0 <= len(test) - len(family) // 10 < 15
    assert torch.equal(emoji._split(images, family)[1], test)


_LINE = """<sbitLineMetrics direction="{}"><ascender value="32"/><descender value="0"/><widthMax value="32"/>
<caretSlopeNumerator value="0"/><caretSlopeDenominator value="0"/><caretOffset value="0"/><minOriginSB value="0"/>
<minAdvanceSB value="0"/><maxBeforeBL value="0"/><minAfterBL value="0"/><pad1 value="0"/><pad2 value="0"/>
</sbitLineMetrics>"""
_TABLES = """<ttFont><CBLC><header version="3.0"/><strike index="0"><bitmapSizeTable>{lines}<colorRef value="0"/>
<startGlyphIndex value="1"/><endGlyphIndex value="2"/><ppemX value="32"/><ppemY value="32"/><bitDepth value="32"/>
<flags value="1"/></bitmapSizeTable><eblc_index_sub_table_1 imageFormat="17" firstGlyphIndex="1" lastGlyphIndex="2">
{locations}</eblc_index_sub_table_1></strike></CBLC>
<CBDT><header version="3.0"/><strikedata index="0">{glyphs}</strikedata></CBDT></ttFont>"""
_GLYPH = """<cbdt_bitmap_format_17 name="{name}"><SmallGlyphMetrics><height value="32"/><width value="32"/>
<BearingX value="0"/><BearingY value="32"/><Advance value="32"/></SmallGlyphMetrics>
<rawimagedata>{pixels}</rawimagedata></cbdt_bitmap_format_17>"""


def write_font(path: Path, pictures: dict[str, np.ndarray], features: str) -> None:
    """A font with `pictures` as the colour bitmaps of glyphs, those with names of one letter for that letter."""
    from fontTools.fontBuilder import FontBuilder
    from PIL import Image

    builder = FontBuilder(unitsPerEm=32, isTTF=True)
    builder.setupGlyphOrder([".notdef", *pictures])
    builder.setupCharacterMap({ord(name): name for name in pictures if len(name) == 1})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *pictures], (32, 0)))
    builder.setupHorizontalHeader()
    builder.setupMaxp()
    builder.setupPost()
    builder.addOpenTypeFeatures(features)
    glyphs = []
    for name, picture in pictures.items():
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        glyphs.append(_GLYPH.format(name=name, pixels=stream.getvalue().hex()))
    locations = "".join(f'<glyphLoc name="{name}"/>' for name in pictures)
    lines = _LINE.format("hori") + _LINE.format("vert")
    tables = _TABLES.format(lines=lines, locations=locations, glyphs="".join(glyphs))
    builder.font.importXML(io.StringIO(tables))
    builder.save(path)


def test_emoji_from_a_font(tmp_path: Path) -> None:
    """Ligatures of ligatures go with their first character: 10 of a's family, 20 of the other letters'."""
    pytest.importorskip("fontTools")
    names = [chr(ord("a") + index) for index in range(21)] + ["a_b", *(f"a_b_{c}" for c in "bcdefghi")]
    pictures = dict(zip(names, random_images(len(names)), strict=True))
    second = " ".join(f"sub a_b {name[-1]} by {name};" for name in names[22:])
    features = f"feature ccmp {{ sub a b by a_b; }} ccmp; feature liga {{ {second} }} liga;"
    path = tmp_path / "font.ttf"
    write_font(path, pictures, features)
    dataset = data.load("emoji", root=str(path))
    together = torch.cat((dataset.train, dataset.test)).numpy()
    expected = np.stack(list(pictures.values())).transpose(0, 3, 1, 2)
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in expected)

    from fontTools.ttLib import TTFont

    first = emoji._ligatures(TTFont(path))
    assert {emoji._base(name, first) for name in names[21:]} == {"a"}
    assert [emoji._base(name, first) for name in names[:21]] == names[:21]


def test_no_font_no_emoji(tmp_path: Path) -> None:
    pytest.importorskip("fontTools")
    (tmp_path / "text.ttf").write_text("not a font")
    for name, message in (("text.ttf", "not a font"), ("absent.ttf", "no file")):
        with pytest.raises(data.DataError, match=message) as error:
            data.load("emoji", root=str(tmp_path / name))
        assert name in str(error.value)
        assert "fonts-noto-color-emoji" in str(error.value)


def test_the_installed_font() -> None:
    """No held-out emoji is nearly one of the training's, and all are there once."""
    try:
        emoji._find(None)
    except data.DataError as error:
        pytest.skip(str(error))
    dataset = data.load("emoji")
    assert dataset.train.shape[1:] == dataset.test.shape[1:] == (3, 32, 32)
    assert len(dataset.train) + len(dataset.test) > 3000
    assert 0.1 <= len(dataset.test) / (len(dataset.train) + len(dataset.test)) < 0.12
    train, test = (data.as_float(part).flatten(1) for part in (dataset.train, dataset.test))
    assert torch.cdist(test, train).min() / 3072**0.5 >= 0.08
