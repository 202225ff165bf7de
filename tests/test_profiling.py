"""`qcsbm bench profile`, on the CPU."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from qcsbm_fast.cli import main
from qcsbm_fast.train import profiling


def calls(table: Path) -> dict[str, float]:
    """Calls per step by operation."""
    rows = [[*line[56:].split(), line[:56].strip()] for line in table.read_text().splitlines()[1:]]
    return {row[-1]: float(row[2]) for row in rows}


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of training takes one asymmetry and one Adam, a step of sampling one corrector and one predictor."""
    command = ["bench", "profile", "--preset", "checkerboard", "--batch-size", "32", "--steps", "3"]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("On the CPU, ")
    assert "no GPU kernel is in these figures; checkerboard, batch 32, float32" in text
    train, sample = (calls(tmp_path / "out" / f"{name}.txt") for name in ("train", "sample"))
    assert (train["qcsbm::asymmetry"], train["aten::_fused_adam_"]) == (1.0, 1.0)
    assert (sample["qcsbm::langevin_step"], sample["qcsbm::sde_step"]) == (1.0, 1.0)
    for name in ("train", "sample"):
        events = json.loads((tmp_path / "out" / f"{name}.json").read_text())["traceEvents"]
        assert any("qcsbm::" in event.get("name", "") for event in events)
    ncu, nsys = (line for line in text.splitlines() if line.startswith(("  ncu ", "  nsys ")))
    for line in (ncu, nsys):
        words = shlex.split(line)
        program = words[words.index("qcsbm_fast") + 1 :]
        assert program[:7] == ["bench", "profile", "--preset", "checkerboard", "--batch-size", "32", "--bare"]


def test_bare_steps_run_without_the_profiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "profile", None)
    command = ["bench", "profile", "--preset", "spirals", "--batch-size", "16", "--steps", "2", "--bare"]
    assert main([*command, "--device", "cpu"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["train", "sample"]


def test_shares_are_of_all_the_time(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    rows = profiling.operations(lambda: (x @ x).relu_(), tmp_path / "trace.json", gpu=False)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.name: row.calls for row in rows}["aten::mm"] == 1
    assert rows == sorted(rows, key=lambda row: -row.seconds)


def test_what_excludes_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["runs/x", "--preset", "digits"], "RUN and --preset exclude each other"),
        (["--steps", "1"], "--steps should be 2 or more, got 1"),
        (["--batch-size", "0"], "--batch-size should be 1 or more, got 0"),
    ):
        try:
            status = main(["bench", "profile", *arguments])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert told in capsys.readouterr().err


def test_the_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel in `kernels/` that is launched, and the namespace of those in `csrc/cuda`."""
    import re

    root = Path(__file__).parents[1]
    launched = set()
    for path in (root / "kernels").glob("*.py"):
        launched |= set(re.findall(r"^\s+(\w+)\[(?:tiles\.grid|lambda meta|\(1,\))", path.read_text(), re.M))
    assert launched
    for name in launched:
        assert re.search(profiling.KERNELS, name), name
    for path in (root / "csrc" / "cuda").glob("*.cu"):
        if "__global__" in path.read_text():
            assert "namespace qcsbm::cuda {" in path.read_text(), path.name
