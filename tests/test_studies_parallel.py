"""Pieces of a study in processes of their own: all of them are done, what they print is kept, a failure is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from qcsbm_fast.studies.parallel import run_all
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.interrupt import Interrupt


def work(folder: Path, value: int) -> None:
    print(f"value {value}")
    if value < 0:
        raise ValueError("a negative value")
    folder.mkdir()
    (folder / "result").write_text(f"{value**2} {os.getpid()} {torch.get_num_threads()}")


def train_until_told(folder: Path) -> None:
    """As a training: told to stop, it saves and says that it is not done."""
    folder.mkdir()
    with Interrupt() as interrupt:
        (folder / "started").touch()
        while not interrupt.received:
            time.sleep(0.01)
        (folder / "saved").write_text(interrupt.received.name)
    raise RunError("interrupted")


def done_in(folder: Path) -> int:
    return len(list(folder.glob("*/result")))


def test_every_piece_is_done_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = {tmp_path / f"p{i}.5": (tmp_path / f"p{i}.5", i) for i in range(3)}
    run_all(work, pieces, workers=2, total=3, done=lambda: done_in(tmp_path))
    found = [(folder / "result").read_text().split() for folder in pieces]
    assert [row[0] for row in found] == ["0", "1", "4"]
    assert len({row[1] for row in found} | {str(os.getpid())}) == 4
    assert {int(row[2]) for row in found} == {max(1, torch.get_num_threads() // 2)}
    assert (tmp_path / "p1.5.log").read_text() == "value 1\n"
    assert "3/3" in capsys.readouterr().err


def test_a_failure_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"bad failed: see .*bad\.log"):
        run_all(work, {tmp_path / "bad": (tmp_path / "bad", -1)}, workers=2, total=1, done=lambda: 0)
    assert "ValueError: a negative value" in (tmp_path / "bad.log").read_text()


def test_an_interrupted_study_lets_its_trainings_save(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def interrupt() -> None:
        while not (folder / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(RunError, match="the same command goes on where it stopped"):
        run_all(train_until_told, {folder: (folder,)}, workers=2, total=1, done=lambda: 0)
    assert (folder / "saved").read_text() == "SIGTERM"


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    run_all(work, {tmp_path / "p": (tmp_path / "p", 3)}, workers=1, total=1, done=lambda: 0)
    assert (tmp_path / "p" / "result").read_text().split()[1] == str(os.getpid())
