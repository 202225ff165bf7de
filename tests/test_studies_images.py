"""The image study on a handful of digits: what branches from what, what it writes, that it does nothing twice."""

from __future__ import annotations

import dataclasses
import json

import torch

from qcsbm_fast.studies import images
from qcsbm_fast.studies.evaluation import Settings
from qcsbm_fast.train import checkpoint
from qcsbm_fast.train.config import Evaluation, Model, Optim, Sampling
from qcsbm_fast.train.folder import RunFolder
from qcsbm_fast.train.presets import PRESETS

BASE = dataclasses.replace(
    PRESETS["digits"],
    device="cpu",
    precision="float32",
    model=Model(network="image-mlp", width=16, depth=1),
    optim=Optim(batch_size=16, lr=1e-3, ema=0.0),
    evaluation=Evaluation(every=0, points=10, levels=2),
    sampling=Sampling(count=4, steps=4),
)
FEW = Settings(points=10, levels=2, probes=1, oracle_points=4, nll_points=2, repeats=1, samples=8)


def first_weight(folder: RunFolder, step: int) -> torch.Tensor:
    state = checkpoint.load(checkpoint.find(folder.checkpoints, step))["trainer"]["ema"]["module"]
    return next(value for name, value in sorted(state.items()) if value.ndim == 2)


def test_kinds_branch_from_one_trunk_and_nothing_is_done_twice(tmp_path, monkeypatch) -> None:
    arguments = {"seeds": (0,), "first_steps": 4, "more_steps": 3, "settings": FEW}
    rows = images.reproduce(tmp_path, BASE, **arguments)
    assert [row["kind"] for row in rows] == list(images.KINDS)
    folders = {kind: RunFolder(tmp_path / f"{kind}-0") for kind in images.KINDS}
    trunk = first_weight(RunFolder(tmp_path / "trunk-0"), 4)
    for kind in ("unconstrained", "quasi-conservative"):
        assert checkpoint.steps(folders[kind].checkpoints) == [4, 7]
        assert torch.equal(first_weight(folders[kind], 4), trunk)
        assert folders[kind].read_config().model.kind == kind
    assert checkpoint.steps(folders["conservative"].checkpoints) == [7]
    # the penalty makes a difference, but only that
    free, tied = (first_weight(folders[kind], 7) for kind in ("unconstrained", "quasi-conservative"))
    assert 0 < (free - tied).abs().max() < (free - trunk).abs().max()

    table = (tmp_path / "table.md").read_text()
    assert f"{rows[0]['values']['bits_per_dim'][0]:.4g}" in table
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "comparison.png").stat().st_size > 10_000

    monkeypatch.setattr(images.run, "train", None)
    monkeypatch.setattr(images, "evaluate_run", None)
    assert images.reproduce(tmp_path, BASE, **arguments) == rows
