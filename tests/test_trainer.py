"""The trainer: its arithmetic against closed forms, and that nothing is lost when it stops."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.train import checkpoint, report, run
from qcsbm_fast.train.batches import Batches
from qcsbm_fast.train.config import Checkpoint, Config, Evaluation, Optim, Sampling
from qcsbm_fast.train.ema import EMA
from qcsbm_fast.train.errors import NonFiniteError, RunError
from qcsbm_fast.train.folder import RunFolder, check_continues, create, open_run
from qcsbm_fast.train.interrupt import Interrupt
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second each and are the business of the tests of the command line."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)


class Result(NamedTuple):
    loss: Tensor
    stats: dict[str, Tensor]


class LeastSquares(nn.Module):
    """mean (x . w + b - 1)^2, and nan in the gradient of b or in the loss at the calls it is told to."""

    def __init__(self, spoil: dict[int, str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(3, 1)
        self.spoil = spoil or {}
        self.calls = 0

    def forward(self, x0: Tensor) -> Result:
        self.calls += 1
        loss = (self.score(x0) - 1.0).square().mean()
        kind = self.spoil.get(self.calls)
        if kind == "bias":
            bias = self.score.bias.sum()
            loss = loss + (torch.sqrt(bias - bias.detach()) * 0.0)  # its value is 0, its derivative 0 * inf
        elif kind == "loss":
            loss = loss + torch.full((), torch.inf)
        return Result(loss, {"loss": loss.detach()})


def make_trainer(objective: LeastSquares, **settings: float) -> Trainer:
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    optim = Optim(**{"batch_size": 16, "lr": 0.05, "ema": 0.9, **settings})  # pyright: ignore[reportArgumentType]
    return Trainer(objective, data, optim, stream=NoiseStream(0), seed=0)  # pyright: ignore[reportArgumentType]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_steps_are_those_of_adam_with_clipping_and_warmup() -> None:
    objective = LeastSquares()
    trainer = make_trainer(objective, clip=0.3, warmup=4)
    reference = LeastSquares()
    adam = torch.optim.Adam(reference.parameters(), lr=1.0)
    batches = Batches(trainer._batches._data, 16, seed=0)
    norms = []
    for step in range(1, 8):
        trainer.step()
        adam.param_groups[0]["lr"] = 0.05 * min(1.0, step / 4)
        adam.zero_grad()
        reference(next(batches)).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(reference.parameters(), 0.3).item())
        adam.step()
    assert max(norms) > 0.3  # the clip does something
    for ours, theirs in zip(weights(objective), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert trainer.read_statistics()["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-6)
    assert [trainer.learning_rate(step) for step in (1, 2, 4, 5)] == pytest.approx(
        [0.0125, 0.025, 0.05, 0.05]
    )
    assert trainer.images == 7 * 16


def test_accumulated_gradients_are_the_batchs() -> None:
    whole, parts = LeastSquares(), LeastSquares()
    trainers = make_trainer(whole, clip=0.0), make_trainer(parts, clip=0.0, accumulate=4)
    for _ in range(5):
        for trainer in trainers:
            trainer.step()
    assert parts.calls == 4 * whole.calls
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    statistics = [trainer.read_statistics() for trainer in trainers]
    assert statistics[0]["loss"] == pytest.approx(statistics[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_ema_is_its_closed_form(decay: float) -> None:
    source = nn.Linear(2, 2)
    ema = EMA(source, decay)
    history = [weights(source)]
    for step in range(40):
        with torch.no_grad():
            for p in source.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        ema.update()
        history.append(weights(source))
    # average = sum_k (1 - d_k) prod_{j > k} d_j w_k, with d_0 = 0 for the initial weights
    decays = [0.0] + [min(decay, (1 + n) / (10 + n)) for n in range(1, 41)]
    for index, average in enumerate(weights(ema.module)):
        expected, remaining = torch.zeros_like(average, dtype=torch.float64), 1.0
        for d, w in zip(reversed(decays), reversed(history), strict=True):
            expected += remaining * (1 - d) * w[index].double()
            remaining *= d
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_pass_sees_every_sample_once() -> None:
    batches = Batches(torch.arange(10.0)[:, None], 4, seed=3)
    seen = torch.cat([next(batches) for _ in range(15)]).flatten()  # six passes, batches across their ends
    passes = seen.view(6, 10)
    assert torch.equal(passes.sort(1).values, torch.arange(10.0).expand(6, 10))
    assert len({tuple(row.tolist()) for row in passes}) == 6
    restored = Batches(torch.arange(10.0)[:, None], 4, seed=99)
    for _ in range(2):  # in the middle of a pass
        next(batches)
    restored.load_state_dict(batches.state_dict())
    assert torch.equal(
        torch.cat([next(restored) for _ in range(9)]), torch.cat([next(batches) for _ in range(9)])
    )


@pytest.mark.parametrize(("kind", "parameter"), [("bias", "bias"), ("loss", None)])
def test_a_step_that_is_not_finite_is_named_and_not_taken(kind: str, parameter: str | None) -> None:
    objective = LeastSquares({3: kind})
    trainer = make_trainer(objective)
    trainer.step()
    trainer.step()
    before = weights(objective)
    with pytest.raises(NonFiniteError, match="step 3: the loss is") as error:
        trainer.step()
    assert (error.value.step, error.value.parameter) == (3, parameter)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(objective), strict=True))
    assert all(p.isfinite().all() for p in weights(trainer.ema.module))


def test_a_failure_seen_late_is_still_the_first_and_poisons_nothing() -> None:
    """As on a GPU, where nothing is asked between two lines of the record."""
    late, clean = LeastSquares({3: "bias", 5: "loss"}), LeastSquares()
    trainer, reference = make_trainer(late), make_trainer(clean)
    trainer.check_finite = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(6):
        trainer.step()
    with pytest.raises(NonFiniteError) as error:
        Trainer.check_finite(trainer)
    assert (error.value.step, error.value.parameter) == (3, "bias")
    # steps 3 and 5 were left out: Adam has taken four steps, on batches 1, 2, 4 and 6
    for skipped in (False, False, True, False, True, False):
        if skipped:
            next(reference._batches)
        else:
            reference.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(late), weights(clean), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_does_not_wait() -> None:
    objective = LeastSquares({4: "bias"}).cuda()
    data = torch.randn(64, 3, device="cuda")
    stream = NoiseStream(0, device="cuda")
    optim = Optim(batch_size=16, warmup=3)
    trainer = Trainer(objective, data, optim, stream=stream, seed=0)  # pyright: ignore[reportArgumentType]
    trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # within a pass over the data
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NonFiniteError, match=r"step 4: .* bias"):
        trainer.read_statistics()


def small(steps: int, **changes: object) -> Config:
    """The checkerboard, small, with a line of the record and a checkpoint at steps that do not coincide."""
    base = PRESETS["checkerboard"]
    settings = {
        "log_every": 4,
        "data": dataclasses.replace(base.data, points=500),
        "optim": dataclasses.replace(base.optim, steps=steps, batch_size=64, warmup=5, ema=0.99),
        "penalty": dataclasses.replace(base.penalty, exact=False, fraction=0.5, time_density="inverse-sigma"),
        "evaluation": Evaluation(every=8, points=20, levels=2),
        "sampling": Sampling(count=20, steps=5),
        "checkpoint": Checkpoint(every=5, keep=2),
        "device": "cpu",
    }
    return dataclasses.replace(base, **{**settings, **changes})  # pyright: ignore[reportArgumentType]


def record(folder: RunFolder) -> list[dict]:
    """The record without what a clock says."""
    lines = (folder.path / "stats.jsonl").read_text().splitlines()
    clock = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("kind", ["quasi-conservative", "conservative"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    model = dataclasses.replace(PRESETS["checkerboard"].model, kind=kind)
    whole = create(small(18, model=model), tmp_path / "whole")
    assert run.train(whole.read_config(), whole)
    parts = create(small(10, model=model), tmp_path / "parts")
    assert run.train(parts.read_config(), parts)
    # a process killed after it wrote rows beyond its newest checkpoint
    with open(parts.path / "stats.jsonl", "a") as file:
        file.write('{"step": 12, "loss": 5.0}\n')
    torch.manual_seed(123)  # the resumed process has another state of torch's generator
    parts.write_config(small(18, model=model))
    assert run.train(parts.read_config(), parts)

    expected = [row for row in record(whole) if "loss" in row]
    resumed = [row for row in record(parts) if "loss" in row]
    assert [row["step"] for row in resumed] == [4, 8, 10, 12, 16, 18]
    by_step = {row["step"]: row for row in resumed}
    # the first part ended with a line at its last step, which the other run has not
    for row in expected:
        if row["step"] != 12:
            assert {k: by_step[row["step"]][k] for k in row} == row
    newest = [checkpoint.load(checkpoint.find(folder.checkpoints)) for folder in (whole, parts)]
    assert_same(newest[0], newest[1])


def test_a_stop_between_two_lines_changes_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = create(small(16), tmp_path / "whole")
    assert run.train(whole.read_config(), whole)
    stopped = create(small(16), tmp_path / "stopped")
    step = Trainer.step

    def step_and_signal(self: Trainer) -> None:
        step(self)
        if self.steps_done == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_signal)
        assert not run.train(stopped.read_config(), stopped)
    assert checkpoint.steps(stopped.checkpoints) == [5, 6]
    assert run.train(stopped.read_config(), stopped)
    assert record(stopped) == record(whole)


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = create(small(1_000_000), tmp_path / "run")
    command = [sys.executable, "-m", "qcsbm_fast", "train", "--resume", str(folder.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not checkpoint.steps(folder.checkpoints) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "Stopped by SIGTERM after step" in output
    assert f"qcsbm train --resume {folder.path}" in output
    stopped = checkpoint.steps(folder.checkpoints)[-1]
    assert f"after step {stopped};" in output
    assert run.train(small(stopped + 3), folder)
    assert checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]["steps_done"] == stopped + 3


@pytest.fixture
def usual_interrupt() -> Iterator[None]:
    """Ctrl-C as in the foreground: a shell without job control starts its background jobs with SIGINT ignored."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("usual_interrupt")
