"""As few parts of a batch as fit in memory, from the memory of small steps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcsbm_fast import memory
from qcsbm_fast.train import build, checkpoint, fit
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.distributed import Processes
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import RunFolder, create
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.run import make_trainer, train
from qcsbm_fast.train.trainer import Trainer
from test_distributed import small

linux = pytest.mark.skipif(
    memory.peak_memory(lambda: None) is None, reason="the system does not tell its memory"
)


@linux
def test_peak_memory_counts_what_is_held_at_once():
    def work() -> None:
        for _ in range(3):
            torch.ones(2**22)  # 16 MiB, three times in turn

    assert 15 < memory.peak_memory(work) / 2**20 < 40  # pyright: ignore[reportOptionalOperand]
    free = memory.available_memory(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**45


@pytest.mark.parametrize(
    ("room", "world", "expected"), [(1e12, 1, 1), (1e12, 3, 1), (800, 1, 2), (800, 2, 1), (210, 1, 16)]
)
def test_the_fewest_parts_that_fit(monkeypatch: pytest.MonkeyPatch, room: float, world: int, expected: int):
    """With a step of n samples taking 100 + 10 n bytes and four fifths of the room in use."""
    monkeypatch.setattr(fit, "available_memory", lambda _: int(room))
    monkeypatch.setattr(fit, "_need", lambda _, size, *rest: 100 + 10 * size)
    config = small(1)
    config = replace(config, optim=replace(config.optim, batch_size=96, accumulate=0))
    found = fit.parts(
        config, build.build(config), Processes(0, world), lambda config: pytest.fail("no steps")
    )
    assert found == expected


def test_too_little_memory_is_an_error_before_the_first_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit, "available_memory", lambda _: 100)
    monkeypatch.setattr(fit, "_need", lambda _, size, *rest: 100 + 10 * size)
    config = small(1)
    with pytest.raises(ConfigError, match="a step of one sample needs about 0 MiB, 0 MiB are free"):
        fit.parts(config, build.build(config), Processes(), lambda config: pytest.fail("no steps"))
    monkeypatch.setattr(fit, "available_memory", lambda _: None)
    with pytest.raises(ConfigError, match="give a number"):
        fit.parts(config, build.build(config), Processes(), lambda config: pytest.fail("no steps"))


@linux
def test_measured_steps_leave_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that finds its parts ends with the weights of one that was told them, and keeps the number."""
    monkeypatch.setattr("qcsbm_fast.train.report.draw_pictures", lambda *_: None)
    base = small(3)

    def trained(config: Config, name: str) -> tuple[RunFolder, dict]:
        folder = create(config, tmp_path / name)
        train(config, folder)
        return folder, checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]

    folder, found = trained(replace(base, optim=replace(base.optim, accumulate=0)), "found")
    assert folder.read_config().optim.accumulate == 1
    _, told = trained(replace(base, optim=replace(base.optim, accumulate=1)), "told")
    assert all(
        torch.equal(a, b) for a, b in zip(found["score"].values(), told["score"].values(), strict=True)
    )
    assert torch.equal(found["torch_rng"], told["torch_rng"])


def foreseen() -> float:
    """The memory of a step of 1024 samples of a network of images, as a share of what small ones say."""
    base = PRESETS["digits"]
    model = replace(base.model, nf=16, num_res_blocks=1, ch_mult=(1, 1), attn_resolutions=())
    config = replace(base, model=model, device="cpu")
    setup = build.build(config)

    def trainer(config: Config) -> Trainer:
        return make_trainer(config, setup.copy())

    law = fit.memory_law(config, setup.device, 1024, trainer)
    large = fit._need(config, 1024, trainer, setup.device)
    assert law is not None
    assert large is not None
    constant, per_sample = law
    return large / (constant + 1024 * per_sample)


@linux
def test_the_memory_of_a_larger_step_is_foreseen():
    """Within a third; in a process of its own, where nothing that others have freed serves one step or another."""
    program = "import test_fit; print(test_fit.foreseen())"
    run = [sys.executable, "-c", program]
    found = subprocess.run(run, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    assert 0.75 < float(found.stdout) < 1.33


def test_the_first_step_tells_nothing(monkeypatch: pytest.MonkeyPatch):
    """It loads libraries too: of 100 + 2^20 n bytes for n samples, the first call's 2^30 more do not count."""
    sizes: list[int] = []

    def need(_: Config, size: int, *rest: object) -> int:
        sizes.append(size)
        return 100 + 2**20 * size + (2**30 if len(sizes) == 1 else 0)

    monkeypatch.setattr(fit, "_need", need)
    law = fit.memory_law(small(1), torch.device("cpu"), 4096, lambda config: pytest.fail("no steps"))
    assert law == (100, 2**20)
    assert max(sizes) == 64  # the first to differ by 32 MiB
