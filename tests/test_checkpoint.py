"""Checkpoints are whole or absent, and reading one runs no code; the record of a run has no step twice."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import IO

import pytest
import torch

from qcsbm_fast.train import checkpoint
from qcsbm_fast.train.errors import CheckpointError
from qcsbm_fast.train.stats import Statistics, read


def state(value: float) -> dict:
    return {
        "weights": torch.full((3,), value),
        "step": 4,
        "nested": {"rate": 0.1, "names": ["a"], "none": None},
    }


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new", 4, state(2.5), keep=1)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["weights"], torch.full((3,), 2.5))
    assert loaded["nested"] == {"rate": 0.1, "names": ["a"], "none": None}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [20, 100]
    assert checkpoint.load(checkpoint.find(tmp_path))["weights"][0] == 100
    assert checkpoint.load(checkpoint.find(tmp_path, 20))["weights"][0] == 20
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 10; there are: 20, 100"):
        checkpoint.find(tmp_path, 10)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.find(tmp_path / "absent")


@pytest.mark.parametrize("where", ["before the rename", "in the middle of writing"])
def test_a_crash_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    checkpoint.save(tmp_path, 1, state(1.0), keep=1)

    def crash(*_: object) -> None:
        raise OSError("power cut")

    def write_half(_: object, file: IO[bytes]) -> None:
        file.write(b"half a checkpoint")
        crash()

    with monkeypatch.context() as patch:
        if where == "before the rename":
            patch.setattr(os, "replace", crash)
        else:
            patch.setattr(torch, "save", write_half)
        with pytest.raises(OSError, match="power cut"):
            checkpoint.save(tmp_path, 2, state(2.0), keep=1)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load(checkpoint.find(tmp_path))["weights"][0] == 1.0
    # what the crash left behind is in nobody's way
    checkpoint.save(tmp_path, 2, state(2.0), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.pt"]


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name, dump in (
        ("torch.pt", torch.save),
        ("plain.pt", lambda x, p: p.write_bytes(pickle.dumps(x, 2))),
    ):
        dump({"weights": Malicious(trace)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name}: refused: it holds something other than"):
            checkpoint.load(tmp_path / name)
        assert not trace.exists()


def test_damage_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, state(1.0), keep=1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt: "):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "absent.pt")


def test_statistics_have_each_step_once(tmp_path: Path) -> None:
    first = Statistics(tmp_path, 0)
    for step in (10, 20, 30):
        first.write(step, {"loss": step / 10})
    first.write(30, {"test_dsm": 0.5})
    first.close()
    # killed after step 30, its last checkpoint being that of step 20, in the middle of a line
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 40, "lo')

    second = Statistics(tmp_path, 20)
    second.write(30, {"loss": 7.0})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 7.0}]
    assert rows == read(tmp_path / "stats.jsonl") == second.rows


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    statistics = Statistics(tmp_path, 0)
    statistics.write(10, {"loss": 1.5})
    statistics.write(20, {"loss": 1.25, "test_nasym": 0.5})
    statistics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.5), (20, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("held-out/nasym")] == [(20, 0.5)]
