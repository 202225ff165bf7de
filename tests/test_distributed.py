"""Several processes take the steps of one: gloo on this machine, by torchrun as a user starts it."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcsbm_fast import NoiseStream, Score, sde
from qcsbm_fast.nn import ToyMLP
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.train import checkpoint
from qcsbm_fast.train.config import Checkpoint, Config, Evaluation, Sampling
from qcsbm_fast.train.distributed import Processes
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import RunFolder, create
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.run import make_trainer
from test_trainer import record


def objective(seed: int = 0, **settings: Any) -> DenoisingObjective:
    torch.manual_seed(seed)
    score = Score(ToyMLP("identity"), sde.VE(0.1, 3.0), "quasi-conservative").double()
    return DenoisingObjective(score, stream=NoiseStream(5), **settings)


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"balancing_factor": 0.5, "probes": 2},
        {"balancing_factor": 0.5, "exact": True},
        {
            "balancing_factor": 0.5,
            "fraction": 0.25,
            "time_density": "inverse-sigma",
            "estimator": "symmetric",
        },
        {
            "balancing_factor": 0.5,
            "fraction": 0.1,
            "time_density": "inverse-sigma",
        },  # two drawn: a share is empty
    ],
)
def test_shares_add_up_to_the_batch(world: int, settings: dict[str, Any]) -> None:
    """Losses, statistics and gradients of one process, from the means and sums over the shares, to rounding."""
    x0 = torch.randn(17, 2, dtype=torch.float64)
    whole = objective(**settings)
    expected = whole(x0)
    expected.loss.backward()
    losses, gradients, stats, streams = [], [], [], []
    for rank in range(world):
        part = objective(**settings)
        part.shard = (rank, world)
        result = part(x0)
        result.loss.backward()
        losses.append(result.loss.detach())
        gradients.append(gradient(part))
        stats.append(result.stats)
        streams.append(part.stream.state_dict()["state"])
    torch.testing.assert_close(torch.stack(losses).mean(), expected.loss.detach(), rtol=1e-12, atol=0)
    theirs = gradient(whole)
    assert (torch.stack(gradients).mean(0) - theirs).norm() < 1e-12 * theirs.norm()
    for name, value in expected.stats.items():
        torch.testing.assert_close(sum(s[name] for s in stats), value, rtol=1e-12, atol=0)
    assert all(torch.equal(state, whole.stream.state_dict()["state"]) for state in streams)


def small(steps: int, **changes: Any) -> Config:
    base = PRESETS["checkerboard"]
    settings = {
        "log_every": 3,
        "data": dataclasses.replace(base.data, points=200),
        "optim": dataclasses.replace(base.optim, steps=steps, batch_size=48, accumulate=2, ema=0.9, lr=1e-3),
        "penalty": dataclasses.replace(base.penalty, exact=False, fraction=0.5, time_density="inverse-sigma"),
        "evaluation": Evaluation(every=6, points=20, levels=2),
        "sampling": Sampling(sampler="pc", count=10, steps=3),
        "checkpoint": Checkpoint(every=6, keep=3),
        "device": "cpu",
    }
    return dataclasses.replace(base, **{**settings, **changes})


def images(steps: int, **changes: Any) -> Config:
    """A network whose weights are stored channels-last."""
    base = PRESETS["digits"]
    model = dataclasses.replace(
        base.model, nf=4, num_res_blocks=1, ch_mult=(1, 1), attn_resolutions=(4,), dropout=0.0, init_scale=1.0
    )
    optim = dataclasses.replace(base.optim, batch_size=16, lr=1e-3)
    return small(
        steps,
        **{"preset": "digits", "data": base.data, "model": model, "sde": base.sde, "optim": optim, **changes},
    )


def agree(folders: Sequence[RunFolder], seen: int) -> None:
    """The newest checkpoints hold the same, to rounding, all of it whole."""
    state, *others = (checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"] for folder in folders)
    for other in others:
        assert state["images"] == other["images"] == seen
        for part in ("score", "ema"):
            mine, theirs = (s[part].get("module", s[part]) for s in (state, other))
            for name, value in mine.items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)
        for index, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                theirs = other["optimizer"]["state"][index][name]
                torch.testing.assert_close(theirs, value, rtol=1e-2, atol=1e-4)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-addr",
               "127.0.0.1", "--master-port", free_port(), "-m", "qcsbm_fast", "train", *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(argument) for argument in command],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_take_the_steps_of_one_and_each_resumes_the_other(tmp_path: Path) -> None:
    one, two = (create(small(12), tmp_path / name) for name in ("one", "two"))
    shared = create(small(12, fsdp=True), tmp_path / "shared")  # weights in shares, saved whole
    folders = (one, two, shared)
    pictures = [create(images(9, fsdp=fsdp), tmp_path / f"pictures-{fsdp}") for fsdp in (False, True)]
    jobs = [(one, 1, 6), (one, 2, 12), (two, 2, 6), (two, 1, 12), (shared, 2, 6), (shared, 2, 12)]
    jobs += [(pictures[0], 1, 9), (pictures[1], 1, 3), (pictures[1], 2, 6), (pictures[1], 1, 9)]
    program = [sys.executable, Path(__file__).parent / "fork_world.py", free_port()]
    command = [*program, *(part for folder, count, steps in jobs for part in (folder.path, count, steps))]
    # without matrix registers: with them sharded networks, which run layer by layer, round otherwise than whole ones
    env = {**os.environ, "QCSBM_CPU_CAPABILITY": "avx512"}
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=200, env=env
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # the first process speaks for all
    assert [result.stdout.count(f"Run folder: {folder.path}") for folder in folders] == [2, 2, 2]
    agree(pictures, 9 * 16)
    agree(folders, 12 * 48)
    # two processes wrote the first half of one record, one process that of the other
    rows = [record(folder) for folder in folders]
    assert [row["step"] for row in rows[0]] == [3, 6, 9, 12]
    for a, *others in zip(*rows, strict=True):
        for b in others:
            assert a.keys() == b.keys()
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)


def test_a_signal_stops_all_at_the_same_step(tmp_path: Path) -> None:
    folder = create(small(1_000_000), tmp_path / "run")
    process = torchrun(2, "--resume", folder.path)
    deadline = time.monotonic() + 100
    while (
        len(checkpoint.steps(folder.checkpoints)) < 2
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: torchrun and both processes
    output, errors = process.communicate(timeout=100)
    assert "Stopped by SIG" in output, errors[-3000:]
    stopped = checkpoint.steps(folder.checkpoints)[-1]
    assert f"after step {stopped}; all is saved" in output
    assert checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]["steps_done"] == stopped


def test_every_process_needs_a_sample(tmp_path: Path) -> None:
    from qcsbm_fast.train import build

    config = small(3)
    with pytest.raises(ConfigError, match="at least one sample for each of the 25 processes, got 24"):
        make_trainer(config, build.build(config), Processes(0, 25))


def test_processes_draw_apart_and_again_the_same() -> None:
    """Dropout's generator: the first process keeps its own, the others have one of rank and step each."""
    from qcsbm_fast.train import build

    config = small(3)
    draws = {}
    for rank in (0, 1, 2, 1):
        trainer = make_trainer(config, build.build(config))
        trainer._processes = Processes(rank, 3)
        torch.manual_seed(0)
        trainer.part_ways()
        first = torch.rand(3)
        assert rank not in draws or torch.equal(draws[rank], first)
        draws[rank] = first
    torch.manual_seed(0)
    assert torch.equal(draws[0], torch.rand(3))
    assert len({tuple(value.tolist()) for value in draws.values()}) == 3
    trainer.steps_done = 1
    trainer.part_ways()
    assert not torch.equal(torch.rand(3), draws[1])
