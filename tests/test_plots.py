"""The pictures show the numbers they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from qcsbm_fast.train import plots


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_in_its_cell(tmp_path: Path, channels: int) -> None:
    images = torch.rand(7, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    plots.image_grid(tmp_path / "grid.png", images)
    picture = imread(tmp_path / "grid.png")[..., :3]
    scale = picture.shape[1] // (3 * 9 + 1)  # 3 x 3 cells of 8 pixels and a gap of 1
    assert picture.shape[:2] == (28 * scale, 28 * scale)
    pixels = picture[scale // 2 :: scale, scale // 2 :: scale]
    for index in range(9):
        top, left = 1 + index // 3 * 9, 1 + index % 3 * 9
        shown = pixels[top : top + 8, left : left + 8]
        given = (
            images[index].clamp(0, 1).permute(1, 2, 0).expand(8, 8, 3) if index < 7 else torch.ones(8, 8, 3)
        )
        assert np.abs(shown - given.numpy()).max() < 0.01  # 8 bits a channel


def test_smoothing_keeps_lines_and_means() -> None:
    line = np.linspace(3.0, -2.0, 101)
    np.testing.assert_allclose(plots._smooth(line)[2:-2], line[2:-2], atol=1e-12)
    np.testing.assert_allclose(plots._smooth(np.full(77, 0.3)), 0.3, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=4000)
    assert plots._smooth(noise)[100:-100].std() == pytest.approx(201**-0.5, rel=0.3)  # 201 values a mean
    assert plots._smooth(np.array([2.0])).tolist() == [2.0]
    assert plots._smooth(np.array([])).tolist() == []


def test_curves_are_drawn_whatever_was_recorded(tmp_path: Path) -> None:
    plain = [{"step": 10, "dsm": 2.0}, {"step": 20, "dsm": 1.0}]
    conservative = [*plain, {"step": 30, "test_dsm": 1.0, "test_asym": 0.0, "test_nasym": 0.0}]
    for row in conservative[2:]:
        row.update({f"{name}_error": 0.0 for name in ("test_dsm", "test_asym", "test_nasym")})
    for index, rows in enumerate(([], plain, conservative)):
        plots.curves(tmp_path / f"{index}.png", rows, "title", averaged=False)
    pictures = [imread(tmp_path / f"{index}.png") for index in range(3)]
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[1] != pictures[2]).any()


def test_the_field_is_drawn_where_it_vanishes_too(tmp_path: Path) -> None:
    axis = torch.linspace(-10, 10, 5)
    points = torch.cartesian_prod(axis, axis)
    plots.vector_field(tmp_path / "field.png", points, -points, "title")
    colours = imread(tmp_path / "field.png")[..., :3].reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50
