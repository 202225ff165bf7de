"""Checkpoints are whole or absent, and reading one runs no code; the record of a run has no step twice."""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path
from typing import IO

import pytest
import torch

from malicious import Malicious
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
        raise OSError(5, "power cut")

    def write_half(_: object, file: IO[bytes]) -> None:
        file.write(b"half a checkpoint")
        crash()

    with monkeypatch.context() as patch:
        if where == "before the rename":
            patch.setattr(os, "replace", crash)
        else:
            patch.setattr(torch, "save", write_half)
        with pytest.raises(CheckpointError, match=r"step-00000002.pt: cannot be written: power cut"):
            checkpoint.save(tmp_path, 2, state(2.0), keep=1)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load(checkpoint.find(tmp_path))["weights"][0] == 1.0
    # what the crash left behind is in nobody's way
    checkpoint.save(tmp_path, 2, state(2.0), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.pt"]


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name, dump, message in (
        ("torch.pt", torch.save, "refused: it holds something other than"),
        ("plain.pt", lambda x, p: p.write_bytes(pickle.dumps(x, 2)), "or not a checkpoint"),
    ):
        dump({"weights": Malicious(trace)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name}: .*{message}"):
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


def reloaded(path: Path, whole: dict) -> str:
    """ "refused", "the same", or "wrong" if what is loaded differs from `whole`."""
    try:
        loaded = checkpoint.load(path)
    except CheckpointError as error:
        return "refused" if path.name in str(error) else "nameless"
    return "the same" if same(loaded, whole) else "wrong"


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.filterwarnings("ignore")  # zipfile's, of records that seem to lie on each other
def test_no_damage_is_loaded(tmp_path: Path) -> None:
    """A file cut at 20 places, and 200 times one flipped bit: refused, or harmless, but never loaded wrong."""
    whole = state(1.5) | {"matrix": torch.arange(400.0).view(20, 20), "bytes": torch.arange(64).byte()}
    path = checkpoint.save(tmp_path, 1, whole, keep=1)
    data = path.read_bytes()
    assert reloaded(path, whole) == "the same"
    outcomes = []
    for place in torch.linspace(0, len(data) - 1, 20).long().tolist():
        path.write_bytes(data[:place])
        outcomes.append(reloaded(path, whole))
    assert outcomes == ["refused"] * 20
    places = torch.randint(8 * len(data), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        outcomes.append(reloaded(path, whole))
    assert set(outcomes) <= {"refused", "the same"}
    assert outcomes.count("refused") > 100


def test_the_one_before_a_damaged_one_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    for step in (3, 2):
        path = checkpoint.find(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-200])
        assert checkpoint.read(tmp_path)["weights"][0] == step - 1
        assert f"{path}: damaged" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.read(tmp_path, step)
        loaded, problems = checkpoint.load_newest(tmp_path, rename=step == 2)
        assert loaded["weights"][0] == step - 1
    assert checkpoint.read(tmp_path)["weights"][0] == 1
    assert [problem.split(": ")[0] for problem in problems] == [
        str(tmp_path / f"step-0000000{step}.pt") for step in (3, 2)
    ]
    (tmp_path / "step-00000004.tmp").write_bytes(b"half")
    checkpoint.remove_halves(tmp_path)
    names = ["step-00000001.pt", "step-00000002.pt.damaged", "step-00000003.pt.damaged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    # a damaged one takes nobody's place among those that are kept
    checkpoint.save(tmp_path, 2, state(2), keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000002.pt: damaged(.|\n)*step-00000001.pt: damaged"):
        checkpoint.load_newest(tmp_path)


def test_the_best_stands_apart(tmp_path: Path) -> None:
    checkpoint.save_best(tmp_path, state(7.0))
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=1)
    assert checkpoint.steps(tmp_path) == [2]
    assert checkpoint.load(tmp_path / checkpoint.BEST)["weights"][0] == 7.0


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    """A limit on the size of files fails writes in the middle, as a full disk does."""
    checkpoint.save(tmp_path, 1, state(1.0), keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002\.pt: cannot be written: File too large"):
            checkpoint.save(tmp_path, 2, {"weights": torch.ones(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert checkpoint.load(checkpoint.find(tmp_path))["weights"][0] == 1.0


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
