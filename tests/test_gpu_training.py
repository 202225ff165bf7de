"""Training and sampling on a GPU: CUDA graphs against the plain steps, no waiting, float16, compilation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import test_cuda_graph
from qcsbm_fast import NoiseStream, Score, sde
from qcsbm_fast.nn import NCSNpp
from qcsbm_fast.sampling import pc
from qcsbm_fast.sampling.noise import SampleNoise
from qcsbm_fast.train.ema import EMA
from qcsbm_fast.train.trainer import Trainer
from test_compile import gradients
from test_cuda_graph import QUARTER, SAMPLERS, STEPS, TINY, make_trainer, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def trainer(name: str, *, replayed: bool = True) -> Trainer:
    """On the GPU; without `replayed` the very function that is captured otherwise, called."""
    made = make_trainer(**STEPS[name], device="cuda")
    if not replayed:
        made._take = made._update
    torch.manual_seed(7)
    return made


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(state) if isinstance(value, Tensor)]


def assert_close(a: Trainer, b: Trainer, exact: bool) -> None:
    for ours, theirs in zip(tensors(a.state_dict()), tensors(b.state_dict()), strict=True):
        if exact or not ours.is_floating_point():
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_replayed_training_is_the_plain_one(name: str) -> None:
    """Weights, averages, moments, statistics and random states, over several passes; and resumed."""
    exact = "net" not in STEPS[name]  # cuDNN may choose another algorithm under capture
    replayed, plain = trainer(name), trainer(name, replayed=False)
    torch.manual_seed(7)
    run(replayed, 7)
    middle = copy.deepcopy(replayed.state_dict())
    run(replayed, 6)
    torch.manual_seed(7)
    run(plain, 13)
    assert_close(replayed, plain, exact)
    resumed = trainer(name)
    resumed.load_state_dict(middle)
    run(resumed, 6)
    assert_close(resumed, replayed, exact)
    assert replayed.read_statistics() == pytest.approx(plain.read_statistics(), rel=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait(name: str) -> None:
    made = make_trainer(**STEPS[name], device="cuda")
    made.step()
    x0 = next(made._batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made._update(x0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_use_no_more_memory() -> None:
    made = trainer("part of the batch")
    run(made, 5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run(made, 40)
    made.read_statistics()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)  # an order of the data


def test_replays_follow_the_current_stream() -> None:
    """Weights that are written late on a side stream: a replay elsewhere would read them too early."""
    late, early = trainer("no penalty"), trainer("no penalty")
    for made in (late, early):
        run(made, 4)
    changed = [p.detach() * 0.5 for p in early.objective.parameters()]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for made, pause in ((late, 50_000_000), (early, 0)):
        with torch.cuda.stream(side), torch.no_grad():
            if pause:
                torch.cuda._sleep(pause)
            for p, value in zip(made.objective.parameters(), changed, strict=True):
                p.copy_(value)
            made.step()
        torch.cuda.synchronize()
    assert_close(late, early, exact=True)


@pytest.mark.parametrize("by_index", [False, True], ids=["stream", "by sample"])
@pytest.mark.parametrize(("name", "predictor", "corrector"), SAMPLERS)
def test_replayed_sampling_is_the_plain_one(
    name: str, predictor: str, corrector: str, by_index: bool
) -> None:
    results = []
    for choice in ("off", "on"):
        stream = SampleNoise(5, 3, "cuda") if by_index else NoiseStream(5, "cuda")
        results.append(test_cuda_graph.sampled(name, predictor, corrector, stream, cuda_graph=choice))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconstrained", "conservative"])
def test_replayed_sampling_of_images(kind: Any) -> None:
    score = Score(NCSNpp(TINY).eval(), sde.VE(0.1, 3.0), kind).cuda()
    plain, replayed = (
        pc.predictor_corrector(
            score, (4, 1, 8, 8), steps=12, stream=NoiseStream(1, "cuda"), cuda_graph=choice
        )
        for choice in ("off", "on")
    )
    torch.testing.assert_close(plain, replayed, rtol=1e-3, atol=1e-4)


def test_the_average_leaves_the_weights_alone() -> None:
    source = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last))  # pyright: ignore
    source.cuda()
    ema = EMA(source, 0.9, capturable=True)
    start = [p.detach().double().clone() for p in source.parameters()]
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    weights = [p.detach().clone() for p in source.parameters()]
    ema.update()
    decay = 2 / 11
    for average, p, before, now in zip(
        ema.module.parameters(), source.parameters(), start, weights, strict=True
    ):
        assert torch.equal(p, now)
        expected = decay * before + (1 - decay) * now.double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


def test_float16_learns_what_float32_does() -> None:
    """The first steps agree; weights, averages and moments stay float32; the scale comes down or stays, never at 0."""
    made = {}
    for name, dtype in (("float32", None), ("float16", torch.float16)):
        one = make_trainer(
            objective=QUARTER,
            net=dataclasses.replace(TINY, dropout=0.0),
            trainer={"scaled": dtype is not None},
            device="cuda",
        )
        one.objective.score.autocast = dtype
        run(one, 25)
        made[name] = one.read_statistics()
        for value in tensors(one.state_dict()["score"]):
            assert value.dtype == torch.float32
    assert made["float16"]["loss_scale"] >= 1.0
    assert made["float16"]["loss"] == pytest.approx(made["float32"]["loss"], rel=0.1)


@pytest.mark.parametrize("images", [False, True])
def test_the_compiled_objective(images: bool) -> None:
    """Through inductor."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not compile torch.autograd.grad")
    x0 = torch.rand(8, *((3, 8, 8) if images else (2,)), device="cuda")
    plain, whole = (gradients(images, QUARTER, "cuda") for _ in range(2))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(whole, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(x0)[0], plain(x0)[0], rtol=1e-3, atol=1e-5)
