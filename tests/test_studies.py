"""The 2-D study on a handful of points: what it writes, and that it does nothing twice."""

from __future__ import annotations

import json

import pytest

from qcsbm_fast.studies import toy2d

COMBINATIONS = {"densities": ["spirals"], "kinds": ["unconstrained", "quasi-conservative"], "seeds": [0]}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(toy2d, "_POINTS", 50)
    monkeypatch.setattr(toy2d, "_LEVELS", 2)


def test_study_writes_table_numbers_and_pictures_once(tmp_path, small, monkeypatch):
    rows = toy2d.reproduce(tmp_path, **COMBINATIONS, factors=[0.1, 10.0], steps=1)
    assert [(r["kind"], r["factor"]) for r in rows] == [
        ("unconstrained", 0.0),
        ("quasi-conservative", 0.1),
        ("quasi-conservative", 10.0),
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    table = (tmp_path / "table.md").read_text()
    assert f"{rows[0]['nll']:.4g}" in table
    assert table.count("| quasi-conservative |") == 1  # the second factor is for the sweep only
    assert f"| 10 | {rows[2]['loss']:.4g} |" in table
    for picture in ("samples.png", "fields.png", "factors.png"):
        assert (tmp_path / picture).stat().st_size > 10_000

    monkeypatch.setattr(toy2d.run, "train", None)  # a second call must not train
    assert toy2d.reproduce(tmp_path, **COMBINATIONS, factors=[0.1, 10.0], steps=1) == rows


def test_table_shows_mean_and_half_the_range():
    base = dict.fromkeys(toy2d.COLUMNS, 1.0) | {"density": "spirals", "kind": "unconstrained", "factor": 0.0}
    table = toy2d.format_table([{**base, "nll": 4.0}, {**base, "nll": 5.0}], 0.1)
    assert "| 4.5 ± 0.5 |" in table
