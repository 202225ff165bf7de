"""NCSN++ through the trainer: settings to network, the three kinds, bfloat16, mirrored images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from qcsbm_fast.dual import Dual
from qcsbm_fast.nn import NCSNpp
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score
from qcsbm_fast.sde import VE
from qcsbm_fast.train import build, checkpoint, report, run
from qcsbm_fast.train.batches import Batches
from qcsbm_fast.train.config import Config, Evaluation, Model, Optim, Sampling
from qcsbm_fast.train.ema import EMA
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import create
from qcsbm_fast.train.presets import PRESETS

KINDS = ("unconstrained", "conservative", "quasi-conservative")


def small(precision: str = "float32", **model: object) -> Config:
    """The digits with a network of a few thousand weights."""
    base = PRESETS["digits"]
    options = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "init_scale": 1.0}
    return dataclasses.replace(
        base,
        device="cpu",
        precision=precision,
        log_every=5,
        model=Model(**{**options, "dropout": 0.0, **model}),  # pyright: ignore[reportArgumentType]
        optim=Optim(steps=20, batch_size=32, lr=2e-3, warmup=5, ema=0.9),
        evaluation=Evaluation(every=0, points=8, levels=2),
        sampling=Sampling(count=4, steps=2),
    )


def gradients(config: Config, x0: torch.Tensor) -> list[torch.Tensor]:
    """Of the loss of one batch, with the seed's noise."""
    setup = build.build(config)
    objective = build.objective(config, setup.score, NoiseStream(3))
    objective(x0).loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in setup.score.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_trains_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)
    folder = create(small(precision, kind=kind), tmp_path / "run")
    assert run.train(folder.read_config(), folder)
    state = checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]
    for name in ("score", "ema", "optimizer"):  # all that is kept is float32
        kept = [state["score"], state["ema"]["module"], *state["optimizer"]["state"].values()]
        dtypes = {v.dtype for part in kept for v in part.values() if isinstance(v, torch.Tensor)}
        assert dtypes == {torch.float32}, name
    rows = [line for line in (folder.path / "stats.jsonl").read_text().splitlines() if '"loss"' in line]
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in rows]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_those_of_float32(kind: str) -> None:
    """Cosine above 0.99 over all parameters, and no parameter without one, in the backward pass too."""
    x0 = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, rounded = (gradients(small(precision, kind=kind), x0) for precision in ("float32", "bfloat16"))
    assert not all(torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))
    a, b = (torch.cat([g.double().flatten() for g in parts]) for parts in (exact, rounded))
    assert torch.dot(a, b) / (a.norm() * b.norm()) > 0.99
    assert 0.97 < a.norm() / b.norm() < 1.03
    assert [bool(g.any()) for g in exact] == [bool(g.any()) for g in rounded]


class Watch(nn.Module):
    """`weight x`, noting the dtype of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.seen: list[torch.dtype] = []

    def forward(self, x, sigma):
        field = nn.functional.linear(x, self.weight)
        self.seen.append(field.dtype)
        return field


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_holds_in_every_pass(kind: str) -> None:
    """Forward, tangents and the recomputed pass of the energy's backward run in bfloat16; scores are float32."""
    watch = Watch()
    score = Score(watch, VE(0.1, 3.0), kind, autocast=torch.bfloat16)  # pyright: ignore[reportArgumentType]
    x, t = torch.rand(5, 3).requires_grad_(), torch.rand(5)
    value = score(x, t)
    pushed = score(Dual(x, torch.ones(2, 5, 3)), t)
    value.sum().backward()
    assert {value.dtype, pushed.primal.dtype, pushed.tangents.dtype} == {torch.float32}
    assert x.grad is not None
    assert set(watch.seen) == {torch.bfloat16}
    watch.seen.clear()
    build.full_precision(score)(x, t)
    assert set(watch.seen) == {torch.float32}
    assert score.autocast is torch.bfloat16


def test_settings_reach_the_network() -> None:
    config = small(progressive="output_skip", fir_kernel=(1.0, 2.0, 1.0), embedding_type="positional")
    net = build.build(config).score.network
    assert isinstance(net, NCSNpp)
    c = net.config
    assert (c.image_size, c.num_channels, c.sigma_min, c.sigma_max) == (8, 1, 0.02, 5.0)
    assert (c.progressive, c.fir_kernel, c.embedding_type) == ("output_skip", (1.0, 2.0, 1.0), "positional")
    with pytest.raises(ConfigError, match=r"model: image_size: expected a multiple of 16 for the 5 levels"):
        build.build(small(ch_mult=(1, 1, 1, 1, 1)))


def test_averaged_weights_are_evaluated_without_dropout() -> None:
    setup = build.build(small(dropout=0.5))
    score = EMA(setup.score, 0.9).module
    x, t = setup.test[:4], torch.full((4,), 0.5)
    assert torch.equal(score(x, t), score(x, t))
    assert not torch.equal(setup.score(x, t), setup.score(x, t))


def test_images_are_mirrored_by_fair_coins() -> None:
    """Each sample of each pass is itself or its mirror image; 5 standard deviations of 4000 fair coins."""
    bytes_ = torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    images = bytes_.float() / 255
    plain, mirrored = Batches(bytes_, 16, seed=1), Batches(bytes_, 16, seed=1, flip=True)
    index = Batches(torch.arange(40.0)[:, None], 16, seed=1)
    assert torch.equal(next(plain), images[next(index).long().flatten()])
    flips = 0
    for _ in range(250):
        batch = next(mirrored)
        distance = (batch[:, None] - images[None]).abs().flatten(2).amax(2).amin(1)
        reverse = (batch[:, None] - images.flip(-1)[None]).abs().flatten(2).amax(2).amin(1)
        assert (torch.minimum(distance, reverse) == 0).all()
        flips += int((reverse == 0).sum())
    assert abs(flips - 2000) < 5 * 1000**0.5
    restored = Batches(bytes_, 16, seed=9, flip=True)
    restored.load_state_dict(mirrored.state_dict())
    assert torch.equal(
        torch.cat([next(restored) for _ in range(6)]), torch.cat([next(mirrored) for _ in range(6)])
    )
