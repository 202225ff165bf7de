"""Nothing is lost: kills, two trainers on one folder, full memory, numbers that are none."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qcsbm_fast import cli
from qcsbm_fast.train import build, checkpoint, report, run
from qcsbm_fast.train.config import Checkpoint, Config, Evaluation
from qcsbm_fast.train.errors import CheckpointError, ConfigError, NonFiniteError, RunError
from qcsbm_fast.train.folder import create
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.stats import read
from qcsbm_fast.train.trainer import Trainer
from test_trainer import LeastSquares, assert_same, make_trainer, record, weights


def tiny(steps: int, **changes: Any) -> Config:
    base = PRESETS["checkerboard"]
    settings = {
        "log_every": 7,
        "data": dataclasses.replace(base.data, points=300),
        "optim": dataclasses.replace(base.optim, steps=steps, batch_size=32, ema=0.99),
        "evaluation": Evaluation(every=50, points=20, levels=2),
        "checkpoint": Checkpoint(every=10, keep=2),
        "device": "cpu",
    }
    return dataclasses.replace(base, **{**settings, **changes})


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)


def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    """A run killed (SIGKILL) 20 times at random moments ends bit for bit as an undisturbed one."""
    config = tiny(400, checkpoint=Checkpoint(every=5, keep=2))
    whole, killed = (create(config, tmp_path / name) for name in ("whole", "killed"))
    program = [sys.executable, str(Path(__file__).parent / "kill_loop.py")]
    result = subprocess.run(
        [*program, str(whole.path), str(killed.path), "20"], capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "kills: 20" in result.stdout
    assert record(killed) == record(whole)
    a, b = (checkpoint.load(checkpoint.find(folder.checkpoints)) for folder in (whole, killed))
    assert a["trainer"]["steps_done"] == 400
    assert_same(a, b)
    assert not list(killed.checkpoints.glob("*.tmp"))


def test_two_trainers_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = create(tiny(3), tmp_path / "run")
    before = (folder.path / "config.yaml").read_bytes()
    with folder.lock():
        command = ["train", "--resume", str(folder.path), "--steps", "5"]
        assert cli.main(command) == 1
        message = f"{folder.path}: process {os.getpid()} on "
        assert message in capsys.readouterr().err
        assert (folder.path / "config.yaml").read_bytes() == before
    assert cli.main(command) == 0
    assert checkpoint.steps(folder.checkpoints) == [5]


def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = (create(tiny(30), tmp_path / name) for name in ("whole", "damaged"))
    assert run.train(whole.read_config(), whole)
    assert run.train(tiny(20), damaged)
    path = checkpoint.find(damaged.checkpoints)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    capsys.readouterr()
    assert run.train(tiny(30), damaged)
    output = capsys.readouterr().out
    assert f"{path}: damaged: the checksum" in output
    assert "It is set aside; going on from step 10" in output
    assert path.with_suffix(".pt.damaged").exists()
    assert_same(*(checkpoint.load(checkpoint.find(f.checkpoints)) for f in (whole, damaged)))


def test_the_best_by_held_out_loss_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.2, 0.4, 0.3])
    names = ("test_asym", "test_nasym", "test_dsm_error", "test_asym_error", "test_nasym_error")
    monkeypatch.setattr(
        run, "evaluate", lambda *_, **__: {"test_dsm": next(values), **dict.fromkeys(names, 0.0)}
    )
    folder = create(tiny(30), tmp_path / "run")
    evaluation = Evaluation(every=5, points=20, levels=2)
    run.train(tiny(15, evaluation=evaluation), folder)
    run.train(tiny(20, evaluation=evaluation), folder)
    best = checkpoint.load(folder.checkpoints / checkpoint.BEST)
    assert best["trainer"]["steps_done"] == 10


def test_a_full_disk_stops_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create(tiny(30), tmp_path / "run")
    save = torch.save

    def full(state: dict, file: Any) -> None:
        save(state, file)
        if state["trainer"]["steps_done"] == 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"step-00000020.pt: cannot be written: No space left on device"
    ):
        run.train(folder.read_config(), folder)
    monkeypatch.undo()
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)
    assert checkpoint.steps(folder.checkpoints) == [10]
    assert run.train(folder.read_config(), folder)


def test_a_folder_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--preset", "checkerboard", "--steps", "2", "--out", "/proc/qcsbm/run"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("qcsbm: /proc/qcsbm/run: cannot be made: ")
    assert "--out" in errors


def skipping(spoil: dict[int, str]) -> tuple[Trainer, LeastSquares]:
    objective = LeastSquares(spoil)
    trainer = make_trainer(objective)
    trainer.optim = dataclasses.replace(trainer.optim, nonfinite="skip")
    return trainer, objective


def test_bad_steps_are_skipped_and_counted_if_asked() -> None:
    trainer, objective = skipping({3: "bias", 5: "loss"})
    clean = make_trainer(LeastSquares())
    for _ in range(6):
        trainer.step()
    losses = []
    for skipped in (False, False, True, False, True, False):
        if skipped:
            next(clean._batches)
        else:
            clean.step()
            losses.append(clean.read_statistics()["loss"])
    assert all(torch.equal(a, b) for a, b in zip(weights(objective), weights(clean.objective), strict=True))
    statistics = trainer.read_statistics()
    assert statistics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert trainer.skipped == 2
    assert all(average.isfinite().all() for average in weights(trainer.ema.module))
    state = trainer.state_dict()
    again, _ = skipping({})
    again.load_state_dict(state)
    assert again.skipped == 2


def test_nothing_but_bad_steps_is_an_error() -> None:
    trainer, _ = skipping(dict.fromkeys(range(3, 9), "loss"))
    for _ in range(2):
        trainer.step()
    trainer.read_statistics()
    for _ in range(4):
        trainer.step()
    with pytest.raises(NonFiniteError, match="step 3: the loss is inf"):
        trainer.read_statistics()


def test_skipped_steps_are_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def spoil(self: Trainer) -> None:
        data = self._batches._data
        if self.steps_done in (3, 8):
            self._batches._data = data * torch.nan
        step(self)
        self._batches._data = data

    monkeypatch.setattr(Trainer, "step", spoil)
    base = tiny(14)
    config = dataclasses.replace(base, optim=dataclasses.replace(base.optim, nonfinite="skip"))
    folder = create(config, tmp_path / "run")
    assert run.train(config, folder)
    assert [row["skipped"] for row in record(folder)] == [1, 2]
    saved = checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]
    for part in (saved["score"], saved["ema"]["module"]):
        assert all(value.isfinite().all() for value in part.values())


def test_bad_data_are_named_before_the_first_step(tmp_path: Path) -> None:
    config = tiny(5)
    setup = build.build(config)
    setup.train[[7, 9], 0] = torch.tensor([torch.inf, torch.nan])
    with pytest.raises(ConfigError, match=r"data: 2 of 300 training samples .* the first is number 7"):
        run.train(config, create(config, tmp_path / "run"), setup)


def test_out_of_memory_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(self: Trainer) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Trainer, "step", greedy)
    base = tiny(5)
    config = dataclasses.replace(base, penalty=dataclasses.replace(base.penalty, probes=4, exact=False))
    with pytest.raises(RunError, match="out of memory") as error:
        run.train(config, create(config, tmp_path / "run"))
    for text in ("--optim.accumulate (now 1)", "--penalty.probes (now 4)", "--penalty.fraction (now 1)",
                 "--optim.batch-size (now 32)", "--precision bfloat16", "--penalty.probe-chunk 1"):  # fmt: skip
        assert text in str(error.value)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kind="unconstrained"))
    with pytest.raises(RunError, match="out of memory") as error:
        run.train(config, create(config, tmp_path / "other"))
    assert "penalty" not in str(error.value)


def test_a_damaged_record_is_read_up_to_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    lines = "".join(json.dumps(row) + "\n" for row in good).encode()
    for tail in (b"", b'{"step"', b"7\n", b'{"loss": 1.0}\n', b"\xff\xfe\n", b'{"step": "x"}\n'):
        path.write_bytes(lines + tail)
        assert read(path) == good
