"""The command line: what it says, what it leaves behind, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from command_line import call
from qcsbm_fast import cli
from qcsbm_fast.commands import train
from qcsbm_fast.train import checkpoint, run
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.errors import NonFiniteError
from qcsbm_fast.train.folder import create, open_run

TINY = """
    --steps 6 --optim.batch-size 32 --log-every 2 --checkpoint.every 4 --device cpu
    --evaluation.points 20 --evaluation.levels 2 --evaluation.every 0 --sampling.count 20 --sampling.steps 5
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def settings(arguments: str) -> Config:
    command = cli._parse(["train", *arguments.split()])
    assert isinstance(command, train.Command)
    return command.settings


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ["train", "sample", "info", "qcsbm train --preset checkerboard"]),
        ("--help", ["train", "sample", "info"]),
        (
            "train --help",
            ["--kind", "--steps INT", "(default: digits)", "--resume RUN", "--penalty.fraction"],
        ),
        ("train --preset spirals --help", ["(default: 2000)", "(default: 0.00075)", "(default: spirals)"]),
        ("sample --help", ["RUN", "--sampler {pc,ode,heun}", "--count INT", "(default: the newest)"]),
        ("info --help", ["how the package was built"]),
    ],
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], arguments: str, expected: list[str]) -> None:
    status, output, _ = call(capsys, *arguments.split())
    assert status == 0
    for text in expected:
        assert text in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "trian",
            "Unrecognized options: trian\nAvailable subcommands: train, sample, evaluate, compare, "
            "reproduce, convert, bench, info",
        ),
        ("train --preset moons", "invalid choice 'moons' for argument '--preset'"),
        ("train --kind free", "invalid choice 'free' for argument '--kind/--model.kind'"),
        ("train --optim.lr fast", "Error parsing --optim.lr: could not convert string to float: 'fast'"),
        ("train --optim.lr -1", "optim.lr should be greater than 0, got -1.0"),
        ("train --penalty.probes 0", "penalty.probes should be greater than or equal to 1, got 0"),
        ("train --penalty.fracton 1", "Perhaps you meant: --penalty.fraction FLOAT"),
        ("train --config", "Missing value for argument '--config'"),
        ("train --config absent.yaml", "absent.yaml: cannot be read: No such file or directory"),
        ("train --data.name digits --preset spirals", "model.network: toy-mlp is for points of the plane"),
        ("train --device tpu", "device: cannot use 'tpu'"),
        ("train --resume absent", "absent: not a run folder"),
        ("train --resume a --out b", "--resume and --out exclude each other"),
        ("sample", "Missing from qcsbm sample: RUN"),
        ("sample absent --seed -1", "qcsbm: --seed should be 0 or more"),
        ("sample absent", "absent: not a run folder"),
    ],
)
def test_errors_are_a_line_or_two(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    status, output, errors = call(capsys, *arguments.split())
    assert status in (1, 2)
    assert message in errors
    assert errors.startswith("qcsbm: ")
    assert len(errors.splitlines()) <= 2
    assert "Traceback" not in errors + output
    assert not Path("runs").exists()


def test_the_more_specific_setting_wins() -> None:
    Path("mine.yaml").write_text("preset: spirals\noptim: {steps: 7, lr: 1e-3}")
    config = settings("--config mine.yaml --steps 8 --penalty.balancing_factor 2")
    assert (config.preset, config.optim.steps, config.optim.lr) == ("spirals", 8, 1e-3)
    assert (config.penalty.balancing_factor, config.sde.sigma_max) == (2.0, 3.0)
    config = settings("--preset=eight-gaussians --config=mine.yaml --kind conservative")
    assert (config.preset, config.optim.steps) == ("eight-gaussians", 7)
    assert config.model.kind == "conservative"
    assert config.model.conservative_activation == "leaky_relu"


def test_train_and_sample_points(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--preset", "checkerboard", "--data.points", 300, *TINY.split())
    status, output, errors = call(capsys, "train", *arguments)
    assert status == 0, errors
    path = Path("runs/checkerboard-quasi-conservative-1")
    for name in ("samples.png", "curves.png", "field.png"):
        assert imread(path / name)[..., :3].std() > 0.01, name
    assert any((path / "tensorboard").iterdir())
    rows = [json.loads(line) for line in (path / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"loss", "dsm", "penalty", "asym", "grad_norm", "lr", "images", "seconds"} <= rows[0].keys()
    assert {"test_dsm", "test_asym", "test_nasym", "test_nasym_error"} <= rows[-1].keys()
    for text in ("DSM loss", "Asym", "NAsym", f"qcsbm sample {path}", f"tensorboard --logdir {path}"):
        assert text in output
    assert f"qcsbm train --config {path}/config.yaml --kind unconstrained" in output

    # the same command again is another run; the same folder is refused
    again = ("train", *arguments, "--out", path)
    status, _, errors = call(capsys, *again)
    assert status == 1
    assert f"--resume {path}" in errors

    status, output, errors = call(capsys, "train", "--resume", path, "--steps", 8)
    assert status == 0, errors
    assert checkpoint.steps(open_run(path).checkpoints) == [4, 6, 8]
    (path / "samples.png").unlink()
    status, output, errors = call(capsys, "train", "--resume", path)  # at its end: only the report again
    assert status == 0, errors
    assert imread(path / "samples.png")[..., :3].std() > 0.01
    assert "8 steps, 256 samples seen" in output
    status, _, errors = call(capsys, "train", "--resume", path, "--kind", "conservative")
    assert status == 1
    assert "model.kind (quasi-conservative -> conservative) cannot change" in errors

    status, output, errors = call(capsys, "sample", path, "--count", 9, "--checkpoint", 6, "--out", "a/b.png")
    assert status == 0, errors
    first = np.load("a/b.npz")["samples"]
    assert first.shape == (9, 2)
    assert np.isfinite(first).all()
    assert "9 samples: a/b.png and a/b.npz" in output
    call(capsys, "sample", "--count", 9, "--checkpoint", 6, path)  # the run's own sampler, seed 0 again
    assert np.array_equal(np.load(path / "drawn-6-ode.npz")["samples"], first)
    call(capsys, "sample", path, "--count", 9, "--checkpoint", 6, "--seed", 1, "--sampler", "pc")
    assert not np.allclose(np.load(path / "drawn-6-pc.npz")["samples"], first)
    status, _, errors = call(capsys, "sample", path, "--checkpoint", 5)
    assert status == 1
    assert "no checkpoint of step 5; there are: 4, 6, 8" in errors


@pytest.mark.parametrize("kind", ["unconstrained", "conservative"])
def test_train_and_sample_images(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    arguments = ("--kind", kind, "--model.nf", 8, "--out", "run", *TINY.split())
    status, output, errors = call(capsys, "train", *arguments)
    assert status == 0, errors
    assert "samples.png should look like the data" in output
    assert not Path("run/field.png").exists()
    assert call(capsys, "sample", "run", "--count", 4)[0] == 0
    assert np.load("run/drawn-6-pc.npz")["samples"].shape == (4, 1, 8, 8)
    last = json.loads(Path("run/stats.jsonl").read_text().splitlines()[-1])
    if kind == "conservative":  # symmetric up to rounding
        assert 0.0 <= last["test_nasym"] < 1e-8
        assert "by construction" in output
    else:
        assert 0.0 < last["test_nasym"] <= 1.0


def test_a_run_that_diverges_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise NonFiniteError(13, float("nan"), "network.head.weight")

    monkeypatch.setattr(run, "train", diverge)
    status, _, errors = call(capsys, "train", "--out", "run", "--optim.lr", 0.4)
    assert status == 1
    assert errors.splitlines() == [
        "qcsbm: step 13: the loss is nan and the gradient of network.head.weight is not finite",
        "No checkpoint yet; to try again with smaller steps: qcsbm train --resume run --optim.lr 0.1",
    ]


def test_a_checkpoint_with_code_in_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    folder = create(settings(""), Path("run"))
    folder.checkpoints.mkdir()
    torch.save({"trainer": Path}, folder.checkpoints / "step-00000001.pt")
    status, _, errors = call(capsys, "sample", "run")
    assert status == 1
    assert "refused: it holds something other than plain tensors" in errors


def test_module_and_start(tmp_path: Path) -> None:
    """`python -m qcsbm_fast` is the same program, and help loads nothing heavy."""
    code = (
        "import sys, runpy; sys.argv = ['qcsbm', 'train', '--help']\n"
        "try: runpy.run_module('qcsbm_fast', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'matplotlib', 'sklearn', 'tensorboard', 'scipy.integrate'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "qcsbm train [-h]" in result.stdout