def test_a_second_signal_acts_at_once() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert handlers == (signal.default_int_handler, signal.SIG_DFL)


def test_a_run_that_diverges_keeps_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(small(20), tmp_path / "run")
    step = Trainer.step

    def spoil(self: Trainer) -> None:
        if self.steps_done == 12:
            self._batches._data[:] = torch.inf
        step(self)

    monkeypatch.setattr(Trainer, "step", spoil)
    with pytest.raises(
        NonFiniteError, match=r"step 13: the loss is \S+ and the gradient of \S+ is not finite"
    ):
        run.train(folder.read_config(), folder)
    assert checkpoint.steps(folder.checkpoints) == [5, 10]
    saved = checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]
    assert all(value.isfinite().all() for value in saved["score"].values())
    assert [row["step"] for row in record(folder)] == [4, 8, 12]


def test_what_a_run_learned_must_not_change_under_it() -> None:
    old = small(10)
    check_continues(old, small(20, optim=dataclasses.replace(old.optim, lr=1.0)))
    with pytest.raises(RunError, match=r"model\.kind \(quasi-conservative -> conservative\) cannot change"):
        check_continues(old, small(20, model=dataclasses.replace(old.model, kind="conservative")))
    with pytest.raises(RunError, match=r"seed \(0 -> 1\) cannot change"):
        check_continues(old, small(20, seed=1))


def test_a_run_folder_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small(10)
    names = [create(config).path.name for _ in range(3)]
    assert names == [f"checkerboard-quasi-conservative-{number}" for number in (1, 2, 3)]
    with pytest.raises(RunError, match=r"--resume .* another folder with --out"):
        create(config, Path("runs") / names[0])
    (tmp_path / "empty").mkdir()
    assert create(config, tmp_path / "empty").read_config() == config
    with pytest.raises(RunError, match="not a run folder"):
        open_run(tmp_path)
