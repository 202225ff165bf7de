"""`torch.compile(fullgraph=True)` of the objective with its gradients, and of a sampler's step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qcsbm_fast import NoiseStream, Score, sde
from qcsbm_fast.nn import NCSNpp, ToyMLP
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.sampling.correctors import CORRECTORS
from qcsbm_fast.sampling.noise import noisy_step
from test_cuda_graph import STEPS, TINY

RGB = dataclasses.replace(
    TINY, num_channels=3, nf=4, ch_mult=(1,), attn_resolutions=(), progressive_input="none", dropout=0.0
)
Gradients = tuple[dict[str, Tensor], tuple[Tensor | None, ...]]


@pytest.fixture(autouse=True)
def _traces_gradients() -> Iterator[None]:
    """J^T v is a gradient taken inside of the region."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not compile torch.autograd.grad")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


def gradients(images: bool, settings: dict[str, Any], device: str = "cpu") -> Callable[[Tensor], Gradients]:
    """A function of a batch: the statistics and the gradient of each parameter."""
    torch.manual_seed(0)
    network = NCSNpp(RGB) if images else ToyMLP("identity")
    score = Score(network, sde.VE(0.1, 3.0), "quasi-conservative").to(device)
    objective = DenoisingObjective(score, stream=NoiseStream(3, device), **settings)
    parameters = list(objective.parameters())

    def step(x0: Tensor) -> Gradients:
        result = objective(x0)
        return result.stats, torch.autograd.grad(result.loss, parameters, allow_unused=True)

    return step


@pytest.mark.parametrize(
    ("name", "images"),
    [("no penalty", False), ("exact", False), ("part of the batch", False), ("part of the batch", True)],
)
def test_the_whole_objective(name: str, images: bool) -> None:
    """Loss, penalty and one backward in one graph: the values without it, and fresh noise at every call."""
    settings = STEPS[name]["objective"]
    plain, whole = gradients(images, settings), gradients(images, settings)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    x0 = torch.rand(8, *((3, 8, 8) if images else (2,)))
    losses = []
    for _ in range(2):
        (stats, expected), (got_stats, got) = plain(x0), compiled(x0)
        torch.testing.assert_close(got_stats, stats, rtol=1e-4, atol=1e-6)
        losses.append(stats["loss"])
        for a, b in zip(expected, got, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7
    assert losses[0] != losses[1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("corrector", "images"), [("langevin", False), ("annealed-langevin", False), ("langevin", True)]
)
def test_a_samplers_step(corrector: str, images: bool) -> None:
    """Corrector and predictor in one graph, with noise that goes on."""
    torch.manual_seed(0)
    score = Score(NCSNpp(RGB).eval() if images else ToyMLP("identity"), sde.VE(0.1, 3.0))

    def step(x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor, stream: NoiseStream) -> Tensor:
        x, _ = CORRECTORS[corrector](score, x, t, snr=0.16, steps=10, stream=stream)
        return noisy_step(x, score(x, t), a, b, c, stream)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, *((3, 8, 8) if images else (2,)))
    coefficients = torch.rand(4, 4)
    plain, whole = NoiseStream(5), NoiseStream(5)
    results = [(step(x, *coefficients, plain), compiled(x, *coefficients, whole)) for _ in range(2)]
    for expected, got in results:
        torch.testing.assert_close(got, expected)
    assert not torch.equal(results[0][0], results[1][0])
